"""A new version of a store that shares what did not change: shards of it are taken over as they lie."""

import errno
import os
from pathlib import Path
from urllib.parse import urlsplit

from storage.arrays import Array
from storage.backends import RemoteBackend, ZarrBackend
from storage.backends.files import NO_LINKS, clear_os_errors, make_folder, sync_folder
from storage.backends.zarr_objects import seal_name, shard_key
from storage.errors import DamageError, RemoteError
from storage.reader import Store
from storage.records import Seal, array_digests
from storage.remote import open_place
from storage.scan.files import MovesObjects
from storage.untrusted import refuse_links
from storage.writer import StoreWriter


def share_shard(old: Store, writer: StoreWriter, shard: int) -> Seal:
    """Take a sealed shard over from an older version, and seal it anew with the same digests.

    Its objects are the same files (hard links) where both lie on one disk, copies that the storage makes where both lie
    in one bucket, else copies. Finalizing holds them against their seal, as it does those that were written.

    Args:
        old: whose rows, arrays and packing are those of the new version.
        writer: of the new version.
        shard: index of the shard.

    Returns:
        The seal; another writer's, if that sealed the same shard first.

    Raises:
        DamageError: the shard is not what was sealed.
    """
    seal, here, there = old.seal(shard), old.backend, writer.store.backend
    if not (isinstance(here, MovesObjects) and isinstance(there, MovesObjects)) or not _is_packed_alike(old, writer):
        return writer.write_shard(shard, read_shard(old, seal), seal.quarantine)
    if set(seal.objects) != {shard_key(spec, shard) for spec in old.manifest.arrays}:
        raise DamageError(
            f"{old.path}: {seal_name(shard)}: expected the objects of the shard, got others; take another copy of the "
            "store",
            shard=shard,
        )
    with clear_os_errors(writer.store.path), there.lock_shard(shard):
        if there.get_record(seal_name(shard)) is None:
            for key, wanted in sorted(seal.objects.items()):
                _share_object(here, there, key, int(wanted["num_bytes"]))
            sealed = Seal(**{**vars(seal), "manifest_sha256": writer.store.manifest_sha256})
            there.put_record(seal_name(shard), sealed.to_bytes())
    return writer.store.seal(shard)


def read_shard(store: Store, seal: Seal) -> dict[str, Array]:
    """All arrays of a sealed shard, held against its seal.

    Raises:
        DamageError: one of them is not what was sealed.
    """
    arrays = store.read([spec.name for spec in store.manifest.arrays], seal.start, seal.stop)
    found = array_digests(arrays)
    for name in arrays:
        if found[name] != seal.arrays.get(name):
            raise DamageError.in_shard(store.path, name, seal.shard, None, "the sealed sha256 to hold, got another")
    return arrays


def _is_packed_alike(old: Store, writer: StoreWriter) -> bool:
    """Whether the bytes of an object of one may be those of the other."""
    return not old.manifest.differences(writer.manifest)


def _share_object(here: MovesObjects, there: MovesObjects, key: str, num_bytes: int) -> None:
    if isinstance(here, ZarrBackend) and isinstance(there, ZarrBackend) and _link(here.path, there.path, key):
        return
    if isinstance(here, RemoteBackend) and isinstance(there, RemoteBackend) and _copy_there(here, there, key):
        return
    there.write_object(key, here.read_object(key, num_bytes))


def _link(old: Path, new: Path, key: str) -> bool:
    """Give a file a second name; False where that can't be. Neither store ever changes it."""
    source, target = old / key, new / key
    refuse_links(old, source)
    refuse_links(new, target.parent)
    make_folder(target.parent)
    target.unlink(missing_ok=True)  # of a writer that was killed
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (*NO_LINKS, errno.EXDEV):
            raise
        return False
    sync_folder(target.parent)
    return True


def _copy_there(here: RemoteBackend, there: RemoteBackend, key: str) -> bool:
    """Have the storage copy an object from one store to the other; False where they don't lie in one bucket."""
    old, new = urlsplit(here.location), urlsplit(there.location)
    if (old.scheme, old.netloc) != (new.scheme, new.netloc):
        return False
    place = open_place(f"{old.scheme}://{old.netloc}")
    try:
        place.copy(f"{old.path.strip('/')}/{key}", f"{new.path.strip('/')}/{key}")
    except RemoteError:
        return False  # such as a storage that copies only below some path: then its bytes go through here
    return True
