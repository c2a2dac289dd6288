"""Write the golden stores of the current format version. No test runs this.

    python -m tests.golden.make tests/golden/v1.0

Run it once for a new format version, commit what it writes, and put the content digests that it prints into
`test_golden.py`. A golden store that is committed is never made again: that old stores still open is what it is for.
"""

import sys
from pathlib import Path

import numpy as np

from storage.arrays import STATUS_NOT_FINITE, STATUS_OK, STATUS_UNDECODABLE
from storage.encodings import Dense, Encoding, TopK
from storage.manifest import Compressor, Manifest
from storage.records import QuarantineEntry
from storage.writer import StoreWriter

NUM_ROWS, NUM_CLASSES = 22, 6
NOT_FINITE, UNDECODABLE = 5, 17
STORES: dict[str, tuple[Encoding, Compressor, tuple[int, ...]]] = {
    "dense.zarr": (Dense("float16"), "zstd", (0, 1, 2)),
    "topk.zarr": (TopK(3, "uint8"), "none", (0, 2)),
    "dense.h5": (Dense("float32"), "none", (0, 1, 2)),
    "topk.h5": (TopK(4, "float16"), "zstd", (0, 1, 2)),
}


def main(folder: Path) -> None:
    """Write all of them into a folder."""
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
    arrays["sample_digest"][:] = rows_N.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1)
    arrays["hard_target"][:] = hard_target_N
    arrays["hard_target_logprob"][:] = logprobs_NC[np.arange(len(rows_N)), hard_target_N]
    quarantine = []
    for row, status, reason in (
        (NOT_FINITE, STATUS_NOT_FINITE, "a logit is not finite"),
        (UNDECODABLE, STATUS_UNDECODABLE, "expected an image, got 'élan'"),
    ):
        if start <= row < stop:
            for spec in manifest.arrays:
                if spec.name not in ("hard_target", "sample_digest"):
                    arrays[spec.name][row - start] = spec.full(1)[0] if spec.name != "status" else status
            if status == STATUS_UNDECODABLE:
                arrays["sample_digest"][row - start] = 0
            quarantine.append(QuarantineEntry(row, f"sample-{row}", reason))
    writer.write_shard(shard, arrays, quarantine)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
