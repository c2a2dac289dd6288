"""What of two stores can be compared."""

from dataclasses import dataclass

import numpy as np

from storage.arrays import ArraySpec
from storage.encodings import Dense, HeadArrays, Hidden, TopK, check_temperature
from storage.errors import MismatchError
from storage.manifest import Manifest
from storage.reader import Store

BY_TEMPERATURE = ("lse", "log_tail")  # a column for each declared temperature


@dataclass(frozen=True)
class Pair:
    """An array that is compared, and which part of its last axis in each store; None is all of it."""

    spec: ArraySpec
    first: list[int] | None = None
    second: list[int] | None = None

    @property
    def row_size(self) -> int:
        """Numbers of a row that are compared."""
        size = int(np.prod(self.spec.row_shape, dtype=np.int64))
        return size if self.first is None else size // self.spec.row_shape[-1] * len(self.first)

    @property
    def is_quantity(self) -> bool:
        """Whether a difference of its numbers means something."""
        return self.spec.dtype.startswith("float") or self.spec.name == "values"


@dataclass(frozen=True)
class Plan:
    """What is compared of two stores.

    Attributes:
        first: manifest of the one.
        second: of the other.
        heads: of each, where it keeps hidden states.
        pairs: the arrays.
        only_first: arrays that only the first keeps, or in a shape of its own.
        only_second: that only the second keeps so.
        kind: of the divergence, `full` or `kept`; None where there is none.
        temperature: of it.
    """

    first: Manifest
    second: Manifest
    heads: tuple[HeadArrays | None, HeadArrays | None]
    pairs: tuple[Pair, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    kind: str | None
    temperature: float


def common_arrays(one: Store, two: Store, temperature: float | None) -> Plan:
    """What can be compared of two stores.

    Raises:
        MismatchError: a store is not exact at the temperature.
        ValueError: it is not above 0, or would be ignored.
    """
    first, second = one.manifest, two.manifest
    other = {spec.name: spec for spec in second.arrays}
    pairs = [pair for spec in first.arrays if (pair := _pair(first, second, spec, other.get(spec.name))) is not None]
    names = {pair.spec.name for pair in pairs}
    kind, chosen = _divergence(one, two, temperature)
    return Plan(
        first,
        second,
        (one.head(), two.head()),
        tuple(pairs),
        tuple(spec.name for spec in first.arrays if spec.name not in names),
        tuple(spec.name for spec in second.arrays if spec.name not in names),
        kind,
        chosen,
    )


def _pair(first: Manifest, second: Manifest, spec: ArraySpec, other: ArraySpec | None) -> Pair | None:
    if other is None:
        return None
    if spec.name in BY_TEMPERATURE:
        both = [value for value in first.temperatures if value in second.temperatures]
        columns = [list(manifest.temperatures) for manifest in (first, second)]
        places = [[all_of.index(value) for value in both] for all_of in columns]
        same = spec.row_shape[:-1] == other.row_shape[:-1]
        return Pair(spec, places[0], places[1]) if both and same else None
    if first.encoding.name != second.encoding.name and spec.name in ("values", "ids"):
        return None  # of one name, but not the same thing
    if isinstance(first.encoding, TopK) and isinstance(second.encoding, TopK) and spec.name in ("values", "ids"):
        least = list(range(min(first.encoding.k, second.encoding.k)))  # fewer entries are the first of more
        return Pair(spec, least, least) if spec.row_shape[:-1] == other.row_shape[:-1] else None
    return Pair(spec) if spec.row_shape == other.row_shape else None


def _divergence(one: Store, two: Store, temperature: float | None) -> tuple[str | None, float]:
    """The kind of divergence that two stores allow, and its temperature."""
    first, second = one.manifest, two.manifest
    encodings = (first.encoding, second.encoding)
    same = (first.num_classes, first.sequences is None) == (second.num_classes, second.sequences is None)
    same = same and num_positions_of(first) == num_positions_of(second)
    kind = None
    if same and all(isinstance(encoding, Dense | Hidden | TopK) for encoding in encodings):
        kind = "kept" if any(isinstance(encoding, TopK) for encoding in encodings) else "full"
    if temperature is not None:
        if kind is None:
            raise ValueError(
                f"temperature: expected none with {encodings[0].name} and {encodings[1].name} stores, which have no "
                f"divergence, got {temperature:g}; leave it out"
            )
        for store in (one, two):
            try:
                check_temperature(store.manifest.encoding, temperature, store.manifest.temperatures)
            except MismatchError as error:
                raise MismatchError(f"{store.path}: {error}") from error
        return kind, temperature
    exact = [
        encoding.exact_temperatures(it.temperatures) for encoding, it in zip(encodings, (first, second), strict=True)
    ]
    declared = [set(values) for values in exact if values is not None]
    both = sorted(set.intersection(*declared)) if declared else [1.0]
    if not both:
        return None, 1.0
    return kind, 1.0 if 1.0 in both else both[0]


def num_positions_of(manifest: Manifest) -> int:
    """Distributions of a row."""
    return 1 if manifest.sequences is None else manifest.sequences.num_positions
