"""What a store is made of in Zarr v3: the keys of its objects, and their bytes as zarr-python makes them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import MemoryStore

from storage.arrays import Array, ArraySpec
from storage.head import HEAD_BIAS, HEAD_WEIGHT
from storage.manifest import FORMAT_NAME, Manifest

GROUP = "zarr.json"
SEAL_DIGITS = 8


def seal_name(shard: int) -> str:
    """Name of the seal record of a shard."""
    return f"seals/{shard:0{SEAL_DIGITS}d}.json"


def sealed_in(names: Iterable[str]) -> list[int]:
    """Shards whose seal is among names without their folder, ascending."""
    found = (re.fullmatch(rf"([0-9]{{{SEAL_DIGITS},}})\.json", name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def shard_key(spec: ArraySpec, shard: int) -> str:
    """Key of an array's part of a shard."""
    return "/".join((spec.name, "c", str(shard), *["0"] * len(spec.row_shape)))


def metadata_keys(manifest: Manifest) -> list[str]:
    """Keys of the metadata, the group's first: it tells that this is a store."""
    return [GROUP, *sorted(f"{spec.name}/{GROUP}" for spec in manifest.arrays)]


def begun_keys(manifest: Manifest) -> set[str]:
    """Keys that a creation which was cut off may leave behind."""
    return {*metadata_keys(manifest), HEAD_WEIGHT, HEAD_BIAS}


def metadata_bytes(manifest: Manifest) -> dict[str, bytes]:
    """The group's and the arrays' metadata, by key."""
    buffers = _metadata(manifest)
    return {key: buffers[key].to_bytes() for key in metadata_keys(manifest)}


def shard_bytes(manifest: Manifest, shard: int, arrays: Mapping[str, Array]) -> dict[str, bytes]:
    """The objects of a shard, by key."""
    start, stop = manifest.layout.shard_bounds(shard)
    buffers = _metadata(manifest)
    known = set(buffers)
    group = zarr.open_group(MemoryStore(buffers), mode="r+", zarr_format=3, use_consolidated=False)
    for name, values in arrays.items():
        put_rows(group, name, start, stop, values)
    return {key: buffers[key].to_bytes() for key in sorted(set(buffers) - known)}


def put_rows(group: zarr.Group, name: str, start: int, stop: int, values: Array) -> None:
    """Write rows of an array of an open group, chunks of nothing but fill values too."""
    array = group[name]
    assert isinstance(array, zarr.Array)
    array.with_config({"write_empty_chunks": True})[start:stop] = values


def open_metadata(name: str, data: bytes) -> zarr.Array[Any]:
    """The array that metadata describes, without any rows."""
    buffer = default_buffer_prototype().buffer.from_bytes(data)
    return zarr.open_array(MemoryStore({f"{name}/{GROUP}": buffer}), path=name, mode="r", zarr_format=3)


def _metadata(manifest: Manifest) -> dict[str, Buffer]:
    metadata: dict[str, Buffer] = {}
    attributes = {"format": FORMAT_NAME, "format_version": manifest.format_version}
    group = zarr.create_group(MemoryStore(metadata), zarr_format=3, attributes=attributes)
    for spec in manifest.arrays:
        _create_array(group, spec, manifest)
    return metadata


def _create_array(group: zarr.Group, spec: ArraySpec, manifest: Manifest) -> None:
    codecs: list[Any] = [Crc32cCodec()]
    if manifest.compressor == "zstd":
        codecs.insert(0, zstd_codec(spec.dtype, manifest.is_packed_tightly))
    group.create_array(
        spec.name,
        shape=(manifest.num_rows, *spec.row_shape),
        dtype=np.dtype(spec.dtype),
        chunks=(manifest.chunk_rows, *spec.row_shape),
        shards=(manifest.shard_rows, *spec.row_shape),
        compressors=codecs,
        fill_value=spec.fill_value,
        dimension_names=["row", *(f"{spec.name}_{axis}" for axis in range(len(spec.row_shape)))],
        config={"write_empty_chunks": True},
    )


def zstd_codec(dtype: str, tight: bool = False) -> BloscCodec:
    """What a chunk of a type is compressed by where the compressor is `zstd`.

    Args:
        dtype: of the array.
        tight: whether to save the last bytes, at a hundredth of the speed. At the highest level zstd finds more in ids
            as they are than in their bytes apart: the same few follow one another.
    """
    kind, itemsize = np.dtype(dtype).kind, np.dtype(dtype).itemsize
    is_shuffled = itemsize > 1 and not (tight and kind == "u")
    shuffle: Literal["shuffle", "noshuffle"] = "shuffle" if is_shuffled else "noshuffle"
    return BloscCodec(cname="zstd", clevel=9 if tight else 3, shuffle=shuffle, typesize=itemsize)
