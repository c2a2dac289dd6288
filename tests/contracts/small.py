"""Small stores of every kind for the contract suite."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from storage.arrays import STATUS_NOT_FINITE, STATUS_OK, STATUS_UNDECODABLE, Array
from storage.backends import Backend, Hdf5Backend, MemoryBackend, RemoteBackend, ZarrBackend
from storage.encodings import Dense, Encoding, Sample, TopK
from storage.manifest import Manifest
from storage.records import QuarantineEntry
from storage.remote import open_place
from storage.writer import StoreWriter
from tests.s3 import BUCKET
from tests.storage.soft_targets import (
    encode_rows,
    head_for,
    hidden_encoding,
    sequence_arrays,
    sequences_of,
    teacher_says,
    tokens_of,
)

KINDS = ("zarr-none", "zarr-zstd", "hdf5-none", "hdf5-zstd", "memory")
ON_DISK = KINDS[:4]
REMOTE = "s3-zstd"  # which needs the fixture `s3`
ENCODINGS: dict[str, Encoding] = {
    "dense-float16": Dense("float16"),
    "dense-float32": Dense("float32"),
    "dense-uint8": Dense("uint8"),
    "topk-float16": TopK(3, "float16"),
    "topk-uint8": TopK(5, "uint8"),
}

# what format 1.1 added, as fields of `small_manifest`
LATER: dict[str, dict[str, Any]] = {
    "topk-sequences": {"encoding": TopK(3), "sequences": sequences_of(3)},
    "dense-sequences-without-tokens": {
        "encoding": Dense("uint8"),
        "sequences": sequences_of(2, has_tokens=False, tokenizer=None),
    },
    "sample-sequences": {"encoding": Sample(9, 2**64 - 1), "temperatures": (2.0,), "sequences": sequences_of(3)},
    "sample-rows": {"encoding": Sample(2), "temperatures": (1.0,)},
    "hidden-sequences": {"encoding": hidden_encoding(5, 4, soft_cap=9.0, has_bias=True), "sequences": sequences_of(3)},
    "hidden-rows": {"encoding": hidden_encoding(5, 2, values="float32", scale=0.5)},
}


def small_manifest(**fields: Any) -> Manifest:
    """A manifest of 22 rows in shards of 8 and chunks of 4, with other fields where a test asks for them."""
    if fields.get("sequences") is not None:
        fields = {"has_hard_targets": False} | fields
    options: dict[str, Any] = {
        "num_rows": 22,
        "num_classes": 5,
        "shard_rows": 8,
        "chunk_rows": 4,
        "encoding": TopK(3),
        "temperatures": (1.0, 4.0),
        "teacher": {"digest": "ab" * 32},
        "corpus": {"kind": "arrays", "fingerprint": "cd" * 32, "num_samples": 22},
        "preprocess": {},
        "class_names": None,
        "has_hard_targets": True,
        "compressor": "none",
        "provenance": {},
    }
    return Manifest(**(options | fields))


def compressor_of(kind: str) -> str:
    """What a kind of `KINDS` compresses with."""
    return "zstd" if kind.endswith("zstd") else "none"


def path_of(kind: str, folder: Path) -> Path:
    """Where a store of a kind is in a folder."""
    return folder / ("store.h5" if kind.startswith("hdf5") else "store.zarr")


def make_backend(kind: str, folder: Path) -> Callable[[], Backend]:
    """What opens the same store again and again, on a fresh backend where it lies on a disk."""
    if kind == "memory":
        backend = MemoryBackend()
        return lambda: backend
    if kind.startswith("hdf5"):
        return lambda: Hdf5Backend(path_of(kind, folder))
    if kind == REMOTE:
        url = f"s3://{BUCKET}/contracts/{uuid.uuid4().hex}"
        return lambda: RemoteBackend(open_place(url), patience_s=0.5)
    return lambda: ZarrBackend(path_of(kind, folder))


def shard_arrays(manifest: Manifest, shard: int, seed: int = 0) -> tuple[dict[str, Array], list[QuarantineEntry]]:
    """A shard's arrays, the same each time, with a refused row now and then, and its quarantine."""
    start, stop = manifest.layout.shard_bounds(shard)
    generator = np.random.default_rng([seed, shard])
    logits_RC, hidden_RW = teacher_says(manifest, stop - start, generator)
    arrays = {spec.name: spec.full(stop - start) for spec in manifest.arrays}
    arrays |= encode_rows(manifest, np.arange(start, stop), logits_RC, hidden_RW)
    arrays["status"][:] = STATUS_OK
    arrays["sample_digest"][:] = generator.integers(1, 2**63, stop - start, dtype=np.uint64)
    if manifest.has_hard_targets:
        arrays["hard_target"][:] = generator.integers(0, manifest.num_classes, stop - start)
        arrays["hard_target_logprob"][:] = generator.normal(-1, 0.1, stop - start)
    if manifest.sequences is not None:
        arrays |= sequence_arrays(manifest, tokens_of(manifest, stop - start, generator), logits_RC)
    quarantine = []
    for row in range(start, stop):
        if row % 9 == 5:
            status = STATUS_UNDECODABLE if row % 2 else STATUS_NOT_FINITE
            for spec in manifest.arrays:
                if spec.name not in ("hard_target", "sample_digest"):
                    arrays[spec.name][row - start] = status if spec.name == "status" else spec.fill_value
            quarantine.append(QuarantineEntry(row, f"sample {row}", "not legal, 'ü' \udcff"))
    return arrays, quarantine


def create(backend: Backend, manifest: Manifest) -> StoreWriter:
    """A writer on a backend, with the head that a store of hidden states is made with."""
    return StoreWriter.on(backend, manifest, head_for(manifest))


def write(writer: StoreWriter, *shards: int, seed: int = 0) -> None:
    """Write some shards, or all that are owed."""
    for shard in shards or writer.owed_shards():
        arrays, quarantine = shard_arrays(writer.manifest, shard, seed)
        writer.write_shard(shard, arrays, quarantine)


def names_of(manifest: Manifest) -> list[str]:
    """Names of all arrays."""
    return [spec.name for spec in manifest.arrays]


def expected_rows(manifest: Manifest, start: int, stop: int, seed: int = 0) -> dict[str, Array]:
    """What rows [start, stop) must read as."""
    shards = [shard_arrays(manifest, shard, seed)[0] for shard in range(manifest.layout.num_shards)]
    return {name: np.concatenate([arrays[name] for arrays in shards])[start:stop] for name in names_of(manifest)}


def assert_same(found: dict[str, Array], expected: dict[str, Array]) -> None:
    """Equal bit for bit, NaN and all."""
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        assert found[name].shape == values.shape, name
        assert found[name].tobytes() == values.tobytes(), name
