"""Classes that are confused with one another: k-means on the columns of what a store's distributions are together.

Legend: C classes, V classes that are clustered, S classes of a specialist.

Source: Hinton, Vinyals and Dean 2015, Distilling the Knowledge in a Neural Network, section 5.3, which clusters the
columns of the covariance matrix of the generalist's predictions.
"""

import importlib.util
import math
import warnings
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from storage.arrays import Array
from storage.errors import StudentError

On = Literal["correlation", "covariance"]
MOST_STARTS = 50  # of k-means, of which the best counts
STARTED_CLASSES = 10_000  # in all starts together: with more classes it starts less often


@dataclass(frozen=True)
class ClusterOptions:
    """How classes are put together.

    Attributes:
        num_specialists: clusters that k-means looks for: 2 to the number of classes over `min_classes`; with
            `classes_each` 1 to the number of classes.
        classes_each: classes of each specialist, those nearest to its centre, so that they may overlap; `min_classes`
            to one below the number of classes. None gives each the classes of its cluster.
        min_classes: smaller clusters are no specialists; at least 1.
        on: whose columns: `correlation`, in which every class weighs the same, or `covariance`, as in the paper.
        seed: of the starts of k-means, 0 to 2^32 - 1.

    Raises:
        ValueError: a field is out of range.
    """

    num_specialists: int
    classes_each: int | None = None
    min_classes: int = 2
    on: On = "correlation"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.min_classes < 1:
            raise ValueError(f"min_classes: expected at least 1, got {self.min_classes}")
        if self.on not in get_args(On):
            raise ValueError(f"on: expected one of {', '.join(get_args(On))}, got {self.on!r}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: expected 0 to {2**32 - 1}, got {self.seed}")

    def check(self, num_classes: int) -> None:
        """Refuse what can't be with so many classes.

        Raises:
            ValueError: a field is out of range.
        """
        least, most = (2, num_classes // self.min_classes) if self.classes_each is None else (1, num_classes)
        if most < least:
            raise ValueError(
                f"min_classes: expected at most half of the {num_classes} classes, so that there are two clusters, got "
                f"{self.min_classes}; give --classes-each, or fewer"
            )
        if not least <= self.num_specialists <= most:
            of = "" if self.classes_each is not None else f" of at least {self.min_classes} classes"
            raise ValueError(
                f"num_specialists: expected {least} to {most} specialists{of} for {num_classes} classes, got "
                f"{self.num_specialists}"
            )
        if self.classes_each is not None and not self.min_classes <= self.classes_each < num_classes:
            raise ValueError(
                f"classes_each: expected {self.min_classes} (min_classes) to {num_classes - 1}, some classes being "
                f"left for the dustbin, got {self.classes_each}"
            )


@dataclass(frozen=True)
class Cluster:
    """The classes of a specialist.

    Attributes:
        classes: ascending.
        within: mean correlation of two of them; None of one class.
        outside: mean correlation of one of them and one of the others; None where no other class varies.
    """

    classes: tuple[int, ...]
    within: float | None
    outside: float | None


@dataclass(frozen=True)
class Clusters:
    """What k-means found.

    Attributes:
        specialists: clusters that are large enough, the largest first, then by their first class.
        num_small: clusters that were too small.
        num_same: clusters with the classes of another one, and those that no class is nearest to.
        apart: classes in no cluster: their probability does not vary, or, where correlations are clustered, is above
            its mean together with no other's.
    """

    specialists: tuple[Cluster, ...]
    num_small: int = 0
    num_same: int = 0
    apart: tuple[int, ...] = field(default=())


def check_scikit_learn() -> None:
    """Refuse to begin a long pass whose result can't be clustered.

    Raises:
        StudentError: scikit-learn is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise StudentError(
            "specialists plan: expected scikit-learn for k-means, got none; install it: "
            "pip install 'logitstore[specialists]'"
        )


def find_clusters(covariance_CC: Array, options: ClusterOptions) -> Clusters:
    """Classes whose columns of a matrix are alike, by k-means: the same for the same matrix and seed.

    Memory: one more matrix of the size of the given one.

    Args:
        covariance_CC: of the classes' probabilities, symmetric, float32.
        options: how many, on what, of how many classes.

    Raises:
        ValueError: an option is out of range.
        StudentError: scikit-learn is not installed, or no cluster is large enough.
    """
    options.check(len(covariance_CC))
    check_scikit_learn()
    varying, columns_VC = _columns(covariance_CC, options.on)
    if len(varying) < max(2, options.num_specialists):
        raise StudentError(
            f"specialists plan: expected at least {max(2, options.num_specialists)} classes that are confused with "
            f"another one, got {len(varying)}; use a store of more rows, or fewer specialists"
        )
    labels_V, centres = _k_means(columns_VC, options)
    squares_V = np.einsum("vc,vc->v", columns_VC, columns_VC)
    found: dict[tuple[int, ...], None] = {}
    sizes = np.bincount(labels_V, minlength=options.num_specialists)
    for cluster in np.flatnonzero(sizes >= options.min_classes):
        members = np.flatnonzero(labels_V == cluster)
        if options.classes_each is not None:
            apart_V = squares_V - 2 * (columns_VC @ centres[cluster])  # but for what is the same for all
            members = np.argsort(apart_V, kind="stable")[: options.classes_each]
        found[tuple(sorted(varying[members].tolist()))] = None
    num_small = int(((sizes > 0) & (sizes < options.min_classes)).sum())
    if not found or max(map(len, found)) == len(covariance_CC):
        got = f"none of {num_small}" if not found else "one of all classes"
        raise StudentError(
            f"specialists plan: expected clusters of at least {options.min_classes} classes, got {got}; use another "
            "--num-specialists, or --classes-each"
        )
    ordered = sorted(found, key=lambda classes: (-len(classes), classes))
    return Clusters(
        tuple(Cluster(classes, *tightness(covariance_CC, classes)) for classes in ordered),
        num_small,
        options.num_specialists - num_small - len(found),
        tuple(sorted(set(range(len(covariance_CC))) - set(varying.tolist()))),
    )


def _columns(covariance_CC: Array, on: On) -> tuple[Array, Array]:
    """The classes that are clustered, ascending, and what k-means is run on: a row each, float32 (V, C).

    Of the correlation only what is above 0 counts: with which classes one is confused, not with which it is not. The
    entry with itself is not 1 but what a class has with the one that it is confused with most: two classes that are
    confused with each other, and with no other one, have columns that are alike only then; with 1, or with 0, each
    stands alone. Each column is made of length 1, so that it does not matter how much a class is confused at all. The
    covariance is taken as it is.
    """
    deviation_C = np.sqrt(np.maximum(np.diagonal(covariance_CC), 0))
    if on == "covariance":
        varying = np.flatnonzero(deviation_C > 0)
        return varying, covariance_CC[varying]
    inverse_C = np.where(deviation_C > 0, 1 / np.where(deviation_C > 0, deviation_C, 1), 0).astype(np.float32)
    columns_CC = covariance_CC * inverse_C
    columns_CC *= inverse_C[:, None]
    np.fill_diagonal(columns_CC, 0)
    np.maximum(columns_CC, 0, out=columns_CC)
    np.fill_diagonal(columns_CC, columns_CC.max(axis=1))
    length_C = np.linalg.norm(columns_CC, axis=1)
    varying = np.flatnonzero(length_C > 0)
    if len(varying) < len(length_C):
        columns_CC, length_C = columns_CC[varying], length_C[varying]
    columns_CC /= length_C[:, None]
    return varying, columns_CC


def _k_means(columns_VC: Array, options: ClusterOptions) -> tuple[Array, Array]:
    """The cluster of each class, and the centres. One thread, so that sums are added up in one order."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    starts = max(1, min(MOST_STARTS, STARTED_CLASSES // len(columns_VC)))
    means = KMeans(options.num_specialists, n_init=starts, random_state=options.seed, copy_x=False)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # columns that are the same make fewer clusters: counted
        means.fit(columns_VC)
    return means.labels_, means.cluster_centers_


def tightness(covariance_CC: Array, classes: tuple[int, ...]) -> tuple[float | None, float | None]:
    """Mean correlation of two of the classes, and of one of them and one of the others; None where there is none.

    Classes that don't vary are left out.
    """
    deviation_C = np.sqrt(np.maximum(np.diagonal(covariance_CC), 0).astype(np.float64))
    own = np.array([label for label in classes if deviation_C[label] > 0], np.int64)
    is_own_C = np.zeros(len(deviation_C), bool)
    is_own_C[own] = True
    others = np.flatnonzero(~is_own_C & (deviation_C > 0))
    correlation_SC = covariance_CC[own].astype(np.float64) / deviation_C[own][:, None]
    correlation_SC[:, deviation_C > 0] /= deviation_C[deviation_C > 0]
    num_pairs = len(own) * (len(own) - 1)
    within = (float(correlation_SC[:, own].sum()) - len(own)) / num_pairs if num_pairs else math.nan
    outside = float(correlation_SC[:, others].mean()) if len(own) and len(others) else math.nan
    return (None if math.isnan(within) else within), (None if math.isnan(outside) else outside)
