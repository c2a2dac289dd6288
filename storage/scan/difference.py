"""Whether two stores say the same, and if not, where they differ."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from storage.errors import NotSealedError
from storage.manifest import Manifest
from storage.reader import Store, open_store
from storage.scan.difference_plan import common_arrays
from storage.scan.difference_rows import ArrayDifference, RowFigures, Tally, tally_rows
from storage.scan.passes import BLOCK_BYTES, Progress, fold_shards, one_at_a_time

PACKING = ("shard_rows", "chunk_rows", "compressor")  # how a store is cut and compressed: no part of what a row says
PROVENANCE = "provenance"

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Field:
    """A field of the manifests that is not the same in both.

    Attributes:
        name: of the field, with a dot for one inside another.
        first: what the first store has, as JSON.
        second: what the second has.
    """

    name: str
    first: Any
    second: Any


@dataclass(frozen=True)
class DiffResult:
    """What two stores have in common, and in what they differ.

    Attributes:
        first: the one store.
        second: the other.
        same: whether they say the same: no field of `identity` differs, no row is in only one of them, and no number
            of a row differs.
        content_digests: of each; None where it is not finalized.
        identity: fields that differ in what the store says.
        packing: fields that differ in how it is cut and compressed.
        provenance: fields that differ in when, where and with what it was made.
        num_rows: rows that both have sealed.
        only_first: sealed rows, as half-open ranges, that only the first has.
        only_second: that only the second has.
        rows: of the rows of both.
        arrays: each array that both keep, over the rows that have targets and the same sample in both.
        only_in_first: arrays that only the first keeps, or keeps in a shape that can't be compared.
        only_in_second: that only the second keeps so.
    """

    first: str
    second: str
    same: bool
    content_digests: tuple[str | None, str | None]
    identity: tuple[Field, ...]
    packing: tuple[Field, ...]
    provenance: tuple[Field, ...]
    num_rows: int
    only_first: Ranges
    only_second: Ranges
    rows: RowFigures
    arrays: tuple[ArrayDifference, ...]
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The figures as a JSON object; null where there is no number."""
        return asdict(self)


def diff(
    first: str | Path,
    second: str | Path,
    *,
    temperature: float | None = None,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> DiffResult:
    """Compare two stores row by row: those that both have sealed, finalized or not.

    A shard whose seals say the same of every array, with the same cut in both, is not read.

    Args:
        first: a store, or a series.
        second: another.
        temperature: of the divergence; None is 1, or the lowest that both declare where they are exact at these only.
        num_workers: threads; by default one for each core.
        progress: called with the number of rows, each once.

    Raises:
        PathError: there is no store at a path.
        NotSealedError: neither has sealed anything yet.
        MismatchError: a store is not exact at the temperature.
        DamageError: a checksum does not hold.
        ValueError: the temperature is not above 0.
    """
    with open_store(first) as one, open_store(second) as two:
        identity, packing, provenance = _fields(one.manifest, two.manifest)
        both, only_first, only_second = _split_rows(one, two)
        if not both and not only_first and not only_second:
            raise NotSealedError(f"{first}: expected sealed rows to compare, got none in both; resume the dumps first")
        plan = common_arrays(one, two, temperature)
        advance = one_at_a_time(progress)
        pieces = list(_pieces(one, both))

        def task(index: int) -> Tally:
            shard, start, stop = pieces[index]
            if _is_sealed_alike(one, two, shard, start, stop):
                tally = Tally.of_equal_rows(plan, one, start, stop)
            else:
                tally = tally_rows(plan, one, two, start, stop, BLOCK_BYTES)
            advance(stop - start)
            return tally

        tally = fold_shards(range(len(pieces)), task, Tally.merge, num_workers) or Tally.empty(plan)
        rows, arrays = tally.figures(plan)
        return DiffResult(
            first=str(first),
            second=str(second),
            same=not (identity or only_first or only_second or rows.num_differing),
            content_digests=(one.content_digest, two.content_digest),
            identity=tuple(identity),
            packing=tuple(packing),
            provenance=tuple(provenance),
            num_rows=sum(stop - start for start, stop in both),
            only_first=tuple(only_first),
            only_second=tuple(only_second),
            rows=rows,
            arrays=arrays,
            only_in_first=plan.only_first,
            only_in_second=plan.only_second,
        )


def _fields(first: Manifest, second: Manifest) -> tuple[list[Field], list[Field], list[Field]]:
    """The fields that differ: of the identity, the packing and the provenance."""
    one, two = first.to_json(), second.to_json()
    found: tuple[list[Field], list[Field], list[Field]] = ([], [], [])
    for name in {**one, **two}:
        kind = found[1] if name in PACKING else found[2] if name == PROVENANCE else found[0]
        kind += _differing(name, one.get(name), two.get(name))
    return found


def _differing(name: str, one: Any, two: Any) -> list[Field]:
    if one == two:
        return []
    if isinstance(one, dict) and isinstance(two, dict):
        return [field for key in {**one, **two} for field in _differing(f"{name}.{key}", one.get(key), two.get(key))]
    return [Field(name, one, two)]


def _sealed_ranges(store: Store) -> list[tuple[int, int]]:
    """Sealed rows as half-open ranges, as long as can be."""
    ranges: list[tuple[int, int]] = []
    for shard in store.sealed_shards():
        start, stop = store.layout.shard_bounds(shard)
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))
    return ranges


Split = tuple[list[tuple[int, int]], list[tuple[int, int]], list[tuple[int, int]]]


def _split_rows(one: Store, two: Store) -> Split:
    """The rows that both have sealed, only the first, and only the second, as half-open ranges."""
    first, second = _sealed_ranges(one), _sealed_ranges(two)
    borders = sorted({border for ranges in (first, second) for pair in ranges for border in pair})
    found: Split = ([], [], [])
    places = [0, 0]
    for start, stop in pairwise(borders):
        inside = []
        for index, ranges in enumerate((first, second)):
            while places[index] < len(ranges) and ranges[places[index]][1] <= start:
                places[index] += 1
            inside.append(places[index] < len(ranges) and ranges[places[index]][0] <= start)
        if any(inside):
            kind = found[0] if all(inside) else found[1] if inside[0] else found[2]
            if kind and kind[-1][1] == start:
                kind[-1] = (kind[-1][0], stop)
            else:
                kind.append((start, stop))
    return found


def _pieces(store: Store, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Rows cut at a store's shard borders: the shard, the first row, the row after the last."""
    return [piece for start, stop in ranges for piece in store.layout.split(start, stop)]


def _is_sealed_alike(one: Store, two: Store, shard: int, start: int, stop: int) -> bool:
    """Whether the seals say that all arrays of a piece are the same, and mean the same: both have it as one shard."""
    first, second = one.manifest, two.manifest
    if (first.encoding, first.temperatures, first.num_classes) != (
        second.encoding,
        second.temperatures,
        second.num_classes,
    ):
        return False
    other = two.layout.shard_of(start)
    if not (start, stop) == one.layout.shard_bounds(shard) == two.layout.shard_bounds(other):
        return False
    return one.seal(shard).arrays == two.seal(other).arrays
