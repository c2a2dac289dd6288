"""Write what a store says into another place, packed another way."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from storage.backends import backend_for, holding
from storage.errors import DamageError, MismatchError, NotSealedError, PathError
from storage.exclusive import sole_run
from storage.manifest import COMPRESSION, TIGHT, Manifest
from storage.reader import Store, open_one_store
from storage.records import array_digests
from storage.scan.passes import Progress, fold_shards, one_at_a_time
from storage.urls import is_url
from storage.writer import StoreWriter

CONVERTED_FROM = "converted_from"

Packing = Literal["none", "zstd", "zstd-max"]


@dataclass(frozen=True)
class ConvertResult:
    """What was converted.

    Attributes:
        path: the new store.
        content_digest: of both stores.
        num_rows: sealed rows of both.
        num_bytes: of the new store.
        source_bytes: of the old one.
    """

    path: str
    content_digest: str
    num_rows: int
    num_bytes: int
    source_bytes: int


def convert(
    source: str | Path,
    target: str | Path,
    compressor: Packing | None = None,
    *,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> ConvertResult:
    """Copy a finalized store to a path whose suffix names the backend; its content digest stays what it is.

    Shard by shard, each checked against its seal on the way and again in the new store. Run again after a kill, it goes
    on where it stopped. The manifest stays but for the compressor, and the provenance gets `converted_from` beside what
    it has.

    Args:
        source: a finalized store.
        target: where the new one shall be.
        compressor: of the new store, by default that of the old one; `zstd-max` is zstd that takes its time.
        num_workers: threads, each with a shard in memory; by default one for each core.
        progress: called with the number of rows: each row counts once when it is written, and once when it is checked.

    Raises:
        NotSealedError: the source is not finalized.
        PathError: the target holds something else.
        DamageError: the source is damaged.
    """
    with open_one_store(source) as store:
        digest = store.content_digest
        if digest is None:
            raise NotSealedError(
                f"{source}: expected a finalized store, got one that is not; "
                "finish the dump, or finalize at what is sealed: logitstore finalize --partial"
            )
        manifest = target_manifest(store, compressor)
        num_bytes = rewrite(store, target, manifest, num_workers, progress)
        return ConvertResult(str(target), digest, store.num_sealed_rows, num_bytes, store.backend.num_bytes())


def rewrite(
    store: Store, target: str | Path, manifest: Manifest, num_workers: int | None, progress: Progress | None
) -> int:
    """Write the sealed shards of a store into another place, and finalize that where the store is.

    Returns:
        Bytes of the target.
    """
    check_target(store.path, target, "conversion", lambda there: _is_of(there, store))
    advance = one_at_a_time(progress)
    with sole_run(target), StoreWriter.open(target, manifest, store.head()) as writer:
        _copy(store, writer, num_workers, advance)
        if store.content_digest is not None:
            written = writer.finalize(partial=True, progress=advance)
            check_digest(target, written, store.content_digest)
        return writer.store.backend.num_bytes()


def check_digest(target: str | Path, written: str, expected: str) -> None:
    """Refuse a copy that says something else than it should.

    Raises:
        DamageError: it does.
    """
    if written != expected:
        raise DamageError(f"{target}: expected the content digest {expected}, got {written}; remove it, try again")


def target_manifest(store: Store, packing: Packing | None) -> Manifest:
    """The manifest of a store that is packed otherwise, or not; its provenance says what it was made of."""
    manifest = store.manifest
    origin = {
        "content_digest": store.content_digest,
        "manifest_sha256": store.manifest_sha256,
        "name": Path(store.path).name,
        "compressor": manifest.compressor,
    }
    provenance = {**manifest.provenance, CONVERTED_FROM: origin}
    provenance.pop(COMPRESSION, None)
    if packing == "zstd-max":
        return replace(manifest, compressor="zstd", provenance={**provenance, COMPRESSION: TIGHT})
    return replace(manifest, compressor=packing or manifest.compressor, provenance=provenance)


def _is_of(there: Manifest, store: Store) -> bool:
    """Whether a manifest is of a conversion of just that store."""
    origin = there.provenance.get(CONVERTED_FROM)
    return isinstance(origin, dict) and origin.get("manifest_sha256") == store.manifest_sha256


def check_target(source: str | Path, target: str | Path, what: str, is_begun: Callable[[Manifest], bool]) -> None:
    """Refuse a target that holds anything but the beginning, or the whole, of what is being written there.

    Args:
        source: the store that is read.
        target: where another is written.
        what: is being done, such as `conversion`.
        is_begun: whether the manifest of a store at the target is of just this.

    Raises:
        PathError: the target is the source, or in it.
        MismatchError: the target is another store.
    """
    if _is_inside(str(source), str(target)):
        raise PathError(f"{target}: expected a path outside {source}, got one in it; give another path")
    backend = backend_for(target)
    if not backend.exists():
        return
    try:
        there = Store(backend)
    except PathError:
        return  # nothing, or arrays without a manifest: the writer takes it or refuses it
    with there:
        if not is_begun(there.manifest):
            raise MismatchError(
                f"{target}: expected nothing, or this {what} begun, got another store; give another path"
            )


def _is_inside(source: str, target: str) -> bool:
    if is_url(source) or is_url(target):
        return f"{target.rstrip('/')}/".startswith(f"{source.rstrip('/')}/")
    inside, there = Path(source).resolve(), Path(target).resolve()
    return there == inside or inside in there.parents


def _copy(store: Store, writer: StoreWriter, num_workers: int | None, advance: Progress) -> None:
    """Write the shards that the target does not have yet."""
    sealed = store.sealed_shards()
    owed = set(writer.owed_shards())
    for shard in sealed:
        if shard not in owed:
            advance(_num_rows(store, shard))

    def copy_shard(shard: int) -> int:
        seal = store.seal(shard)
        names = [spec.name for spec in store.manifest.arrays]
        with holding(store.backend, shard):
            arrays = store.read(names, seal.start, seal.stop)
        digests = array_digests(arrays)
        for name in names:
            if digests[name] != seal.arrays.get(name):
                raise DamageError(
                    f"{store.path}: array {name!r}, shard {shard}: expected the sealed sha256 to hold, got another; "
                    "convert another copy of the store",
                    shard=shard,
                    array=name,
                )
        writer.write_shard(shard, arrays, seal.quarantine)
        advance(seal.stop - seal.start)
        return seal.stop - seal.start

    fold_shards([shard for shard in sealed if shard in owed], copy_shard, int.__add__, num_workers)


def _num_rows(store: Store, shard: int) -> int:
    """Rows of one shard."""
    start, stop = store.layout.shard_bounds(shard)
    return stop - start
