"""Open a store of 10^8 rows, read rows here and there, and run `logitstore info` on it.

    python -m benchmarks.open_big [--rows 100000000] [--folder FOLDER]

The store is topk k=1 uint8 over 1,000 classes, zstd, in 1,526 shards of 65,536 rows, all with the same rows.
Nothing in it is made up but that: the first shard is written in the ordinary way, the others are hard links to its
files with seals of their own (rows and file names are theirs, the digests of what the files hold are the same), and
the ordinary `finalize` checks them all. So it takes little disk, and `logitstore verify` finds nothing wrong with
it; the benchmark lets it.

Measured for the store while it is unfinalized and afterwards, in a process of its own each time: from before the
first import of the package to the open store, the open alone, 1,024 rows at random places, and the whole process
`logitstore info STORE --json`. Each seven times, the files being in the page cache; reported are the median and the
quickest, which is nearer to what a machine gives that has nothing else to do.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.result import write_result
from storage.arrays import STATUS_OK, Array
from storage.backends.zarr3 import seal_name
from storage.encodings import TopK
from storage.manifest import Manifest
from storage.reader import open_store
from storage.records import Seal
from storage.scan import verify
from storage.writer import StoreWriter

SHARD_ROWS = 65_536
REPEATS = 7
NUM_READS = 1024

CHILD = f"""
import json, sys, time
begin = time.perf_counter()
from storage.reader import open_store
imported = time.perf_counter()
store = open_store(sys.argv[1])
num_rows = store.num_sealed_rows
opened = time.perf_counter()
import numpy as np
for row in np.random.default_rng(0).integers(0, num_rows, {NUM_READS}).tolist():
    store.read(["sample_digest", "ids", "values"], row, row + 1)
read = time.perf_counter()
print(json.dumps({{"open_s": opened - imported, "open_with_imports_s": opened - begin,
                  "read_{NUM_READS}_rows_s": read - opened, "num_rows": num_rows}}))
"""


def manifest_of(num_rows: int) -> Manifest:
    """The manifest of a store whose rows are short."""
    return Manifest(
        num_rows=num_rows,
        num_classes=1000,
        shard_rows=SHARD_ROWS,
        chunk_rows=4096,
        encoding=TopK(1, "uint8"),
        temperatures=(1.0,),
        teacher={"digest": "0" * 64, "kind": "made up", "arch": None, "precision": "fp32"},
        corpus={"kind": "arrays", "fingerprint": "0" * 64, "num_samples": num_rows},
        preprocess={},
        class_names=None,
        has_hard_targets=False,
        compressor="zstd",
        provenance={"made": "benchmarks/open_big.py"},
    )


def shard_arrays(manifest: Manifest, num_rows: int) -> dict[str, Array]:
    """Rows that a teacher can have given."""
    logits_NC = np.zeros((1, manifest.num_classes), np.float32)
    logits_NC[0, 7] = 9
    row = manifest.encoding.encode(logits_NC, manifest.temperatures)
    arrays = {name: np.repeat(values, num_rows, axis=0) for name, values in row.items()}
    arrays["sample_digest"] = np.full(num_rows, 0x9E3779B97F4A7C15, np.uint64)
    arrays["status"] = np.full(num_rows, STATUS_OK, np.uint8)
    return arrays


def write_big(path: Path, num_rows: int) -> None:
    """All shards sealed, not finalized: the first and the last written, the others linked to the first."""
    manifest = manifest_of(num_rows)
    last = manifest.layout.num_shards - 1
    with StoreWriter.open(path, manifest) as writer:
        for shard in {0, last}:
            start, stop = manifest.layout.shard_bounds(shard)
            writer.write_shard(shard, shard_arrays(manifest, stop - start))
        first = writer.store.seal(0)
        for shard in range(1, last):
            start, stop = manifest.layout.shard_bounds(shard)
            objects = {}
            for key, digest in first.objects.items():
                objects[_moved(key, shard)] = digest
                (path / _moved(key, shard)).parent.mkdir(parents=True, exist_ok=True)
                os.link(path / key, path / _moved(key, shard))
            seal: Seal = replace(first, shard=shard, start=start, stop=stop, objects=objects)
            (path / seal_name(shard)).write_bytes(seal.to_bytes())


def _moved(key: str, shard: int) -> str:
    """The key of the same object in another shard: `values/c/0/0` -> `values/c/7/0`."""
    parts = key.split("/")
    return "/".join([*parts[:2], str(shard), *parts[3:]])


def measure(path: Path) -> dict[str, dict[str, float]]:
    """Median and least of each figure over processes of their own, seconds."""
    runs = []
    for _ in range(REPEATS):
        child = subprocess.run([sys.executable, "-c", CHILD, path], check=True, capture_output=True, text=True)
        run: dict[str, Any] = json.loads(child.stdout)
        begin = time.perf_counter()
        command = [str(Path(sys.executable).with_name("logitstore")), "info", str(path), "--json"]
        info = subprocess.run(command, check=True, capture_output=True, text=True)
        run["info_process_s"] = time.perf_counter() - begin
        assert json.loads(info.stdout)["num_sealed_rows"] == run["num_rows"]
        runs.append(run)
    return {
        name: {
            "median": round(statistics.median(run[name] for run in runs), 4),
            "least": round(min(run[name] for run in runs), 4),
        }
        for name in runs[0]
        if name.endswith("_s")
    }


def main() -> None:
    """Make the store, measure it unfinalized, finalize it, measure it again, verify it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10**8)
    parser.add_argument("--folder", help="where to make the store; by default a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder, "big.zarr")
        write_big(path, options.rows)
        unfinalized = measure(path)
        begin = time.perf_counter()
        with open_store(path) as store:
            manifest = store.manifest
        with StoreWriter.open(path, manifest) as writer:
            digest = writer.finalize()
        finalize_s = time.perf_counter() - begin
        finalized = measure(path)
        begin = time.perf_counter()
        result = verify(path)
        verify_s = time.perf_counter() - begin
        assert result.ok, result.damage[:3]
        assert result.content_digest == digest
    figures = {
        "num_rows": options.rows,
        "num_shards": manifest.layout.num_shards,
        "finalized": finalized,
        "unfinalized": unfinalized,
        "finalize_s": round(finalize_s, 2),
        "verify_s": round(verify_s, 2),
    }
    print(f"{options.rows:,} rows, {manifest.layout.num_shards:,} shards; seconds, median (least) of {REPEATS}")
    print(f"{'':<24}{'finalized':>18}{'unfinalized':>18}")
    for name in finalized:
        cells = [f"{found[name]['median']:.3f} ({found[name]['least']:.3f})" for found in (finalized, unfinalized)]
        print(f"{name[:-2].replace('_', ' '):<24}" + "".join(f"{cell:>18}" for cell in cells))
    print(f"whole-store passes: finalize {finalize_s:.1f} s, verify {verify_s:.1f} s")
    write_result("open_big", figures)


if __name__ == "__main__":
    main()
