"""How fast stored targets are streamed from an S3 server on loopback, beside the same store on the disk, in one run.

    python -m benchmarks.stream_remote                                # a dense store of 320 MB
    python -m benchmarks.stream_remote --encoding topk --rows 400000  # narrow rows: many small chunks

Starts the server of the tests (moto, in a process of its own; it takes one of the cores), writes a store to the disk
and its files to the server, and streams whole epochs of both in turns through `TargetReader`, every chunk's checksum
checked, all rows shuffled: first from each, so that the page cache is warm, then `--repeats` times. The rows must come
in the same order with the same bits. The same over HTTP, and out of a local cache that holds the store.

`moved_over_useful` is bytes of objects that came from the server in an epoch over the bytes of the chunks that the
epoch needs; the first epoch also fetches the seals and the index of each array in each shard. The server takes a core
of its own and is slow: `server_mb_per_s` is what plain GETs of the same objects reach, as many of them side by side.

Last a student is trained from the disk and from the server, with connections cut on the way: its weights must be equal,
bit for bit. Prints one JSON object.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors.numpy import load_file

from benchmarks.result import write_result
from storage.backends import CacheSettings, IsFarAway
from storage.backends.remote import THREADS
from storage.corpus import Preprocess
from storage.encodings import Dense, Encoding, TopK
from storage.manifest import Manifest
from storage.reader import Store, open_store
from storage.remote import open_place
from storage.writer import StoreWriter
from studenttrain.config import FitConfig
from studenttrain.order import EpochOrder, choose_block_rows, choose_window_blocks
from studenttrain.train import fit
from studenttrain.window import TargetReader
from teacherdump.plan import choose_layout
from tests.s3 import S3Server, start_server, stop_server

NUM_CLASSES = 1000
FIT_ROWS, FIT_FEATURES = 2000, 8


def write_store(path: Path, num_rows: int, encoding: Encoding, fields: dict[str, Any] | None = None) -> Path:
    """A finalized store of random targets."""
    options: dict[str, Any] = {"num_rows": num_rows, "num_classes": NUM_CLASSES, "encoding": encoding}
    options |= {"temperatures": (1.0,), "teacher": {"digest": "00"}, "corpus": {}, "preprocess": {}}
    options |= {"class_names": None, "has_hard_targets": True, "compressor": "none", "provenance": {}}
    options |= fields or {}
    layout = choose_layout(num_rows, Manifest(**options, shard_rows=1, chunk_rows=1).arrays)
    manifest = Manifest(**options, shard_rows=layout.shard_rows, chunk_rows=layout.chunk_rows)
    with StoreWriter.open(path, manifest) as writer:
        for shard in writer.owed_shards():
            start, stop = layout.shard_bounds(shard)
            generator = np.random.default_rng(shard)
            arrays = {}
            for spec in manifest.arrays:
                shape = (stop - start, *spec.row_shape)
                if np.dtype(spec.dtype).kind == "f":
                    arrays[spec.name] = -generator.random(shape, np.float32).astype(spec.dtype)
                else:
                    arrays[spec.name] = generator.integers(0, 100, shape).astype(spec.dtype)
            arrays["status"][:] = 0
            writer.write_shard(shard, arrays)
        writer.finalize()
    return path


def upload(folder: Path, url: str) -> None:
    """Put the files of a store under a URL."""
    place = open_place(url)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        place.put(path.relative_to(folder).as_posix(), path.read_bytes())


def epochs(reader: TargetReader, batch_size: int) -> Iterator[str]:
    """Stream an epoch at each `next`; gives a digest of all rows and values in their order."""
    manifest = reader.store.manifest
    block_rows = choose_block_rows(manifest)
    blocks = choose_window_blocks(manifest, block_rows)
    for epoch in range(1 << 30):
        state = xxhash.xxh3_128()
        order = EpochOrder(reader.store.layout, ((0, reader.store.layout.num_shards),), 0, epoch, block_rows, blocks)
        for batch in reader.batches(order, batch_size):
            state.update(batch.rows_N.data)
            for name in reader.names:
                state.update(np.ascontiguousarray(batch.arrays[name]).data)
        yield state.hexdigest()


def useful_bytes(store: Store, names: tuple[str, ...]) -> int:
    """Bytes of the chunks of some arrays, without indices."""
    index_bytes = store.manifest.shard_rows // store.manifest.chunk_rows * 16 + 4
    total = 0
    for shard in store.sealed_shards():
        for key, value in store.seal(shard).objects.items():
            if key.split("/")[0] in names:
                total += int(value["num_bytes"]) - index_bytes
    return total


def bytes_read(store: Store) -> int:
    """Bytes that came over the network so far."""
    return store.backend.bytes_read if isinstance(store.backend, IsFarAway) else 0


def plain_gets(store: Store) -> float:
    """Seconds that plain GETs of all objects of all shards take, as many at a time as the stream makes."""
    assert isinstance(store.backend, IsFarAway)
    place = open_place(store.path)
    keys = [key for shard in store.sealed_shards() for key in store.seal(shard).objects]
    start = time.perf_counter()
    for _ in store.backend.each(place.get, keys):
        pass
    return time.perf_counter() - start


def train_both(folder: Path, server: S3Server) -> dict[str, Any]:
    """A tiny student from the disk and from the server, where connections are cut meanwhile."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(FIT_ROWS, FIT_FEATURES)).astype(np.float32)
    np.savez(folder / "corpus.npz", x=inputs)
    digests = [xxhash.xxh3_64_intdigest(row.tobytes()) for row in inputs]
    preprocess = Preprocess(kind="array", shape=(FIT_FEATURES,))
    path = write_fit_store(folder / "fit.zarr", folder / "corpus.npz", preprocess, digests)
    url = server.url("fit.zarr")
    upload(path, url)
    weights: list[dict[str, bytes]] = []
    before = server.ask(cut=10, contains="/c/", every=3)["cut"]
    for targets in (str(path), url):
        out = folder / f"run-{len(weights)}"
        student = f"mlp:{FIT_FEATURES}-16-{NUM_CLASSES}"
        fit(FitConfig(targets, str(folder / "corpus.npz"), student, str(out), epochs=2, device="cpu"), quiet=True)
        weights.append({name: values.tobytes() for name, values in load_file(out / "student.safetensors").items()})
    cut = server.ask(cut=0, contains="", every=1)["cut"] - before
    return {"students_are_equal": weights[0] == weights[1], "connections_cut": cut}


