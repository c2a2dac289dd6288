"""Benchmark: covariance and clusters of a store's classes, over one pass of plain reading of the same store.

    python -m benchmarks.covariance                     # 10^6 rows x 1,000 classes, dense float16: 2 GB
    python -m benchmarks.covariance --encoding topk     # the same, 50 kept entries a row

Writes a store whose generalist hesitates among 20 classes of a block in each row, and goes through it in turns: `read`
reads what a row's probabilities take, every checksum checked, and does nothing with it; `covariance` is the pass of
`studenttrain specialists plan`, and `clusters` its k-means. Each is a process of its own, after one that brought the
store into the page cache; figures are medians over the repeats. `product` is what the matrix products of the pass take
alone, by those of one block: no pass of this kind is quicker. `peak` is the most that a process held, bytes, without
mapped files (those belong to the page cache), and `imports` what it held before it began.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Self

import numpy as np

from benchmarks.result import write_result
from storage.encodings import Dense, Encoding, TopK
from storage.manifest import Manifest
from storage.reader import open_store
from storage.scan.covariance import BLOCK_VALUES, PAIR_CLASSES, TILE, covariance, covariance_bytes
from storage.scan.passes import blocks
from storage.writer import StoreWriter
from studenttrain.specialists.clusters import ClusterOptions, find_clusters
from teacherdump.plan import choose_layout

BLOCK_CLASSES = 20
READ = {"dense": ["values", "status"], "topk": ["ids", "values", "lse", "log_tail", "status"]}


def write_store(path: Path, num_rows: int, num_classes: int, encoding: Encoding) -> None:
    """A finalized store of rows that are each of a block of classes."""
    options: dict[str, Any] = {"num_rows": num_rows, "num_classes": num_classes, "encoding": encoding}
    options |= {"temperatures": (1.0,), "teacher": {}, "corpus": {}, "preprocess": {}, "class_names": None}
    options |= {"has_hard_targets": False, "compressor": "none", "provenance": {}}
    layout = choose_layout(num_rows, Manifest(**options, shard_rows=1, chunk_rows=1).arrays)
    manifest = Manifest(**options, shard_rows=layout.shard_rows, chunk_rows=layout.chunk_rows)
    generator = np.random.default_rng(0)
    with StoreWriter.open(path, manifest) as writer:
        for shard in writer.owed_shards():
            start, stop = layout.shard_bounds(shard)
            arrays = {spec.name: np.zeros((stop - start, *spec.row_shape), spec.dtype) for spec in manifest.arrays}
            first_N = generator.integers(0, num_classes // BLOCK_CLASSES, stop - start) * BLOCK_CLASSES
            if isinstance(encoding, TopK):
                fill_topk(arrays, first_N, num_classes, generator)
            else:
                logits_NC = 2 * generator.standard_normal((stop - start, num_classes), np.float32)
                own_NB = first_N[:, None] + np.arange(BLOCK_CLASSES)
                logits_NC[np.arange(stop - start)[:, None], own_NB] += 5
                arrays["values"] = (logits_NC - logits_NC.max(axis=1, keepdims=True)).astype(np.float16)
            writer.write_shard(shard, arrays)
        writer.finalize()


def fill_topk(arrays: dict[str, Any], first_N: Any, num_classes: int, generator: np.random.Generator) -> None:
    """Kept entries: the classes of the row's block in some order, then others; a tail of 5 %."""
    num_rows, k = arrays["ids"].shape
    own_NB = generator.permuted(np.tile(np.arange(BLOCK_CLASSES), (num_rows, 1)), axis=1)
    offset_N = generator.integers(0, num_classes - k, num_rows)
    other_NO = BLOCK_CLASSES + (offset_N[:, None] + np.arange(k - BLOCK_CLASSES)) % (num_classes - BLOCK_CLASSES)
    arrays["ids"] = ((first_N[:, None] + np.hstack([own_NB, other_NO])) % num_classes).astype(arrays["ids"].dtype)
    values_NK = -np.cumsum(generator.exponential(0.25, (num_rows, k)), axis=1)
    values_NK -= values_NK[:, :1]
    arrays["values"] = values_NK.astype(np.float16)
    arrays["lse"] = (np.log(np.exp(values_NK).sum(axis=1)) - np.log(0.95)).astype(np.float32)[:, None]
    arrays["log_tail"] = np.full((num_rows, 1), np.log(0.05), np.float32)


