"""Write the golden stores of a format version. No test runs this.

    python -m tests.golden.make tests/golden/v1.1

Run it once for a new format version, commit what it writes, and put the content digests that it prints into
`test_golden.py`. A golden store that is committed is never made again: that old stores still open is what it is for.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from storage.arrays import STATUS_NOT_FINITE, STATUS_OK, STATUS_UNDECODABLE, Array
from storage.encodings import Dense, Encoding, HeadArrays, Hidden, Sample, TopK
from storage.encodings.sample import uniforms
from storage.head import head_digest
from storage.manifest import Compressor, Manifest
from storage.records import QuarantineEntry
from storage.sequences import Sequences, next_tokens
from storage.writer import StoreWriter

NUM_ROWS, NUM_CLASSES = 22, 6
NOT_FINITE, UNDECODABLE = 5, 17
STORES: dict[str, tuple[Encoding, Compressor, tuple[int, ...]]] = {
    "dense.zarr": (Dense("float16"), "zstd", (0, 1, 2)),
    "topk.zarr": (TopK(3, "uint8"), "none", (0, 2)),
    "dense.h5": (Dense("float32"), "none", (0, 1, 2)),
    "topk.h5": (TopK(4, "float16"), "zstd", (0, 1, 2)),
}

# Version 1.1. The teacher is a head over hidden states; what it said is drawn as `said` does.
VOCABULARY, WIDTH, POSITIONS, SEQUENCE_ROWS = 300, 3, 5, 7
BROKEN_SEQUENCE, LOST_SEQUENCE = 1, 4
SCALE, SOFT_CAP = 0.5, 20.0
SEED = 2**64 - 3
SEQUENCES_1_1: dict[str, dict[str, Any]] = {
    "topk.zarr": {"encoding": TopK(4, "uint8"), "compressor": "none", "shards": (0, 1)},
    "topk.h5": {"encoding": TopK(5), "compressor": "zstd", "shards": (0, 1), "has_tokens": False},
    "sample.zarr": {"encoding": Sample(20, SEED), "compressor": "zstd", "shards": (0, 1), "temperatures": (1.0,)},
    "sample.h5": {"encoding": Sample(255, 7), "compressor": "none", "shards": (1,), "temperatures": (2.0,)},
    "hidden.zarr": {"encoding": "float16", "compressor": "none", "shards": (0, 1), "has_bias": True},
    "hidden.h5": {"encoding": "float32", "compressor": "zstd", "shards": (0, 1), "is_classifier": True},
}
LINEAGE = ({"content_digest": "12" * 32, "encoding": {"name": "dense", "values": "float16"}, "temperatures": [1.0]},)


def main(folder: Path) -> None:
    """Write the stores of the version that the folder is named by."""
    stores = {"v1.0": _write_1_0, "v1.1": _write_1_1}
    stores[folder.name](folder)


def _write_1_0(folder: Path) -> None:
    for name, (encoding, compressor, shards) in STORES.items():
        manifest = Manifest(
            num_rows=NUM_ROWS,
            num_classes=NUM_CLASSES,
            shard_rows=8,
            chunk_rows=4,
            encoding=encoding,
            temperatures=(1.0, 4.0),
            teacher={"digest": "ab" * 32, "kind": "export", "arch": None, "precision": "fp32", "combine": None},
            corpus={"kind": "arrays", "fingerprint": "cd" * 32, "num_samples": NUM_ROWS},
            preprocess={"version": 1, "kind": "array"},
            class_names=("ant", "bee", "cat", "dog", "élan", "\N{FOX FACE}"),
            has_hard_targets=True,
            compressor=compressor,
            provenance={"made_by": "tests/golden/make.py"},
        )
        with StoreWriter.open(folder / name, manifest) as writer:
            for shard in shards:
                _write(writer, shard)
            print(name, writer.finalize(partial=True))  # noqa: T201 - a script


def _write(writer: StoreWriter, shard: int) -> None:
    manifest = writer.manifest
    start, stop = manifest.layout.shard_bounds(shard)
    rows_N = np.arange(start, stop)
    logits_NC = np.random.default_rng(7).normal(1, 4, (NUM_ROWS, NUM_CLASSES)).astype(np.float32)[rows_N]
    hard_target_N = (rows_N % NUM_CLASSES).astype(np.int32)
    logprobs_NC = Dense("float32").logprobs(Dense("float32").encode(logits_NC, (1.0,)), 1.0, (1.0,))
    arrays = {spec.name: spec.full(len(rows_N)) for spec in manifest.arrays}
    arrays |= manifest.encoding.encode(logits_NC, manifest.temperatures)
    arrays["status"][:] = STATUS_OK
    arrays["sample_digest"][:] = _digests(rows_N)
    arrays["hard_target"][:] = hard_target_N
    arrays["hard_target_logprob"][:] = logprobs_NC[np.arange(len(rows_N)), hard_target_N]
    reasons = {
        NOT_FINITE: (STATUS_NOT_FINITE, "a logit is not finite"),
        UNDECODABLE: (STATUS_UNDECODABLE, "expected an image, got 'élan'"),
    }
    _write_shard(writer, shard, arrays, reasons)


def _digests(rows_N: Array) -> Array:
    digests_N: Array = rows_N.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1)
    return digests_N


def _write_shard(
    writer: StoreWriter, shard: int, arrays: dict[str, Array], reasons: dict[int, tuple[int, str]]
) -> None:
    """Write a shard, those rows without targets that a reason is given for."""
    start, stop = writer.layout.shard_bounds(shard)
    quarantine = []
    for row, (status, reason) in reasons.items():
        if start <= row < stop:
            kept = {"sample_digest", "hard_target"}
            kept |= {"token_ids", "position_ids"} if status == STATUS_NOT_FINITE else set()
            for spec in writer.manifest.arrays:
                if spec.name not in kept:
                    arrays[spec.name][row - start] = spec.full(1)[0] if spec.name != "status" else status
            if status == STATUS_UNDECODABLE:
                arrays["sample_digest"][row - start] = 0
            quarantine.append(QuarantineEntry(row, f"sample-{row}", reason))
    writer.write_shard(shard, arrays, quarantine)


def _write_1_1(folder: Path) -> None:
    for name, options in SEQUENCES_1_1.items():
        has_bias, is_classifier = options.get("has_bias", False), options.get("is_classifier", False)
        head = None
        encoding = options["encoding"]
        if isinstance(encoding, str):
            head = _head(encoding, has_bias)
            cap = SOFT_CAP if has_bias else None
            encoding = Hidden(WIDTH, encoding, SCALE, cap, has_bias, head_digest(head))  # type: ignore[arg-type]
        has_tokens = options.get("has_tokens", True)
        tokenizer = "ef" * 32 if has_tokens else None
        manifest = Manifest(
            num_rows=SEQUENCE_ROWS,
            num_classes=VOCABULARY,
            shard_rows=4,
            chunk_rows=2,
            encoding=encoding,
            temperatures=options.get("temperatures", (1.0, 4.0)),
            teacher={"digest": "ab" * 32, "kind": "weights", "arch": "gpt:2x3", "precision": "fp32", "combine": None},
            corpus={"kind": "tokens", "fingerprint": "cd" * 32, "num_samples": SEQUENCE_ROWS},
            preprocess={"version": 1, "kind": "tokens", "shape": [2, POSITIONS + 1]},
            class_names=None,
            has_hard_targets=is_classifier,
            compressor=options["compressor"],
            provenance={"made_by": "tests/golden/make.py"},
            sequences=None if is_classifier else Sequences(POSITIONS, has_tokens, tokenizer, 4),
            lineage=LINEAGE if name == "topk.zarr" else None,
        )
        with StoreWriter.open(folder / name, manifest, head) as writer:
            for shard in options["shards"]:
                _write_sequences(writer, shard, head)
            print(name, writer.finalize(partial=True))  # noqa: T201 - a script


def _head(dtype: str, has_bias: bool) -> HeadArrays:
    generator = np.random.default_rng(11)
    weight_CW = generator.normal(0, 3, (VOCABULARY, WIDTH)).astype(dtype)
    return HeadArrays(weight_CW, generator.normal(0, 1, VOCABULARY).astype(dtype) if has_bias else None)


def _write_sequences(writer: StoreWriter, shard: int, head: HeadArrays | None) -> None:
    """Seven sequences of six tokens, or as many rows of a classifier, each the first position of a sequence."""
    manifest, encoding = writer.manifest, writer.manifest.encoding
    start, stop = manifest.layout.shard_bounds(shard)
    rows_N = np.arange(start, stop)
    is_classifier = manifest.sequences is None
    num_positions = 1 if is_classifier else POSITIONS
    generator = np.random.default_rng(13)
    hidden_NPW = generator.normal(0, 1, (SEQUENCE_ROWS, POSITIONS, WIDTH)).astype(np.float32)
    logits_NPC = generator.normal(1, 4, (SEQUENCE_ROWS, POSITIONS, VOCABULARY)).astype(np.float32)
    token_ids = generator.integers(0, VOCABULARY, (SEQUENCE_ROWS, POSITIONS + 1)).astype(np.uint16)
    position_ids = np.tile(np.array([0, 1, 2, 0, 1, 2], np.uint8), (SEQUENCE_ROWS, 1))
    position_ids[::2] = np.arange(POSITIONS + 1)
    token_ids[-1, -2:] = position_ids[-1, -2:] = 0

    hidden_RW = hidden_NPW[rows_N, :num_positions].reshape(-1, WIDTH)
    logits_RC = logits_NPC[rows_N, :num_positions].reshape(-1, VOCABULARY)
    if isinstance(encoding, Hidden) and head is not None:
        logits_RC = encoding.logits({"hidden": hidden_RW}, head)
    uniform_R = uniforms(encoding.seed, rows_N, num_positions) if isinstance(encoding, Sample) else None
    found = encoding.encode(logits_RC, manifest.temperatures, uniform_N=uniform_R, hidden_NW=hidden_RW)
    target_NP = next_tokens(token_ids[rows_N], position_ids[rows_N])[:, :num_positions]
    logprobs_RC = Dense("float32").logprobs(Dense("float32").encode(logits_RC, (1.0,)), 1.0, (1.0,))
    logprob_R = np.take_along_axis(logprobs_RC, np.maximum(target_NP.reshape(-1, 1), 0), axis=1)
    logprob_NP = np.where(target_NP >= 0, logprob_R.reshape(target_NP.shape), np.nan).astype(np.float16)

    arrays = {spec.name: spec.full(len(rows_N)) for spec in manifest.arrays}
    for spec in manifest.arrays:
        if spec.name in found:
            arrays[spec.name][:] = found[spec.name].reshape(arrays[spec.name].shape)
    arrays["status"][:] = STATUS_OK
    arrays["sample_digest"][:] = _digests(rows_N)
    arrays["hard_target_logprob"][:] = logprob_NP.reshape(arrays["hard_target_logprob"].shape)
    if is_classifier:
        arrays["hard_target"][:] = target_NP[:, 0]
    if "token_ids" in arrays:
        arrays["token_ids"][:], arrays["position_ids"][:] = token_ids[rows_N], position_ids[rows_N]
    reasons = {
        BROKEN_SEQUENCE: (STATUS_NOT_FINITE, "logits are not finite: NaN"),
        LOST_SEQUENCE: (STATUS_UNDECODABLE, "expected 6 tokens, got 5"),
    }
    _write_shard(writer, shard, arrays, reasons)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
