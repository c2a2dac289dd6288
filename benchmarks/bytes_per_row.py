"""Bytes a row on disk for each encoding, beside `np.save` of float32 logits.

    python -m benchmarks.bytes_per_row [--rows 20000]

Two sets of logits. `digits`: of a multilayer perceptron trained on scikit-learn's digits (1,797 real scans, 10
classes), for those scans. `synthetic`: 1,000 classes, not of a real model: features (rank 256, rectified normal
noise, pulled towards the row's class by an amount of its own) times a random head, which gives sure rows and a long
tail of unsure ones, as an ImageNet classifier does. The median top-1 probability of each set is printed.

Counted are the bytes of all files of the finalized store, records and metadata included, over its rows; `targets`
is the part of the arrays that hold the distribution (values, ids, value_range, log_tail, lse at two temperatures).
What is kept besides (digest, status, maximum, entropy) costs 15 bytes a row: with 10 classes no encoding can beat
plain float32 by much. HDF5 has no zstd of its own: its column is gzip after the same byte shuffle.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.result import write_result
from storage.arrays import STATUS_OK, Array
from storage.encodings import Dense, Encoding, TopK
from storage.manifest import Compressor, Manifest
from storage.scan import stats
from storage.writer import StoreWriter

TARGETS = ("values", "ids", "value_range", "log_tail", "lse")
TEMPERATURES = (1.0, 4.0)


def digits_logits() -> Array:
    """Logits (N, 10) of a trained classifier on the scans that it was trained on."""
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier

    pixels, classes = load_digits(return_X_y=True)
    model = MLPClassifier((64,), max_iter=1000, random_state=0).fit(pixels / 16, classes)
    hidden = np.maximum(pixels / 16 @ model.coefs_[0] + model.intercepts_[0], 0)
    return np.asarray(hidden @ model.coefs_[1] + model.intercepts_[1], np.float32)


def synthetic_logits(num_rows: int, num_classes: int = 1000, rank: int = 256) -> Array:
    """Logits (N, C) with the look of a classifier's, from a fixed seed."""
    generator = np.random.default_rng(0)
    head = generator.normal(0, 1 / np.sqrt(rank), (rank, num_classes)).astype(np.float32)
    class_N = generator.integers(0, num_classes, num_rows)
    pull_N = generator.gamma(3.0, 1.1, num_rows).astype(np.float32)
    features = np.maximum(generator.normal(0, 1, (num_rows, rank)).astype(np.float32), 0)
    features += pull_N[:, None] * head[:, class_N].T * 1.8
    return np.asarray(2.2 * features @ head, np.float32)


def store_bytes(path: Path, logits_NC: Array, encoding: Encoding, compressor: Compressor) -> tuple[float, float]:
    """Bytes a row of a finalized store of these logits: all of it, and the targets alone."""
    num_rows, num_classes = logits_NC.shape
    manifest = Manifest(
        num_rows=num_rows,
        num_classes=num_classes,
        shard_rows=8192,
        chunk_rows=1024,
        encoding=encoding,
        temperatures=TEMPERATURES,
        teacher={"digest": "0" * 64, "kind": "weights", "arch": None, "precision": "fp32"},
        corpus={"kind": "arrays", "fingerprint": "0" * 64, "num_samples": num_rows},
        preprocess={},
        class_names=None,
        has_hard_targets=False,
        compressor=compressor,
        provenance={},
    )
    with StoreWriter.open(path, manifest) as writer:
        for shard in range(manifest.layout.num_shards):
            start, stop = manifest.layout.shard_bounds(shard)
            arrays = encoding.encode(logits_NC[start:stop], TEMPERATURES)
            arrays["sample_digest"] = np.random.default_rng(shard).integers(0, 2**64, stop - start, np.uint64)
            arrays["status"] = np.full(stop - start, STATUS_OK, np.uint8)
            writer.write_shard(shard, arrays)
        writer.finalize()
        total = writer.store.backend.num_bytes()
    by_array = stats(path).bytes_by_array
    return total / num_rows, sum(by_array.get(name, 0) for name in TARGETS) / num_rows


def measure(name: str, logits_NC: Array, kept: tuple[int, ...], folder: Path) -> dict[str, Any]:
    """A table of one set of logits, printed as it is made."""
    np.save(folder / "logits.npy", logits_NC)
    plain = (folder / "logits.npy").stat().st_size / len(logits_NC)
    probs_NC = np.exp(Dense("float32").logprobs({"values": logits_NC}, 1.0, TEMPERATURES))
    top1 = np.median(probs_NC.max(axis=1))
    print(f"\n{name}: {len(logits_NC):,} rows, {logits_NC.shape[1]:,} classes, median top-1 probability {top1:.2f}")
    print(f"np.save of float32: {plain:,.1f} bytes a row. In brackets: times smaller.")
    head = ("zarr none", "zarr zstd", "hdf5 none", "hdf5 gzip")
    print(f"{'encoding':<22}" + "".join(f"{column:>20}" for column in head) + f"{'targets, zarr none':>20}")
    encodings: list[Encoding] = [Dense("float32"), Dense("float16"), Dense("uint8")]
    encodings += [TopK(k, values) for k in kept for values in ("float16", "uint8")]
    rows: list[dict[str, Any]] = []
    for encoding in encodings:
        row: dict[str, Any] = {"encoding": encoding.to_json()}
        for suffix in ("zarr", "h5"):
            for compressor in ("none", "zstd"):
                path = folder / f"{name}-{len(rows)}-{compressor}.{suffix}"
                total, targets = store_bytes(path, logits_NC, encoding, "zstd" if compressor == "zstd" else "none")
                row[f"{suffix}_{compressor}"] = round(total, 2)
                row[f"{suffix}_{compressor}_targets"] = round(targets, 2)
        rows.append(row)
        cells = [row[key] for key in ("zarr_none", "zarr_zstd", "h5_none", "h5_zstd")]
        label = " ".join(str(value) for value in encoding.to_json().values())
        columns = "".join(f"{f'{cell:,.1f} ({plain / cell:.1f}x)':>20}" for cell in cells)
        print(f"{label:<22}{columns}{row['zarr_none_targets']:>20,.1f}")
    return {
        "num_rows": len(logits_NC),
        "num_classes": logits_NC.shape[1],
        "median_top1_probability": round(float(top1), 3),
        "temperatures": list(TEMPERATURES),
        "np_save_float32": round(plain, 2),
        "bytes_per_row": rows,
    }


def main() -> None:
    """Measure both sets of logits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="rows of the synthetic set")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        digits = measure("digits", digits_logits(), (1, 4), Path(folder))
        synthetic = measure("synthetic", synthetic_logits(options.rows), (8, 16, 50, 128), Path(folder))
    write_result("bytes_per_row", {"digits": digits, "synthetic": synthetic})


if __name__ == "__main__":
    main()
