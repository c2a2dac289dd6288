"""Rows of a fusion as groups of classes that the same active specialists have: what there is to solve for.

Legend: N rows, C classes, M specialists, A active ones of a row, P patterns of active ones, K groups of classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from storage.errors import StudentError

LEAST_LOG = -1e4  # stands for -inf where something has to be shared out among classes that nobody believes in

Said = tuple[Sequence[int], Tensor]
"""A specialist's classes, ascending, and its log-probabilities (N, k + 1) of them and of the dustbin."""


def normalised(logprobs_NC: Tensor, whose: str, rows: Tensor) -> Tensor:
    """Log-probabilities that sum to one in float64: what float32 rounding moved would else have no optimum."""
    logprobs_NC = logprobs_NC.detach().double()
    total_N = logprobs_NC.logsumexp(1)
    if not bool(total_N.isfinite().all()):
        row = int(rows[int((~total_N.isfinite()).nonzero()[0, 0])])
        raise StudentError(
            f"{whose}: expected a distribution in row {row}, got something else; look at the model's outputs there"
        )
    return logprobs_NC - total_N[:, None]


@dataclass(frozen=True, eq=False)
class GroupProblem:
    """Rows with active specialists, as masses of groups of classes that the same active specialists have.

    Attributes:
        group_NC: the group of each class.
        within_NC: log of the class's share of its group, the same in n and in q.
        log_mass_NK: log of the group's n; -inf where it has none, or there is no such group.
        begin_NK: where q begins, shares of the whole.
        outside_NAK: 1 where the active specialist does not have the group, else 0.
        dustbin_NA: d; 0 behind the last active one.
        total_N: 1 + A.
    """

    group_NC: Tensor  # noqa: N815
    within_NC: Tensor  # noqa: N815
    log_mass_NK: Tensor  # noqa: N815
    begin_NK: Tensor  # noqa: N815
    outside_NAK: Tensor  # noqa: N815
    dustbin_NA: Tensor  # noqa: N815
    total_N: Tensor  # noqa: N815


def group_problem(
    log_g_NC: Tensor, said: Sequence[Said], active_NM: Tensor, outside_MC: Tensor, rows: Tensor
) -> GroupProblem:
    """The problem of some rows, each with an active specialist."""
    log_n_NC = log_g_NC.clone()
    group_NC, outside_NAK, member_NA = _groups(active_NM, outside_MC)
    log_dustbin_NM = torch.full(active_NM.shape, -torch.inf, dtype=torch.float64, device=log_g_NC.device)
    for number, (classes, logprobs_NK) in enumerate(said):
        mine = active_NM[:, number].nonzero()[:, 0]
        if not len(mine):
            continue
        given = logprobs_NK.to(log_g_NC.device)[rows[mine]]
        said_NK = normalised(given, f"specialist {number}", rows[mine])
        place = (mine[:, None], torch.tensor(list(classes), device=log_g_NC.device))
        log_n_NC[place] = torch.logaddexp(log_n_NC[place], said_NK[:, :-1])
        log_dustbin_NM[mine, number] = said_NK[:, -1]
        if not bool(outside_MC[number].any()) and bool((said_NK[:, -1] > -torch.inf).any()):
            raise StudentError(
                f"specialist {number}: expected nothing in its dustbin, since it has all classes, got a probability in "
                f"row {int(rows[mine[int(said_NK[:, -1].argmax())]])}; leave it out, or give it fewer classes"
            )
    padded_NM = torch.cat([log_dustbin_NM, torch.full_like(log_dustbin_NM[:, :1], -torch.inf)], 1)
    dustbin_NA = padded_NM.gather(1, member_NA).exp()
    num_groups = outside_NAK.shape[2]
    is_there_NC = log_n_NC > -torch.inf
    log_mass_NK = _group_logsumexp(log_n_NC, group_NC, num_groups)
    # classes that nobody believes in share what falls to a group of nothing but such
    lifted_NC = torch.where(is_there_NC, log_n_NC, LEAST_LOG)
    lifted_NK = _group_logsumexp(lifted_NC, group_NC, num_groups)
    is_nothing_NK = log_mass_NK == -torch.inf
    within_NC = torch.where(
        is_there_NC | is_nothing_NK.gather(1, group_NC), lifted_NC - lifted_NK.gather(1, group_NC), -torch.inf
    )
    total_N = 1.0 + active_NM.sum(1).double()
    return GroupProblem(
        group_NC=group_NC,
        within_NC=within_NC,
        log_mass_NK=log_mass_NK,
        begin_NK=_begin(log_mass_NK, lifted_NK, outside_NAK, dustbin_NA, total_N),
        outside_NAK=outside_NAK,
        dustbin_NA=dustbin_NA,
        total_N=total_N,
    )


def _groups(active_NM: Tensor, outside_MC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How each row's classes fall into groups that the same active specialists have.

    Returns:
        The group of each class (N, C); which active specialists do not have a group, float64 (N, A, K); and their
        numbers (N, A), M behind the last.
    """
    device = active_NM.device
    patterns_PM, pattern_N = active_NM.unique(dim=0, return_inverse=True)
    num_active = int(patterns_PM.sum(1).max())
    groups, outsides, members = [], [], []
    for pattern_M in patterns_PM:
        member_A = pattern_M.nonzero()[:, 0]
        code_C = torch.zeros(outside_MC.shape[1], dtype=torch.int64, device=device)
        for member in member_A:
            code_C = (2 * code_C + outside_MC[member]).unique(return_inverse=True)[1]
        num_groups = int(code_C.max()) + 1
        outside_AK = torch.zeros(num_active, num_groups, dtype=torch.float64, device=device)
        outside_AK[: len(member_A), code_C] = outside_MC[member_A].double()
        groups.append(code_C)
        outsides.append(outside_AK)
        members.append(F.pad(member_A, (0, num_active - len(member_A)), value=len(pattern_M)))
    most = max(outside_AK.shape[1] for outside_AK in outsides)
    outside_PAK = torch.stack([F.pad(part, (0, most - part.shape[1])) for part in outsides])
    return torch.stack(groups)[pattern_N], outside_PAK[pattern_N], torch.stack(members)[pattern_N]


def _group_logsumexp(values_NC: Tensor, group_NC: Tensor, num_groups: int) -> Tensor:
    """Log of the summed exp of each group's classes (N, K); -inf where there are none."""
    empty_NK = torch.full((len(values_NC), num_groups), -torch.inf, dtype=values_NC.dtype, device=values_NC.device)
    top_NK = empty_NK.scatter_reduce(1, group_NC, values_NC, "amax")
    safe_NK = torch.where(top_NK > -torch.inf, top_NK, 0.0)
    parts_NC = (values_NC - safe_NK.gather(1, group_NC)).exp()
    return torch.zeros_like(empty_NK).scatter_add(1, group_NC, parts_NC).log() + safe_NK


def _begin(log_mass_NK: Tensor, lifted_NK: Tensor, outside_NAK: Tensor, dustbin_NA: Tensor, total_N: Tensor) -> Tensor:
    """Where q begins: each dustbin shared out as n is among the classes outside; of one specialist, the solution."""
    log_outside_NAK = torch.where(outside_NAK > 0, lifted_NK[:, None], -torch.inf)
    has_any_NA1 = outside_NAK.any(2, keepdim=True)
    share_NAK = torch.where(has_any_NA1, log_outside_NAK, 0.0).softmax(2) * has_any_NA1
    return (log_mass_NK.exp() + (dustbin_NA[:, :, None] * share_NAK).sum(1)) / total_N[:, None]