class PeakMemory:
    """The largest memory of this process that no file backs, bytes, looked at every 5 ms."""

    def __init__(self) -> None:
        self.peak, self._is_done = held_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._is_done.wait(0.005):
            self.peak = max(self.peak, held_bytes())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_done.set()
        self._thread.join()


def held_bytes() -> int:
    """Resident memory of this process that no file backs."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def measure(path: Path, what: str, num_clusters: int) -> dict[str, float]:
    """Seconds and bytes of one pass, in this process."""
    with open_store(path) as store, PeakMemory() as memory:
        before, start = held_bytes(), time.perf_counter()
        if what == "read":
            for shard in store.sealed_shards():
                for block in blocks(store.manifest, shard):
                    store.read(READ[store.manifest.encoding.name], block.start, block.stop)
            return {"read_s": time.perf_counter() - start, "read_peak": memory.peak, "imports": before}
        found = covariance(store)
        figures = {"covariance_s": time.perf_counter() - start, "covariance_peak": memory.peak}
        start = time.perf_counter()
        clusters = find_clusters(found.covariance_CC, ClusterOptions(num_clusters))
        figures |= {"clusters_s": time.perf_counter() - start, "clusters_peak": memory.peak}
        is_block = [
            len(each.classes) == BLOCK_CLASSES and each.classes[-1] - each.classes[0] == BLOCK_CLASSES - 1
            for each in clusters.specialists
        ]
        return figures | {"blocks_found": sum(is_block)}


def product_seconds(num_rows: int, num_classes: int) -> float:
    """What the products of a dense pass take alone, by the median of some of one block."""
    block_rows = max(1, BLOCK_VALUES // num_classes)
    probs_RC = np.random.default_rng(0).random((block_rows, num_classes), np.float32)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for first in range(0, num_classes, TILE):
            probs_RC[:, first : first + TILE].T @ probs_RC[:, first:]
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * num_rows / block_rows


def main() -> None:
    """Measure, print one JSON object, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=1000, help="a multiple of 20")
    parser.add_argument("--encoding", choices=["dense", "topk"], default="dense")
    parser.add_argument("--k", type=int, default=50, help="kept entries of topk")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(Path(args.child[0]), args.child[1], args.classes // BLOCK_CLASSES)))
        return
    encoding: Encoding = Dense("float16") if args.encoding == "dense" else TopK(args.k)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        path = Path(name) / "store.zarr"
        write_store(path, args.rows, args.classes, encoding)
        command = [sys.executable, "-m", "benchmarks.covariance", "--classes", str(args.classes), "--child", str(path)]
        measured: dict[str, list[float]] = {}
        for repeat in range(args.repeats + 1):
            for what in ("read", "covariance") if repeat else ("read",):
                figures = json.loads(subprocess.run([*command, what], capture_output=True, check=True).stdout)
                for key, value in figures.items() if repeat else ():
                    measured.setdefault(key, []).append(value)
        with open_store(path) as store:
            estimate = covariance_bytes(store.manifest, min(8, len(os.sched_getaffinity(0))))
    ratios = [one / two for one, two in zip(measured["covariance_s"], measured["read_s"], strict=True)]
    report: dict[str, Any] = {"rows": args.rows, "classes": args.classes, "encoding": encoding.to_json()}
    report |= {key: round(statistics.median(values), 3) for key, values in measured.items()}
    report |= {"covariance_over_read": round(statistics.median(ratios), 2), "estimated_bytes": estimate}
    if args.encoding == "dense" or args.classes < PAIR_CLASSES * args.k:
        report["product_s"] = round(product_seconds(args.rows, args.classes), 3)
    print(json.dumps(report))
    write_result(f"covariance_{args.encoding}", report)


if __name__ == "__main__":
    main()
