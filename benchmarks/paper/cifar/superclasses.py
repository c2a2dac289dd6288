"""Whether clusters of classes agree with the superclasses that people made, against chance."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Agreement:
    """Pairs of classes that share a cluster, and how many of them share a superclass too.

    Attributes:
        num_pairs: pairs of classes of one cluster; a pair that several clusters have counts in each.
        num_same: those of one superclass.
        chance: mean of `num_same` where the superclasses are dealt out to the classes anew.
        chance_p5, chance_p95: its percentiles.
    """

    num_pairs: int
    num_same: int
    chance: float
    chance_p5: float
    chance_p95: float


def superclasses(fine_N: NDArray[np.integer], coarse_N: NDArray[np.integer], num_classes: int) -> NDArray[np.int64]:
    """The superclass of every class, int64 (C,).

    Raises:
        ValueError: a class has no row, or rows of several superclasses.
    """
    found = np.full(num_classes, -1, np.int64)
    found[fine_N] = coarse_N
    if (found < 0).any():
        raise ValueError(f"superclasses: expected rows of every class, got none of {int(np.argmin(found))}")
    if (found[fine_N] != coarse_N).any():
        label = int(fine_N[np.argmax(found[fine_N] != coarse_N)])
        raise ValueError(f"superclasses: expected one of each class, got several of {label}")
    return found


def agreement(
    clusters: Sequence[Sequence[int]], superclass_C: NDArray[np.int64], num_permutations: int = 10_000, seed: int = 0
) -> Agreement:
    """How many pairs of classes of a cluster share a superclass, against superclasses dealt out at random.

    Args:
        clusters: class numbers of each; they may overlap.
        superclass_C: of every class.
        num_permutations: deals.
        seed: of the deals.

    Raises:
        ValueError: no cluster has two classes.
    """
    pairs = [pair for cluster in clusters for pair in itertools.combinations(cluster, 2)]
    if not pairs:
        raise ValueError("clusters: expected one of at least two classes, got none; make fewer clusters")
    first, second = np.array(pairs).T
    rng = np.random.default_rng(seed)
    dealt = [superclass_C, *(rng.permutation(superclass_C) for _ in range(num_permutations))]
    counts = np.array([int((deal[first] == deal[second]).sum()) for deal in dealt])
    p5, p95 = np.percentile(counts[1:], [5, 95])
    return Agreement(len(pairs), int(counts[0]), round(float(counts[1:].mean()), 2), float(p5), float(p95))
