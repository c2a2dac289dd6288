"""What lies beside the arrays: metadata that must be as it was written, a lost manifest, files of something else."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from storage.backends import Backend, Hdf5Backend, IsFarAway, ZarrBackend
from storage.backends.files import bytes_digest
from storage.backends.hdf5 import USER_BLOCK_START
from storage.backends.remote_seal import intent_name
from storage.backends.zarr_objects import GROUP, metadata_keys, open_metadata, seal_name
from storage.encodings import Hidden
from storage.errors import DamageError
from storage.head import HEAD_BIAS, HEAD_WEIGHT
from storage.reader import Store
from storage.records import FINAL, MANIFEST, Final, Seal, sha256
from storage.untrusted import parse_json

SHOWN_FILES = 10
MAX_METADATA_BYTES = 1 << 20  # of one `zarr.json`


@runtime_checkable
class MovesObjects(Protocol):
    """A backend whose objects lie by themselves, and may be moved as they are."""

    def read_object(self, key: str, max_bytes: int) -> Iterator[bytes]:
        """An object's bytes as they lie, some at a time; FileNotFoundError where there is none.

        Raises:
            DamageError: it is larger than that.
        """

    def write_object(self, key: str, pieces: Iterable[bytes]) -> None:
        """Write an object durably as it shall lie, over what is there."""


def check_metadata(store: Store) -> Iterator[str]:
    """What is wrong with objects that are neither of a shard nor a record: the Zarr metadata."""
    backend = store.backend
    if not isinstance(backend, MovesObjects):
        return
    expected = None if store.final is None else store.final.metadata
    for key in metadata_keys(store.manifest):
        try:
            data = b"".join(backend.read_object(key, MAX_METADATA_BYTES))
        except OSError as error:
            yield f"{key}: expected the Zarr metadata, got {error.strerror}; take another copy of the store"
            continue
        except DamageError as error:
            yield f"{key}: {error}"
            continue
        if expected is not None and expected.get(key) != bytes_digest(data):
            yield f"{key}: expected the digest in the final record to hold, got another; take another copy of the store"
            continue
        wrong = _wrong_group(data) if key == GROUP else _wrong_array(store, key.removesuffix(f"/{GROUP}"), data)
        if wrong:  # also where the digest holds: a store may have been damaged before it was finalized
            yield f"{key}: expected {wrong}; take the file from a store with the same manifest"


def _wrong_group(data: bytes) -> str:
    """What is wrong with the group's metadata; zarr-python opens some that say nothing."""
    try:
        value = parse_json(data, GROUP)
    except DamageError:
        value = None
    if not isinstance(value, dict) or (value.get("zarr_format"), value.get("node_type")) != (3, "group"):
        return "the metadata of a Zarr v3 group, got something else"
    return ""


def _wrong_array(store: Store, name: str, data: bytes) -> str:
    """What Zarr says of an array otherwise than the manifest does; empty where they agree."""
    manifest = store.manifest
    spec = next(spec for spec in manifest.arrays if spec.name == name)
    try:
        array = open_metadata(name, data)
    except Exception as error:  # noqa: BLE001 - whatever zarr-python makes of damaged metadata
        return f"metadata that opens, got {type(error).__name__}"
    found = (array.shape, array.dtype, array.chunks, array.shards)
    meant = (
        (manifest.num_rows, *spec.row_shape),
        np.dtype(spec.dtype),
        (manifest.chunk_rows, *spec.row_shape),
        (manifest.shard_rows, *spec.row_shape),
    )
    return "" if found == meant else f"shape, type, chunks and shards {meant}, got {found}"


def lost_manifest(backend: Backend) -> str | None:
    """Why something that does not open was a logit store once; None where nothing tells that it was."""
    if isinstance(backend, Hdf5Backend) and backend.path.is_file():
        with backend.path.open("rb") as file:
            ours = file.read(len(USER_BLOCK_START)) == USER_BLOCK_START
        return (
            "expected the HDF5 file that was finalized, got another; take another copy of the store" if ours else None
        )
    manifest = backend.get_record(MANIFEST)
    digest = None if manifest is None else sha256(manifest)
    for name in (FINAL, *map(seal_name, backend.list_seals())):
        data = backend.get_record(name)
        if data is None:
            continue
        try:
            record = Final.from_bytes(data, name) if name == FINAL else Seal.from_bytes(data, name)
        except DamageError:
            continue
        if record.manifest_sha256 == digest:
            return None  # the manifest is as it was written: it is of a newer release
        return f"{MANIFEST}: expected the manifest that {name} names, got {'none' if digest is None else 'another'}"
    return None


def unexpected_files(store: Store, sealed: tuple[int, ...]) -> Iterator[str]:
    """Files that a store does not have, and that nothing will ever read."""
    backend = store.backend
    if isinstance(backend, Hdf5Backend):
        if store.finalized and backend.parts.exists():
            yield f"{backend.parts}: left behind when the store was finalized; it may be removed"
    elif isinstance(backend, ZarrBackend | IsFarAway):
        others = sorted(_others(store, _keys(backend), frozenset(sealed)))
        for key in others[:SHOWN_FILES]:
            yield f"{backend.location}/{key}: not a file of the store"
        if len(others) > SHOWN_FILES:
            yield f"{backend.location}: {len(others) - SHOWN_FILES} more files that are not the store's"


def _keys(backend: ZarrBackend | IsFarAway) -> Iterator[str]:
    """Names of all files, or objects, that are there; none where they can't be listed."""
    if not isinstance(backend, ZarrBackend):
        yield from backend.keys() or ()
        return
    for folder, _, names in os.walk(backend.path):
        for name in names:
            yield Path(folder, name).relative_to(backend.path).as_posix()


def _others(store: Store, keys: Iterable[str], sealed: frozenset[int]) -> Iterator[str]:
    known = {MANIFEST, FINAL, "zarr.json", *(f"{spec.name}/zarr.json" for spec in store.manifest.arrays)}
    if isinstance(store.manifest.encoding, Hidden):
        known |= {HEAD_WEIGHT, HEAD_BIAS} if store.manifest.encoding.has_bias else {HEAD_WEIGHT}
    tails = {spec.name: ["0"] * len(spec.row_shape) for spec in store.manifest.arrays}
    for key in keys:
        if key not in known and not _of_shard(store, key, tails, sealed):
            yield key


def _of_shard(store: Store, key: str, tails: dict[str, list[str]], sealed: frozenset[int]) -> bool:
    """Whether a key is a shard's object or seal; in a store that is not finalized also one that is being written."""
    writing = not store.finalized
    if writing and key.endswith(".partial"):
        return True
    parts = key.split("/")
    if parts[0] == "seals":
        shard = parts[-1].removesuffix(".json")
        if writing and isinstance(store.backend, IsFarAway):
            shard = shard.removesuffix(".intent")
            return shard.isdigit() and key in (seal_name(int(shard)), intent_name(seal_name(int(shard))))
        return shard.isdigit() and key == seal_name(int(shard)) and (writing or int(shard) in sealed)
    if parts[0] not in tails or len(parts) < 3 or not parts[2].isdigit():
        return False
    shard_number = int(parts[2])
    legal = shard_number < store.layout.num_shards if writing else shard_number in sealed
    return legal and parts[1] == "c" and parts[2] == str(shard_number) and parts[3:] == tails[parts[0]]
