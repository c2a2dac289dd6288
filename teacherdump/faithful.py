"""Whether stored rows say what a teacher says now: each stored number's difference, over what is allowed of it.

Legend: R flat rows, C classes, K kept entries, D places of drawn ids, W width of a hidden state.

What is allowed is the encoding's own bound, those of the stores that it was transcoded from, and the teacher's own
numerical noise: between two runs of one teacher a logit may move by `tolerance` times the largest of its row (or 1, if
that is smaller), and a centred logit, which is less another one, by twice that. A log of a sum of exponentials moves no
further than the exponents do. All in float64, on the device that the logits are on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.arrays import Arrays
from storage.encodings import Dense, Encoding, HeadArrays, Hidden, Sample, TopK, encoding_from_json
from storage.encodings.dense import loaded_values
from storage.encodings.statistics import FLOAT16_LOWEST
from storage.manifest import Manifest
from storage.scan.recompute import logit_bound

Ratios = NDArray[np.float64]

HALF = (2.0**-11, 2.0**-25)  # what float16 moves a number by: a share of it, and this much where it is small
ROUNDING = 1e-5  # of a float32 reduction, on any device
QUANTISED = 1 + 1e-3  # over half a step: quantising is float32 arithmetic itself


@dataclass(frozen=True)
class Fresh:
    """What a teacher says of some rows now.

    Attributes:
        logits_RC: float32, finite but for classes of -inf.
        hidden_RW: where the encoding keeps them, or the store was made of them; else None.
        uniform_R: random numbers of the rows, for draws; else None.
        hard_targets_R: -1 where unknown; None where the store has none.
    """

    logits_RC: Tensor  # noqa: N815
    hidden_RW: Tensor | None = None  # noqa: N815
    uniform_R: Tensor | None = None  # noqa: N815
    hard_targets_R: Tensor | None = None  # noqa: N815


@dataclass(frozen=True)
class Held:
    """A store that rows are held against.

    Attributes:
        manifest: of the store.
        tolerance: numerical noise of the teacher, a share of a row's largest logit.
        head: of the teacher, as it is stored beside hidden states; None where the store has nothing to do with them.
    """

    manifest: Manifest
    tolerance: float
    head: HeadArrays | None

    @property
    def before(self) -> list[Encoding]:
        """Encodings that the rows went through, the first one first."""
        return [encoding_from_json(origin["encoding"]) for origin in self.manifest.lineage or ()]


def faithfulness(held: Held, flat: Arrays, fresh: Fresh) -> dict[str, Ratios]:
    """For each stored number the largest difference in a row over what is allowed of it: faithful up to 1.

    Args:
        held: the store, and how it is held.
        flat: its arrays (R, ...), of rows with targets.
        fresh: the same rows.
    """
    rows = _Rows.of(held, fresh)
    found = dict(_statistics(held, flat, fresh, rows))
    encoding = held.manifest.encoding
    if isinstance(encoding, Hidden):
        assert fresh.hidden_RW is not None
        found["hidden"] = _hidden(held, flat, fresh.hidden_RW)
    elif isinstance(encoding, Sample):
        assert fresh.uniform_R is not None
        found |= _draws(encoding, held.manifest.temperatures[0], flat, fresh.uniform_R, rows)
    elif isinstance(encoding, TopK):
        found |= _kept(held, encoding, flat, rows)
    else:
        assert isinstance(encoding, Dense)
        stored_RC = _loaded(flat, rows.centred_RC)
        found["values"] = _over(_off(stored_RC, rows.centred_RC, flat), rows.allowed(stored_RC, flat)).amax(1)
    return {name: ratio_R.double().nan_to_num(torch.inf).cpu().numpy() for name, ratio_R in found.items()}


@dataclass(frozen=True)
class _Rows:
    """Fresh rows, float64.

    Attributes:
        centred_RC: logits less the largest.
        max_R: the largest.
        noise_R: how far a logit may move between two runs.
        moved_RC: how far stores before this one may have moved a centred logit; None where there were none.
    """

    centred_RC: Tensor  # noqa: N815
    max_R: Tensor  # noqa: N815
    noise_R: Tensor  # noqa: N815
    moved_RC: Tensor | None  # noqa: N815

    @classmethod
    def of(cls, held: Held, fresh: Fresh) -> "_Rows":
        logits_RC = fresh.logits_RC.float()
        max_R = logits_RC.amax(1)
        centred_RC = (logits_RC - max_R[:, None]).double()
        size_R = torch.where(logits_RC.isfinite(), logits_RC, 0.0).abs().amax(1).double()
        noise_R = held.tolerance * size_R.clamp(min=1)
        return cls(centred_RC, max_R.double(), noise_R, _moved(held, fresh, centred_RC))

    def allowed(self, stored: Tensor, flat: Arrays, ids: Tensor | None = None) -> Tensor:
        """What is allowed of stored centred logits, of all classes or of some."""
        allowed = 2 * self.noise_R[:, None] + _bound(flat["values"].dtype, stored, flat)
        if self.moved_RC is None:
            return allowed
        return allowed + (self.moved_RC if ids is None else self.moved_RC.gather(1, ids))

    def sum_moved(self, temperature: float, ids: Tensor | None = None) -> Tensor:
        """How far earlier stores may have moved log sum exp(v / T), over all classes or those that are not named."""
        if self.moved_RC is None:
            return torch.zeros_like(self.noise_R)
        scaled_RC, moved_RC = self.centred_RC / temperature, self.moved_RC / temperature
        if ids is not None:
            scaled_RC = scaled_RC.scatter(1, ids, -torch.inf)
        moved_R = (scaled_RC + moved_RC).logsumexp(1) - scaled_RC.logsumexp(1)
        return moved_R.nan_to_num(0.0)


def _moved(held: Held, fresh: Fresh, centred_RC: Tensor) -> Tensor | None:
    """How far the stores that the rows came through may have moved centred logits, at most."""
    total = None
    for encoding in held.before:
        if isinstance(encoding, Hidden):
            if held.manifest.encoding.name == "hidden":
                continue  # its logits were never stored
            assert fresh.hidden_RW is not None
            assert held.head is not None
            hidden_RW = fresh.hidden_RW.float().cpu().numpy().astype(encoding.values)
            bound = logit_bound(encoding, held.head, hidden_RW, held.manifest.teacher)
            moved_RC = 2 * torch.from_numpy(bound).to(centred_RC.device)[:, None].expand_as(centred_RC)
        elif getattr(encoding, "values", None) == "float16":
            moved_RC = _half_bound(torch.where(centred_RC.isfinite(), centred_RC, 0.0))
        elif getattr(encoding, "values", None) == "uint8":
            range_R = -torch.where(centred_RC.isfinite(), centred_RC, 0.0).amin(1)
            moved_RC = (range_R / 510 * QUANTISED)[:, None].expand_as(centred_RC)
        else:
            continue
        total = moved_RC if total is None else total + moved_RC
    return total


def _half_bound(values: Tensor) -> Tensor:
    return HALF[0] * values.abs() + HALF[1]


def _bound(dtype: np.dtype[Any], values: Tensor, flat: Arrays) -> Tensor:
    """The encoding's own bound of stored centred logits."""
    if dtype == np.uint8:
        range_R = torch.from_numpy(flat["value_range"]).to(values.device).double()
        return (range_R / 510 * QUANTISED + ROUNDING)[:, None]
    finite = torch.where(values.isfinite(), values, 0.0)
    return (_half_bound(finite) if dtype == np.float16 else 0.0 * finite) + 2.0**-24


