"""How fast stored targets are streamed in shuffled batches, over a plain `np.memmap` read of the same values.

    python -m benchmarks.stream                       # uncompressed: at least 0.35 of the plain read
    python -m benchmarks.stream --compressor zstd     # at least 0.8 of the compressor's own decompression

Writes a dense float16 store and a flat file of the same values into a temporary folder, reads both once so that they
lie in the page cache, then reads them in turns: the flat file in order, batch by batch, each into a new array
(`plain`), or all into one buffer (`reused`), or in a shuffled order (`shuffled`); the store through `TargetReader`,
whole epochs, every chunk's checksum checked, all rows shuffled. With zstd it also decompresses all chunks from memory
with as many threads as the stream uses. Prints one JSON object; speeds are in GB/s (10^9) of values, each figure the
median over the repeats.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numcodecs.blosc
import numpy as np

from benchmarks.result import write_result
from storage.arrays import Array
from storage.backends import ZarrBackend
from storage.encodings import Dense
from storage.manifest import Compressor, Manifest
from storage.reader import Store, open_store
from storage.writer import StoreWriter
from studenttrain.order import EpochOrder, choose_block_rows, choose_window_blocks
from studenttrain.window import TargetReader
from teacherdump.plan import choose_layout

CRC_BYTES = 4


def write_store(folder: Path, num_rows: int, num_classes: int, compressor: Compressor) -> Path:
    """A finalized dense float16 store in `folder`, and its values as `values.bin` beside it."""
    encoding = Dense("float16")
    options: dict[str, Any] = {"num_rows": num_rows, "num_classes": num_classes, "encoding": encoding}
    options |= {"temperatures": (1.0,), "teacher": {}, "corpus": {}, "preprocess": {}, "class_names": None}
    options |= {"has_hard_targets": True, "compressor": compressor, "provenance": {}}
    specs = Manifest(**options, shard_rows=1, chunk_rows=1).arrays
    layout = choose_layout(num_rows, specs)
    manifest = Manifest(**options, shard_rows=layout.shard_rows, chunk_rows=layout.chunk_rows)
    generator = np.random.default_rng(0)
    with StoreWriter.open(folder / "store.zarr", manifest) as writer, (folder / "values.bin").open("wb") as flat:
        for shard in writer.owed_shards():
            start, stop = layout.shard_bounds(shard)
            logits = 2.5 * generator.standard_normal((stop - start, num_classes), np.float32)
            arrays = {spec.name: np.zeros((stop - start, *spec.row_shape), spec.dtype) for spec in manifest.arrays}
            arrays["values"] = (logits - logits.max(1, keepdims=True)).astype(np.float16)
            writer.write_shard(shard, arrays)
            flat.write(arrays["values"].data)
        writer.finalize()
    return folder / "store.zarr"


def read_plain(values: Array, batch_size: int) -> None:
    """Read a mapped array in order, a new array for each batch, as a plain reader of `np.memmap` does."""
    for start in range(0, len(values), batch_size):
        np.array(values[start : start + batch_size])


def read_reused(values: Array, batch_size: int) -> None:
    """The same into one buffer, which stays in the processor's cache: nothing is written to memory at all."""
    batch = np.empty((batch_size, *values.shape[1:]), values.dtype)
    for start in range(0, len(values), batch_size):
        part = values[start : start + batch_size]
        batch[: len(part)] = part


def read_shuffled(values: Array, batch_size: int, order: Array) -> None:
    """The same rows in a shuffled order, as a plain training loop over `np.memmap` reads them."""
    for start in range(0, len(values), batch_size):
        values[order[start : start + batch_size]]


def epochs(reader: TargetReader, seed: int, batch_size: int, values: Array) -> Iterator[None]:
    """Stream an epoch at each `next`; the first one is held against the values."""
    store = reader.store
    block_rows = choose_block_rows(store.manifest)
    for epoch in range(1 << 30):
        order = EpochOrder(
            store.layout,
            ((0, store.layout.num_shards),),
            seed,
            epoch,
            block_rows,
            choose_window_blocks(store.manifest, block_rows),
        )
        seen = np.zeros(store.layout.num_rows, np.int64)
        for batch in reader.batches(order, batch_size):
            if epoch == 0:
                seen[batch.rows_N] += 1
                assert np.array_equal(batch.arrays["values"], values[batch.rows_N])
        assert epoch or (seen == 1).all()
        yield


def stored_chunks(store: Store) -> list[Array]:
    """All compressed chunks of the values, in memory."""
    backend, chunks = store.backend, []
    assert isinstance(backend, ZarrBackend)
    for shard in range(store.layout.num_shards):
        data = np.fromfile(backend.path / "values" / "c" / str(shard) / "0", np.uint8)
        num_chunks = store.manifest.shard_rows // store.manifest.chunk_rows
        index = data[-num_chunks * 16 - CRC_BYTES : -CRC_BYTES].view("<u8").reshape(-1, 2)
        offsets = index[: store.layout.num_chunks(shard)].tolist()
        chunks += [data[offset : offset + length - CRC_BYTES] for offset, length in offsets]
    return chunks


def decompress(chunks: list[Array], chunk_bytes: int, num_threads: int) -> None:
    """Decompress all chunks, each thread into a buffer of its own."""

    def some(first: int) -> None:
        buffer = np.empty(chunk_bytes, np.uint8)
        for chunk in chunks[first::num_threads]:
            numcodecs.blosc.decompress(chunk, buffer)

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(some, range(num_threads)))


def timed(run: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Measure, print one JSON object, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--compressor", choices=["none", "zstd"], default="none")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--arrays", nargs="+", default=["values"], help="arrays that the stream reads")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        path = write_store(Path(name), args.rows, args.classes, args.compressor)
        plain = np.memmap(path.with_name("values.bin"), np.float16, "r", shape=(args.rows, args.classes))
        with open_store(path) as store, TargetReader(store, args.arrays) as reader:
            shuffled = np.random.default_rng(0).permutation(args.rows)
            stream = epochs(reader, 0, args.batch_size, plain)
            runs: dict[str, Callable[[], object]] = {
                "plain": lambda: read_plain(plain, args.batch_size),
                "reused": lambda: read_reused(plain, args.batch_size),
                "shuffled": lambda: read_shuffled(plain, args.batch_size, shuffled),
                "stream": lambda: next(stream),
            }
            if args.compressor != "none":
                chunks, chunk_bytes = stored_chunks(store), store.manifest.chunk_rows * args.classes * 2
                runs["decompress"] = lambda: decompress(chunks, chunk_bytes, reader.num_threads)
            for run in runs.values():
                run()
            seconds = [{name: timed(run) for name, run in runs.items()} for _ in range(args.repeats)]
            report = {"rows": args.rows, "classes": args.classes, "batch_size": args.batch_size}
            report |= {"compressor": args.compressor, "arrays": args.arrays, "cores": len(os.sched_getaffinity(0))}
            report |= {"threads": reader.num_threads, "chunk_rows": store.manifest.chunk_rows}
        for run_name in runs:
            speeds = [plain.nbytes / 1e9 / second[run_name] for second in seconds]
            report[f"{run_name}_gb_per_s"] = round(statistics.median(speeds), 2)
        for other in runs:
            if other != "stream":
                ratios = [second[other] / second["stream"] for second in seconds]
                report[f"stream_over_{other}"] = round(statistics.median(ratios), 3)
        print(json.dumps(report))
        write_result(f"stream_{args.compressor}", report)


if __name__ == "__main__":
    main()
