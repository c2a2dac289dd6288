"""Rows of a store in another encoding, or under other numbers: what is read is held against the seals on the way.

Legend: N rows, P positions, R flat rows (N, or N P), K kept entries, T temperatures.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from storage.arrays import STATUS_OK, Array, Arrays
from storage.backends import holding
from storage.encodings import Hidden, TopK
from storage.encodings.dense import loaded_values, stored_values
from storage.encodings.statistics import logsumexp
from storage.errors import DamageError, MismatchError
from storage.manifest import Manifest
from storage.reader import Store
from storage.scan.passes import blocks
from storage.sequences import ROW_ARRAYS, flatten_positions

KEPT_STATISTICS = ("max_logit", "entropy", "hard_target_logprob")  # exact in the source, whatever its values are

Reencode = Callable[[Arrays, Array], dict[str, Array]]
"""Flat arrays of the source and their rows in the store to flat arrays of the target, statistics included."""


def shortened(
    flat: Arrays, declared: Sequence[float], encoding: TopK, temperatures: Sequence[float]
) -> dict[str, Array]:
    """Topk rows with fewer entries, or coarser values: a prefix, and a tail that what was dropped is added to.

    log_tail' = logaddexp(log_tail, logsumexp over what was dropped of v / T - lse). Source: `storage/FORMAT.md`.

    Args:
        flat: a topk store's arrays (R, ...).
        declared: temperatures of that store.
        encoding: with no more entries, and values no finer.
        temperatures: some of those declared.
    """
    k, stored_RK = encoding.k, flat["values"]
    values_RK = loaded_values(flat)
    kept = {"ids": flat["ids"][:, :k]}
    if stored_RK.dtype == encoding.values:  # as they are: to quantise once more would move them once more
        kept |= {name: flat[name] if name == "value_range" else stored_RK[:, :k] for name in _value_names(encoding)}
    else:
        kept |= stored_values(values_RK[:, :k], encoding.values)
    columns = [list(declared).index(temperature) for temperature in temperatures]
    lse_RT = flat["lse"][:, columns]
    tails = []
    for column, temperature in zip(columns, temperatures, strict=True):
        dropped_R = logsumexp(values_RK[:, k:].astype(np.float64) / temperature) - flat["lse"][:, column]
        tails.append(np.logaddexp(flat["log_tail"][:, column], dropped_R))
    return kept | {"lse": lse_RT, "log_tail": np.stack(tails, 1).astype(np.float32)}


def _value_names(encoding: TopK) -> tuple[str, ...]:
    return ("values", "value_range") if encoding.values == "uint8" else ("values",)


def reencoded(store: Store, start: int, stop: int, manifest: Manifest, reencode: Reencode) -> dict[str, Array]:
    """The arrays of some rows in the new encoding.

    Every shard that has some of them is read whole, a block at a time, so that it can be held against its seal.

    Args:
        store: the source.
        start: first row in the source.
        stop: row after the last.
        manifest: of the target.
        reencode: what makes the new arrays.

    Raises:
        DamageError: a shard is not what was sealed.
        MismatchError: a row can't be kept in the new encoding.
    """
    found = {spec.name: np.empty((stop - start, *spec.row_shape), spec.dtype) for spec in manifest.arrays}
    for shard, low, high in store.layout.split(start, stop):
        for block_start, arrays in _checked_blocks(store, shard):
            first, last = max(low, block_start), min(high, block_start + len(arrays["status"]))
            if first >= last:
                continue
            wanted = {name: values[first - block_start : last - block_start] for name, values in arrays.items()}
            new = _reencoded_rows(store.manifest, manifest, wanted, np.arange(first, last), reencode)
            for name, values in new.items():
                found[name][first - start : last - start] = values
    return found


def _checked_blocks(store: Store, shard: int) -> Iterator[tuple[int, dict[str, Array]]]:
    """All arrays of a shard, block by block, each with its first row; at the end they are held against the seal."""
    seal, names = store.seal(shard), [spec.name for spec in store.manifest.arrays]
    running = {name: hashlib.sha256() for name in names}
    with holding(store.backend, shard):
        for block in blocks(store.manifest, shard):
            arrays = store.read(names, block.start, block.stop)
            for name, values in arrays.items():
                running[name].update(np.ascontiguousarray(values).data.cast("B"))
            yield block.start, arrays
    for name, state in running.items():
        if state.hexdigest() != seal.arrays.get(name):
            raise DamageError.in_shard(store.path, name, shard, None, "the sealed sha256 to hold, got another")


def _reencoded_rows(
    there: Manifest, manifest: Manifest, arrays: Mapping[str, Array], rows_N: Array, reencode: Reencode
) -> dict[str, Array]:
    """All arrays of the target for some rows: what is as it was, and what was made anew.

    `lse` is that of the values which the new arrays are made of, so that a row sums to one as it did in the source; of
    float32 values that is bit for bit the teacher's.
    """
    flat = flatten_positions(there.sequences, arrays)
    is_refused_N = arrays["status"] != STATUS_OK
    with np.errstate(invalid="ignore", over="ignore"):  # rows without targets hold NaN
        new = reencode(flat, rows_N)
    new |= {name: flat[name] for name in KEPT_STATISTICS if name in flat}
    if isinstance(manifest.encoding, Hidden):  # no reader takes it for the sum of what is kept
        for column, temperature in enumerate(manifest.temperatures):
            if temperature in there.temperatures:
                new["lse"][:, column] = flat["lse"][:, there.temperatures.index(temperature)]
    found = {}
    for spec in manifest.arrays:
        if spec.name in ROW_ARRAYS:
            found[spec.name] = arrays[spec.name]
            continue
        values = np.empty((len(rows_N), *spec.row_shape), spec.dtype)
        values[...] = new[spec.name].reshape(values.shape)
        values[is_refused_N] = spec.fill_value
        found[spec.name] = values
    _refuse_infinite(manifest, found, rows_N, is_refused_N)
    return found


def _refuse_infinite(manifest: Manifest, arrays: Arrays, rows_N: Array, is_refused_N: Array) -> None:
    if not isinstance(manifest.encoding, Hidden):
        return
    is_finite_N = np.isfinite(arrays["hidden"]).reshape(len(rows_N), -1).all(1) | is_refused_N
    if not is_finite_N.all():
        row = int(rows_N[~is_finite_N][0])
        raise MismatchError(
            f"row {row}: expected a hidden state that float16 holds, got a larger one; leave its values float32"
        )