def _loaded(flat: Arrays, like: Tensor) -> Tensor:
    return torch.from_numpy(loaded_values(flat)).to(like.device).double()


def _off(stored: Tensor, fresh: Tensor, flat: Arrays) -> Tensor:
    """How far stored centred logits are from fresh ones, as far as their type can tell."""
    if flat["values"].dtype == np.uint8:  # what is -inf, or below the row's range, reads as its end
        range_R = torch.from_numpy(flat["value_range"]).to(fresh.device).double()
        fresh = torch.where(fresh == -torch.inf, -range_R[:, None], fresh)
    elif flat["values"].dtype == np.float16:
        fresh = torch.where(fresh == -torch.inf, fresh, fresh.clamp(min=FLOAT16_LOWEST))
    return torch.where(stored == fresh, 0.0, (stored - fresh).abs())


def _over(off: Tensor, allowed: Tensor) -> Tensor:
    """A difference over what is allowed of it; 0 where there is none."""
    return torch.where(off == 0, 0.0, off / allowed)


def _statistics(held: Held, flat: Arrays, fresh: Fresh, rows: _Rows) -> Iterator[tuple[str, Tensor]]:
    """The numbers that every encoding keeps."""

    def stored(name: str) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(flat[name])).to(rows.centred_RC.device).double()

    yield "max_logit", _over((stored("max_logit") - rows.max_R).abs(), rows.noise_R + 2.0**-24 * rows.max_R.abs())
    ratios = []
    for column, temperature in enumerate(held.manifest.temperatures):
        lse_R = (rows.centred_RC / temperature).logsumexp(1)
        off_R = (stored("lse")[:, column] - lse_R).abs()
        allowed_R = 2 * rows.noise_R / temperature + rows.sum_moved(temperature) + ROUNDING * (1 + lse_R)
        ratios.append(_over(off_R, allowed_R))
    yield "lse", torch.stack(ratios).amax(0)
    logprobs_RC = rows.centred_RC.log_softmax(1)
    entropy_R = torch.special.entr(logprobs_RC.exp()).sum(1)
    noise_R = 2 * rows.noise_R
    # dH = -sum p d (log p + H): no more than twice d H, and of second order d^2
    allowed_R = _half_bound(entropy_R) + 2 * noise_R * (entropy_R + noise_R) + ROUNDING * (10 + entropy_R)
    yield "entropy", _over((stored("entropy") - entropy_R).abs(), allowed_R)
    if fresh.hard_targets_R is not None and "hard_target_logprob" in flat:
        hard_R = fresh.hard_targets_R.long()
        known_R = logprobs_RC.gather(1, hard_R.clamp(min=0)[:, None])[:, 0]
        known_R = torch.where(known_R == -torch.inf, known_R, known_R.clamp(min=FLOAT16_LOWEST))
        stored_R = stored("hard_target_logprob")
        off_R = torch.where(stored_R == known_R, 0.0, (stored_R - known_R).abs())
        ratio_R = _over(off_R, _half_bound(known_R) + 2 * noise_R + ROUNDING)
        yield "hard_target_logprob", torch.where(hard_R < 0, torch.where(stored_R.isnan(), 0.0, torch.inf), ratio_R)