def write_fit_store(path: Path, data: Path, preprocess: Preprocess, digests: list[int]) -> Path:
    """A store of random targets of a corpus."""
    from storage.corpus import open_corpus

    corpus = open_corpus(data)
    fields: dict[str, Any] = {
        "num_rows": FIT_ROWS,
        "num_classes": NUM_CLASSES,
        "shard_rows": 500,
        "chunk_rows": 100,
        "encoding": Dense("float16"),
        "temperatures": (1.0,),
        "teacher": {"digest": "00"},
        "corpus": {"kind": corpus.kind, "fingerprint": corpus.fingerprint, "num_samples": FIT_ROWS},
        "preprocess": preprocess.to_json(),
        "class_names": None,
        "has_hard_targets": False,
        "compressor": "none",
        "provenance": {},
    }
    manifest = Manifest(**fields)
    with StoreWriter.open(path, manifest) as writer:
        for shard in writer.owed_shards():
            start, stop = manifest.layout.shard_bounds(shard)
            generator = np.random.default_rng(shard)
            arrays = {}
            for spec in manifest.arrays:
                shape = (stop - start, *spec.row_shape)
                arrays[spec.name] = -generator.random(shape, np.float32).astype(spec.dtype)
            arrays["values"] -= arrays["values"].max(1, keepdims=True)
            arrays["status"] = np.zeros(stop - start, np.uint8)
            arrays["sample_digest"] = np.array(digests[start:stop], np.uint64)
            writer.write_shard(shard, arrays)
        writer.finalize()
    return path


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, and what it gives."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def stream_all(folder: Path, server: S3Server, args: argparse.Namespace) -> dict[str, Any]:
    """Speeds and bytes of the stream from each place."""
    encoding: Encoding = Dense("float16") if args.encoding == "dense" else TopK(args.k)
    path = write_store(folder / "store.zarr", args.rows, encoding)
    url = server.url("store.zarr")
    upload(path, url)
    names = (*(spec.name for spec in encoding.arrays(NUM_CLASSES, 1)), "status", "sample_digest", "hard_target")
    places: dict[str, tuple[str, CacheSettings | None]] = {"disk": (str(path), None), "s3": (url, None)}
    places |= {"http": (server.http(url), None), "cached": (url, CacheSettings(str(folder / "cache"), 1 << 40))}
    stores = {name: open_store(*place) for name, place in places.items()}
    readers = {name: TargetReader(store, names) for name, store in stores.items()}
    streams = {name: epochs(reader, args.batch_size) for name, reader in readers.items()}
    useful = useful_bytes(stores["disk"], names)
    first, digests = {}, {}
    for name, stream in streams.items():
        before = bytes_read(stores[name])
        digests[name] = next(stream)
        first[name] = (bytes_read(stores[name]) - before) / useful
    seconds: dict[str, list[float]] = {name: [] for name in streams}
    moved: dict[str, float] = {}
    same = len(set(digests.values())) == 1
    for _ in range(args.repeats):
        for name, stream in streams.items():
            before = bytes_read(stores[name])
            took, digests[name] = timed(stream.__next__)
            seconds[name].append(took)
            moved[name] = (bytes_read(stores[name]) - before) / useful
        same = same and len(set(digests.values())) == 1
    served = statistics.median(plain_gets(stores["s3"]) for _ in range(args.repeats))
    whole = sum(
        int(it["num_bytes"])
        for shard in stores["s3"].sealed_shards()
        for it in stores["s3"].seal(shard).objects.values()
    )
    for reader in readers.values():
        reader.close()
    report: dict[str, Any] = {"same_rows_in_the_same_order": same, "useful_mb": round(useful / 1e6, 1)}
    report |= {"shards": stores["s3"].layout.num_shards, "chunk_rows": stores["s3"].manifest.chunk_rows}
    for name in streams:
        median = statistics.median(seconds[name])
        report[f"{name}_rows_per_s"] = round(args.rows / median)
        report[f"{name}_mb_per_s"] = round(useful / 1e6 / median, 1)
        if name != "disk":
            report[f"{name}_moved_over_useful_first_epoch"] = round(first[name], 3)
            report[f"{name}_moved_over_useful"] = round(moved[name], 3)
            report[f"{name}_over_disk"] = round(statistics.median(seconds["disk"]) / median, 3)
    report["server_mb_per_s"] = round(whole / 1e6 / served, 1)
    for store in stores.values():
        store.close()
    return report


def main() -> None:
    """Measure, print one JSON object, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=160_000)
    parser.add_argument("--encoding", choices=["dense", "topk"], default="dense")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    args = parser.parse_args()
    server = start_server()
    os.environ.update(server.environment)
    try:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            report: dict[str, Any] = {"rows": args.rows, "encoding": args.encoding, "batch_size": args.batch_size}
            report |= {"requests_at_a_time": THREADS} | stream_all(Path(name), server, args)
            report |= train_both(Path(name), server)
    finally:
        stop_server(server)
    print(json.dumps(report))
    write_result(f"stream_remote_{args.encoding}", report)


if __name__ == "__main__":
    main()
