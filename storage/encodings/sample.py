"""The sample encoding: random draws from the teacher's distribution, unbiased at a few bytes a row.

Legend: N rows, C classes, D places for distinct ids, P positions.

Source: Anshumann et al. 2025 (arXiv:2503.16870), random-sampling knowledge distillation. The draws here are systematic
(Madow 1949): the N points (u + j) / N, one u a row, are looked up in the cumulated distribution in class order. So a
class's count differs from N p by less than one, with less variance than independent draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from storage.arrays import Array, Arrays, ArraySpec, smallest_uint
from storage.encodings.protocol import check_temperature
from storage.encodings.statistics import centred, statistics

MAX_DRAWS = 255  # what a count, uint8, holds
WORD_BITS = 53  # of a random word, as many as a float64 holds


@dataclass(frozen=True)
class Sample:
    """Keep the distinct ids of `draws` systematic draws at the one declared temperature, and how often each came.

    Attributes:
        draws: N, from 1 to 255.
        seed: of the random numbers, from 0 to 2^64 - 1; with the row they are all that a draw depends on.
    """

    name: ClassVar[str] = "sample"
    losses: ClassVar[frozenset[str]] = frozenset({"sampled-ce"})

    draws: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.draws <= MAX_DRAWS:
            raise ValueError(f"draws: expected 1 to {MAX_DRAWS}, which a count of one byte holds, got {self.draws}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: expected 0 to 2^64 - 1, got {self.seed}")

    @property
    def error_bound(self) -> str:
        """How far what is read may be from what the teacher said."""
        return (
            f"a class's share of the draws is within 1 / {self.draws} of its probability, and equal to it in the mean: "
            "forward cross entropy is unbiased, reverse KL and JSD are not"
        )

    def to_json(self) -> dict[str, Any]:
        """The encoding as a JSON object."""
        return {"name": self.name, "draws": self.draws, "seed": self.seed}

    def check(self, num_classes: int, temperatures: Sequence[float]) -> None:
        """One temperature, at which the draws are taken."""
        del num_classes
        if len(temperatures) != 1:
            raise ValueError(
                f"temperatures: expected one for sample, which draws at it, got {len(temperatures)}; declare the one "
                "that students shall learn at (--temperature), or use another encoding"
            )

    def num_places(self, num_classes: int) -> int:
        """Places for distinct ids, D."""
        return min(self.draws, num_classes)

    def arrays(self, num_classes: int, num_temperatures: int) -> tuple[ArraySpec, ...]:
        """`ids` (N, D), ascending, and `counts` (N, D), 0 behind the last id."""
        del num_temperatures
        places = (self.num_places(num_classes),)
        return (ArraySpec("ids", smallest_uint(num_classes - 1), places), ArraySpec("counts", "uint8", places))

    def exact_temperatures(self, temperatures: Sequence[float]) -> tuple[float, ...] | None:
        """The one at which the draws were taken."""
        return tuple(temperatures)

    def encode(
        self,
        logits_NC: Array,
        temperatures: Sequence[float],
        *,
        uniform_N: NDArray[np.float64] | None = None,
        hidden_NW: Array | None = None,
    ) -> dict[str, Array]:
        """Statistics, ids and counts of finite float32 logits.

        Args:
            logits_NC: of the teacher.
            temperatures: the one declared.
            uniform_N: u of each row, from `uniforms`.
            hidden_NW: not looked at.
        """
        del hidden_NW
        if uniform_N is None:
            raise ValueError("uniform_N: expected a random number for each row, got none; take them from `uniforms`")
        values_NC, _ = centred(logits_NC)
        counts_NC = systematic_counts(values_NC, temperatures[0], uniform_N, self.draws)
        places = self.num_places(values_NC.shape[1])
        # stable: what was drawn first, by id, then the others, whose ids are blotted out
        order_ND = np.argsort(counts_NC == 0, axis=1, kind="stable")[:, :places]
        counts_ND = np.take_along_axis(counts_NC, order_ND, axis=1).astype(np.uint8)
        ids_ND = np.where(counts_ND > 0, order_ND, 0).astype(smallest_uint(values_NC.shape[1] - 1))
        return statistics(logits_NC, temperatures) | {"ids": ids_ND, "counts": counts_ND}

    def logprobs(self, arrays: Arrays, temperature: float, temperatures: Sequence[float]) -> Array:
        """Logarithms of the drawn shares c / N (N, D), float32, -inf behind the last id; rows sum to one."""
        check_temperature(self, temperature, temperatures)
        with np.errstate(divide="ignore"):
            shares: Array = np.log(arrays["counts"].astype(np.float32) / np.float32(self.draws))
        return shares


def systematic_counts(
    values_NC: Array, temperature: float, uniform_N: NDArray[np.float64], draws: int
) -> NDArray[np.int64]:
    """How often each class is drawn, int64 (N, C): the points (u + j) / draws that fall into its part of the CDF.

    |count - draws * p| < 1, and its mean over u is draws * p.

    Args:
        values_NC: finite or -inf centred logits.
        temperature: above 0.
        uniform_N: u, in [0, 1).
        draws: at least 1.
    """
    exps_NC = np.exp(np.asarray(values_NC, np.float64) / temperature)
    cdf_NC = np.cumsum(exps_NC, axis=1)
    cdf_NC /= cdf_NC[:, -1:]  # the last one is 1, whatever was rounded
    # ceil(draws F - u), and right also where that difference would be rounded to a whole number: a class without
    # probability is never drawn
    cdf_NC *= draws
    whole_NC = np.floor(cdf_NC)
    below_NC = whole_NC.astype(np.int64) + (cdf_NC - whole_NC > uniform_N[:, None])
    counts_NC: NDArray[np.int64] = np.diff(below_NC, axis=1, prepend=0)
    return counts_NC


def uniforms(seed: int, rows_N: Array, num_positions: int = 1) -> NDArray[np.float64]:
    """The random numbers of some rows, float64 in [0, 1), (N * P,): a function of seed, row and position alone.

    Word t of Philox4x64-10 with the key (seed, row), its upper 53 bits: raw output, which no release of numpy changes;
    its counter is 1 for the first four words. Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3.

    Args:
        seed: of the encoding.
        rows_N: rows of the store.
        num_positions: distributions of a row, P.
    """
    found = np.empty((len(rows_N), num_positions), np.uint64)
    for place, row in enumerate(np.asarray(rows_N).tolist()):
        key = np.array([seed, row], np.uint64)
        found[place] = np.random.Philox(key=key).random_raw(num_positions)
    uniform_N: NDArray[np.float64] = (found.reshape(-1) >> np.uint64(64 - WORD_BITS)) * np.float64(2.0**-WORD_BITS)
    return uniform_N