def _kept(held: Held, encoding: TopK, flat: Arrays, rows: _Rows) -> dict[str, Tensor]:
    """The kept values; that nothing larger was left out; the tails."""
    ids_RK = torch.from_numpy(flat["ids"].astype(np.int64)).to(rows.centred_RC.device)
    stored_RK, fresh_RK = _loaded(flat, rows.centred_RC), rows.centred_RC.gather(1, ids_RK)
    found = {"values": _over(_off(stored_RK, fresh_RK, flat), rows.allowed(stored_RK, flat, ids_RK)).amax(1)}
    if encoding.k == rows.centred_RC.shape[1]:
        return found
    others_RC = rows.centred_RC.scatter(1, ids_RK, -torch.inf)
    largest_R, place_R = others_RC.max(1)
    above_R = (largest_R - fresh_RK.amin(1)).clamp(min=0).nan_to_num(0.0)  # both may be -inf
    allowed_R = 4 * rows.noise_R + ROUNDING
    if rows.moved_RC is not None:
        allowed_R = (
            allowed_R + rows.moved_RC.gather(1, place_R[:, None])[:, 0] + rows.moved_RC.gather(1, ids_RK).amax(1)
        )
    found["ids"] = _over(above_R, allowed_R)
    ratios = []
    for column, temperature in enumerate(held.manifest.temperatures):
        tail_R = (others_RC / temperature).logsumexp(1) - (rows.centred_RC / temperature).logsumexp(1)
        stored_R = torch.from_numpy(flat["log_tail"][:, column].astype(np.float64)).to(tail_R.device)
        off_R = torch.where(stored_R == tail_R, 0.0, (stored_R - tail_R).abs())
        moved_R = rows.sum_moved(temperature) + rows.sum_moved(temperature, ids_RK)
        allowed_R = 4 * rows.noise_R / temperature + moved_R + ROUNDING * (1 + tail_R.abs().nan_to_num(0.0, 0.0))
        ratios.append(_over(off_R, allowed_R))
    return found | {"log_tail": torch.stack(ratios).amax(0)}


