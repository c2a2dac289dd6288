"""One distribution out of what the generalist and the specialists that are active say of a row.

Legend: N rows, C classes, M specialists, A active ones of a row, K groups of classes of a row.

q minimises F(q) = KL(p_g || q) + sum over the active m of KL(p_m || q_m), where q_m keeps the specialist's classes and
adds up all others as its dustbin. With n_j = p_g,j + sum of p_m,j over the active specialists that have class j, d_m
the dustbin's probability, R_m what q leaves to the classes that m does not have, and A active specialists,

    dF/dz_j = (1 + A) q_j - n_j - q_j sum over the active m without class j of d_m / R_m  at q = softmax(z)

F is convex in q, so that where this is 0 is the optimum. The paper goes down this gradient. Here the same point is
found in few steps, of no chosen size: with s_m and t_j as unknowns too, it is where

    q_j t_j = n_j,   R_m s_m = d_m,   t_j + sum over the active m without class j of s_m = 1 + A,   q, s, t > 0,

which are the conditions of an interior-point method (primal-dual, with n and d where others have the barrier), and of
these each step solves the linear part. Classes that the same active specialists have share one t, so that q is n times
one factor there: a row has as many unknowns as such groups, never C. One active specialist makes two, known in closed
form.

Source: Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), section 5.4, equation 5, at T = 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from storage.errors import StudentError
from studenttrain.specialists.fusion_groups import GroupProblem, Said, group_problem, normalised

DEFAULT_TOLERANCE = 1e-8
MAX_ITERATIONS = 200  # what was seen needs less than thirty
INNER = 0.1  # of the tolerance is what groups are solved to
CHUNK_VALUES = 1 << 22  # numbers of the largest array that is worked on at once, float64
LEAST = 1e-18  # masses and dustbins below it do not move a gradient, and are left out of the steps
TINY = 100.0  # times the tolerance: shares below it are taken from the optimum's formula
KEPT = 0.01  # of itself is what any unknown keeps in a step, at least, so that all stay above 0
CENTRING = 0.1  # of the mean distance from n is what a step leaves to go


@dataclass(frozen=True, eq=False)
class FusedResult:
    """Fused distributions.

    Attributes:
        logprobs_NC: their log-probabilities, float64, natural log.
        num_iterations: that the slowest row took; 0 where none had two active specialists.
        residual: the largest |dF/dz| of any row, or what the optimum's conditions are off by where that is more; at
            most the tolerance.
    """

    logprobs_NC: Tensor  # noqa: N815 - array names carry their shape
    num_iterations: int
    residual: float


def fuse(
    logprobs_NC: Tensor,
    said: Sequence[Said],
    active_NM: Tensor,
    tolerance: float = DEFAULT_TOLERANCE,
    *,
    max_iterations: int = MAX_ITERATIONS,
) -> FusedResult:
    """The distribution q of each row that minimises KL(p_g, q) + sum of KL(p_m, q) over the active specialists.

    A row without active specialists keeps the generalist's distribution. All is computed in float64 on the device of
    the input, for some rows at a time. A class to which neither the generalist nor an active specialist gives any
    probability gets none, unless a dustbin's would have nowhere better to go; such classes share it evenly.

    Args:
        logprobs_NC: the generalist's log-probabilities, float, -inf allowed; normalised here once more.
        said: of each specialist its classes, k ascending numbers, and its log-probabilities (N, k + 1), the dustbin
            last; rows for which it is not active may hold anything.
        active_NM: bool, which specialists are active for a row.
        tolerance: the largest |gradient with respect to z| that a row may be left with, above 0; where specialists
            contradict each other, rounding may not let one below 1e-9 be met.
        max_iterations: steps of a row.

    Raises:
        ValueError: shapes, classes or the tolerance don't fit.
        StudentError: a distribution is not one; a specialist of all classes has something in its dustbin; or a row is
            not within the tolerance after `max_iterations`.
    """
    _check(logprobs_NC, said, active_NM, tolerance)
    num_rows, num_classes = logprobs_NC.shape
    outside_MC = _outside(said, num_classes, logprobs_NC.device)
    fused_NC = normalised(logprobs_NC, "generalist", torch.arange(num_rows))
    num_iterations, residual = 0, 0.0
    fused_rows = active_NM.any(1).nonzero()[:, 0].to(fused_NC.device)
    step = max(1, CHUNK_VALUES // max(num_classes, _group_values(active_NM, num_classes)))
    for start in range(0, len(fused_rows), step):
        rows = fused_rows[start : start + step]
        problem = group_problem(fused_NC[rows], said, active_NM.to(rows.device)[rows], outside_MC, rows)
        share_NK, off_N, iterations = _solve(problem, INNER * tolerance, max_iterations)
        log_share_NK = _exact_where_tiny(problem, share_NK, TINY * tolerance)
        residual_N = torch.maximum(_gradient(problem, log_share_NK.exp())[0].abs().amax(1), off_N)
        worst = float(residual_N.max())
        if not worst <= tolerance:
            row = int(rows[residual_N.argmax()])
            raise StudentError(
                f"fusion: expected a gradient of at most {tolerance:g} after {max_iterations} iterations, got "
                f"{worst:.3g} in row {row}; give a larger --tolerance"
            )
        num_iterations, residual = max(num_iterations, iterations), max(residual, worst)
        fused_NC[rows] = log_share_NK.gather(1, problem.group_NC) + problem.within_NC
    return FusedResult(fused_NC, num_iterations, residual)


def _check(logprobs_NC: Tensor, said: Sequence[Said], active_NM: Tensor, tolerance: float) -> None:
    if logprobs_NC.ndim != 2:
        raise ValueError(f"logprobs_NC: expected rows of classes, got the shape {tuple(logprobs_NC.shape)}")
    num_rows, num_classes = logprobs_NC.shape
    if active_NM.dtype != torch.bool or active_NM.shape != (num_rows, len(said)):
        raise ValueError(
            f"active_NM: expected bool ({num_rows}, {len(said)}), got {active_NM.dtype} {tuple(active_NM.shape)}"
        )
    if not 0 < tolerance < float("inf"):
        raise ValueError(f"tolerance: expected a number above 0, got {tolerance}")
    for number, (classes, logprobs_NK) in enumerate(said):
        ascending = all(one < two for one, two in pairwise(classes))
        if not classes or not ascending or classes[0] < 0 or classes[-1] >= num_classes:
            raise ValueError(
                f"specialist {number}: expected ascending classes below {num_classes}, got {list(classes)}"
            )
        if logprobs_NK.shape != (num_rows, len(classes) + 1):
            raise ValueError(
                f"specialist {number}: expected log-probabilities ({num_rows}, {len(classes) + 1}), its classes and "
                f"the dustbin, got {tuple(logprobs_NK.shape)}"
            )


def _group_values(active_NM: Tensor, num_classes: int) -> int:
    """Numbers that a row's groups take at most: each active specialist may cut every group in two."""
    num_active = int(active_NM.sum(1).max()) if active_NM.numel() else 0
    return num_active * (num_classes if num_active > num_classes.bit_length() else min(num_classes, 1 << num_active))


