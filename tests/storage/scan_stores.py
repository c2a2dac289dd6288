"""Small real stores for the tests of whole-store passes."""

from pathlib import Path
from typing import Any

import numpy as np

from storage.arrays import STATUS_NOT_FINITE, STATUS_OK, STATUS_UNDECODABLE, Array
from storage.encodings import Dense, Encoding, Sample
from storage.manifest import Manifest
from storage.records import QuarantineEntry
from storage.sequences import next_tokens
from storage.writer import StoreWriter
from tests.storage.soft_targets import (
    encode_rows,
    hard_target_logprobs,
    head_for,
    num_positions_of,
    sequence_arrays,
    teacher_says,
    tokens_of,
)

BLURRED, BROKEN = 3, 13  # rows that a store of `write_store` refuses, where it has them


def manifest_of(num_rows: int = 22, num_classes: int = 5, encoding: Encoding | None = None, **fields: Any) -> Manifest:
    """A manifest that can be, with other fields where a test asks for them."""
    if fields.get("sequences") is not None:
        fields = {"class_names": None, "has_hard_targets": False} | fields
    if isinstance(encoding, Sample):
        fields = {"temperatures": (1.0,)} | fields
    options: dict[str, Any] = {
        "num_rows": num_rows,
        "num_classes": num_classes,
        "shard_rows": 8,
        "chunk_rows": 4,
        "encoding": encoding or Dense("float16"),
        "temperatures": (1.0, 4.0),
        "teacher": {"digest": "ab" * 32, "kind": "export", "arch": None, "precision": "fp32"},
        "corpus": {"kind": "arrays", "fingerprint": "cd" * 32, "num_samples": num_rows},
        "preprocess": {"version": 1, "kind": "array"},
        "class_names": tuple(f"class {index}" for index in range(num_classes)),
        "has_hard_targets": True,
        "compressor": "none",
        "provenance": {"made": "2020-01-01"},
    }
    return Manifest(**(options | fields))


def logits_of(manifest: Manifest, seed: int = 0) -> Array:
    """Logits (R, C) of a teacher, the same each time."""
    return teacher_says(manifest, manifest.num_rows, np.random.default_rng(seed))[0]


def all_tokens_of(manifest: Manifest) -> dict[str, Array]:
    """The tokens of a sequence store."""
    return tokens_of(manifest, manifest.num_rows, np.random.default_rng(1))


def hard_targets_of(manifest: Manifest) -> Array:
    """Hard targets (R,): the next tokens of sequences, else the row modulo C, -1 in every seventh row."""
    if manifest.sequences is not None:
        tokens = all_tokens_of(manifest)
        return next_tokens(tokens["token_ids"], tokens["position_ids"]).reshape(-1)
    rows = np.arange(manifest.num_rows, dtype=np.int32)
    return np.where(rows % 7 == 6, -1, rows % manifest.num_classes).astype(np.int32)


def shard_of(manifest: Manifest, shard: int) -> tuple[dict[str, Array], list[QuarantineEntry]]:
    """The arrays of a shard and its quarantine."""
    start, stop = manifest.layout.shard_bounds(shard)
    num_positions = num_positions_of(manifest)
    flat = slice(start * num_positions, stop * num_positions)
    logits_RC, hidden_RW = teacher_says(manifest, manifest.num_rows, np.random.default_rng(0))
    logits_RC = logits_RC[flat]
    arrays = encode_rows(manifest, np.arange(start, stop), logits_RC, None if hidden_RW is None else hidden_RW[flat])
    arrays["sample_digest"] = np.arange(start, stop, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    arrays["status"] = np.full(stop - start, STATUS_OK, np.uint8)
    if manifest.has_hard_targets:
        arrays["hard_target"] = hard_targets_of(manifest)[flat]
        arrays["hard_target_logprob"] = hard_target_logprobs(logits_RC, arrays["hard_target"])
    if manifest.sequences is not None:
        tokens = {name: values[start:stop] for name, values in all_tokens_of(manifest).items()}
        arrays |= sequence_arrays(manifest, tokens, logits_RC)
    quarantine = []
    refused = {
        BLURRED: (STATUS_UNDECODABLE, "expected an image, got a truncated file"),
        BROKEN: (STATUS_NOT_FINITE, "expected finite logits, got NaN"),
    }
    for row, (status, reason) in refused.items():
        if start <= row < stop:
            quarantine.append(QuarantineEntry(row, f"sample-{row}", reason))
            for spec in manifest.arrays:
                if spec.name not in ("sample_digest", "hard_target") and (
                    status == STATUS_UNDECODABLE or spec.name not in ("token_ids", "position_ids")
                ):
                    arrays[spec.name][row - start] = spec.full(1)[0]
            arrays["status"][row - start] = status
    return arrays, quarantine


def write_store(path: Path, manifest: Manifest, shards: int | None = None, finalize: bool = True) -> Path:
    """A store with its first shards sealed, all of them by default."""
    with StoreWriter.open(path, manifest, head_for(manifest)) as writer:
        for shard in range(manifest.layout.num_shards if shards is None else shards):
            writer.write_shard(shard, *shard_of(manifest, shard))
        if finalize:
            writer.finalize(partial=True)
    return path