def id_overlap(flat: Arrays, logits_RC: Tensor) -> Ratios:
    """Share of the kept ids that are among the k largest logits now."""
    ids_RK = torch.from_numpy(flat["ids"].astype(np.int64)).to(logits_RC.device)
    least_R1 = logits_RC.topk(ids_RK.shape[1], dim=1).values[:, -1:]
    overlap: Ratios = (logits_RC.gather(1, ids_RK) >= least_R1).double().mean(1).cpu().numpy()
    return overlap


def _hidden(held: Held, flat: Arrays, fresh_RW: Tensor) -> Tensor:
    """The hidden states, whose numerical noise is a share of the largest of a row."""
    fresh_RW = fresh_RW.double()
    stored_RW = torch.from_numpy(np.ascontiguousarray(flat["hidden"])).to(fresh_RW.device).double()
    allowed_RW = held.tolerance * fresh_RW.abs().amax(1, keepdim=True).clamp(min=1e-6) + 2.0**-24
    if flat["hidden"].dtype == np.float16:
        allowed_RW = allowed_RW + _half_bound(fresh_RW)
    return _over((stored_RW - fresh_RW).abs(), allowed_RW).amax(1)


def _draws(encoding: Sample, temperature: float, flat: Arrays, uniform_R: Tensor, rows: _Rows) -> dict[str, Tensor]:
    """That each count is within 1 of its expectation, and that each point fell where it falls now.

    The points (u + j) / N of class i lie from F_(i-1) to F_i. With exponents that may move by d, F may move by
    F (1 - F) (e^(2 d) - 1), at most a quarter of the bracket.
    """
    draws, device = encoding.draws, rows.centred_RC.device
    ids_RD = torch.from_numpy(flat["ids"].astype(np.int64)).to(device)
    counts_RD = torch.from_numpy(flat["counts"].astype(np.float64)).to(device)
    exps_RC = (rows.centred_RC / temperature).exp()
    probs_RC = exps_RC / exps_RC.sum(1, keepdim=True)
    upper_RC = draws * probs_RC.cumsum(1)
    is_drawn = counts_RD > 0
    moved_R = 2 * rows.noise_R / temperature + rows.sum_moved(temperature)
    slack_R = draws * torch.expm1(2 * moved_R) / 4 + ROUNDING
    after_RD = counts_RD.cumsum(1)
    upper_RD = upper_RC.gather(1, ids_RD) - uniform_R.to(device)[:, None]
    lower_RD = upper_RD - draws * probs_RC.gather(1, ids_RD)
    off_RD = torch.maximum(lower_RD - (after_RD - counts_RD), after_RD - 1 - upper_RD)
    off_R = torch.where(is_drawn, off_RD, 0.0).clamp(min=0).amax(1)
    off_R = torch.where(after_RD[:, -1] == draws, off_R, torch.inf)
    expected_RC = draws * probs_RC
    counts_off_RD = torch.where(is_drawn, (counts_RD - expected_RC.gather(1, ids_RD)).abs(), 0.0)
    left_R = expected_RC.scatter(1, torch.where(is_drawn, ids_RD, ids_RD[:, :1]), 0.0).amax(1)
    over_R = torch.maximum(counts_off_RD.amax(1), left_R) - 1
    return {"counts": _over(over_R.clamp(min=0), 2 * slack_R), "ids": _over(off_R, slack_R)}