def _outside(said: Sequence[Said], num_classes: int, device: torch.device) -> Tensor:
    """Which classes each specialist does not have, bool (M, C)."""
    outside_MC = torch.ones(len(said), num_classes, dtype=torch.bool)
    for number, (classes, _) in enumerate(said):
        outside_MC[number, list(classes)] = False
    return outside_MC.to(device)


def _gradient(problem: GroupProblem, share_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dF/dz of each group, at most as large as which each of its classes has it, (N, K).

    Returns:
        It; of each group the sum of d / R over the active specialists without it (N, K); and R (N, A).
    """
    rest_NA = (problem.outside_NAK * share_NK[:, None]).sum(2)
    ratio_NA = torch.where(problem.dustbin_NA > 0, problem.dustbin_NA / rest_NA, 0.0)
    pull_NK = (problem.outside_NAK * ratio_NA[:, :, None]).sum(1)
    return share_NK * (problem.total_N[:, None] - pull_NK) - problem.log_mass_NK.exp(), pull_NK, rest_NA


def _exact_where_tiny(problem: GroupProblem, share_NK: Tensor, tiny: float) -> Tensor:
    """Log of the groups' shares (N, K), tiny ones by q = n / (1 + A - sum d / R), where nothing cancels, to all digits.

    None is below n / (1 + A), which the optimum never is; and none is left to a group without n that needs none.
    """
    left_NK = problem.total_N[:, None] - _gradient(problem, share_NK)[1]
    is_tiny_NK = (share_NK < tiny) & (left_NK > 0.25 * problem.total_N[:, None]) & problem.log_mass_NK.isfinite()
    by_formula_NK = problem.log_mass_NK - left_NK.clamp(min=LEAST).log()
    log_share_NK = torch.where(is_tiny_NK, by_formula_NK, share_NK.log())
    log_share_NK = torch.maximum(log_share_NK, problem.log_mass_NK - problem.total_N.log()[:, None])
    is_left_out_NK = (problem.log_mass_NK == -torch.inf) & (share_NK < tiny)
    log_share_NK = torch.where(is_left_out_NK, -torch.inf, log_share_NK)
    return log_share_NK - log_share_NK.logsumexp(1, keepdim=True)


def _solve(problem: GroupProblem, tolerance: float, max_iterations: int) -> tuple[Tensor, Tensor, int]:
    """The optimum of each row, shares of the groups (N, K), how far it is off (N,), and the steps of the slowest.

    A row that is not within the tolerance after all steps is given where it was nearest to it.
    """
    num_rows, device = problem.begin_NK.shape[0], problem.begin_NK.device
    found_NK, least_N = problem.begin_NK.clone(), torch.full((num_rows,), torch.inf, dtype=torch.float64, device=device)
    rows, part, state, num_iterations = torch.arange(num_rows, device=device), problem, _first_state(problem), 0
    while True:
        share_NK = state[0] / state[0].sum(1, keepdim=True)
        residual_N = torch.maximum(_gradient(part, share_NK)[0].abs().amax(1), _distance(part, *state))
        is_better_N = residual_N < least_N[rows]
        found_NK[rows[is_better_N]], least_N[rows[is_better_N]] = share_NK[is_better_N], residual_N[is_better_N]
        is_open_N = ~(residual_N <= tolerance)
        if num_iterations == max_iterations or not bool(is_open_N.any()):
            return found_NK, least_N, num_iterations
        rows, part = rows[is_open_N], _rows_of(part, is_open_N)
        state = _step(part, *(values[is_open_N] for values in state))
        num_iterations += 1


def _rows_of(problem: GroupProblem, rows: Tensor) -> GroupProblem:
    return GroupProblem(**{name: value[rows] for name, value in vars(problem).items()})


def _first_state(problem: GroupProblem) -> tuple[Tensor, Tensor, Tensor]:
    """q, t (N, K) and s (N, A) to begin with: all above 0, where a dustbin has something."""
    share_NK = problem.begin_NK.clamp(min=LEAST)
    rest_NA = (problem.outside_NAK * share_NK[:, None]).sum(2)
    ratio_NA = torch.where(problem.dustbin_NA > LEAST, problem.dustbin_NA / rest_NA, 0.0)
    total_N1, mass_NK = problem.total_N[:, None], problem.log_mass_NK.exp()
    slack_NK = total_N1 - (problem.outside_NAK * ratio_NA[:, :, None]).sum(1)
    solved_NK = torch.where((mass_NK > 0) & (problem.begin_NK > 0), mass_NK / problem.begin_NK, slack_NK).clamp(
        min=LEAST
    )
    slack_NK = torch.where(total_N1 == 2, solved_NK, torch.maximum(slack_NK, 0.1 * total_N1))
    return share_NK, slack_NK, ratio_NA


def _distance(problem: GroupProblem, share_NK: Tensor, slack_NK: Tensor, ratio_NA: Tensor) -> Tensor:
    """How far q, t and s are from the three conditions, (N,): near to all of them is near the optimum.

    A small gradient with respect to z alone is not: a group that should be likely has hardly any while its q is tiny.
    """
    mass_NK, is_there_NA = problem.log_mass_NK.exp(), problem.dustbin_NA > LEAST
    rest_NA = (problem.outside_NAK * share_NK[:, None]).sum(2)
    off_NK = problem.total_N[:, None] - (problem.outside_NAK * ratio_NA[:, :, None]).sum(1) - slack_NK
    parts = [
        share_NK * slack_NK - mass_NK,
        off_NK,
        torch.where(is_there_NA, rest_NA * ratio_NA - problem.dustbin_NA, 0),
    ]
    return torch.cat(parts, 1).abs().amax(1)


def _step(problem: GroupProblem, share_NK: Tensor, slack_NK: Tensor, ratio_NA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of q, t and s to where the linear parts of the three conditions hold, or as far as all stay above 0."""
    outside_NAK, is_there_NA = problem.outside_NAK, problem.dustbin_NA > LEAST
    mass_NK, dustbin_NA = problem.log_mass_NK.exp().clamp(min=LEAST), torch.where(is_there_NA, problem.dustbin_NA, 0.0)
    rest_NA, product_NK = (outside_NAK * share_NK[:, None]).sum(2), share_NK * slack_NK
    gap_N = (product_NK - mass_NK).clamp(min=0).sum(1) + (rest_NA * ratio_NA - dustbin_NA).abs().sum(1)
    aim_NK = torch.maximum(mass_NK, CENTRING / mass_NK.shape[1] * gap_N[:, None])
    off_NK = problem.total_N[:, None] - (outside_NAK * ratio_NA[:, :, None]).sum(1) - slack_NK
    # what q changes by if s stays; then the equations of s alone, A x A
    apart_NK = (aim_NK - product_NK - share_NK * off_NK) / slack_NK
    safe_NA = torch.where(is_there_NA, ratio_NA, 1.0)
    right_NA = (dustbin_NA - rest_NA * ratio_NA) / safe_NA - (outside_NAK * apart_NK[:, None]).sum(2)
    left_NAA = torch.diag_embed(rest_NA / safe_NA) + (outside_NAK * (share_NK / slack_NK)[:, None]) @ outside_NAK.mT
    both_NAA = is_there_NA[:, :, None] & is_there_NA[:, None]
    left_NAA = torch.where(both_NAA, left_NAA, torch.eye(left_NAA.shape[1], dtype=torch.float64, device=rest_NA.device))
    change_NA, _ = torch.linalg.solve_ex(left_NAA, torch.where(is_there_NA, right_NA, 0.0)[:, :, None])
    change_NA = change_NA[:, :, 0]
    pulled_NK = (outside_NAK * change_NA[:, :, None]).sum(1)
    share_change_NK, slack_change_NK = apart_NK + share_NK * pulled_NK / slack_NK, off_NK - pulled_NK
    far_N1 = _furthest(share_NK, share_change_NK)
    dual_N1 = torch.minimum(_furthest(slack_NK, slack_change_NK), _furthest(safe_NA, change_NA))
    return share_NK + far_N1 * share_change_NK, slack_NK + dual_N1 * slack_change_NK, ratio_NA + dual_N1 * change_NA


def _furthest(values_NK: Tensor, changes_NK: Tensor) -> Tensor:
    """How much of a step may be taken, up to 1, (N, 1)."""
    room_NK = torch.where(changes_NK < 0, -values_NK / changes_NK, torch.inf)
    return ((1 - KEPT) * room_NK.amin(1, keepdim=True)).clamp(max=1.0)
