"""Epoch time of `studenttrain fit` over the same loop with samples and targets already in memory: at most 1.05.

    python -m benchmarks.fit_overhead

Writes an IDX file of random 28x28 images and a dense float16 store of it into a temporary folder. Then, in turns:

- some epochs of fit's own loop, which reads, checks and decodes every sample and every target from disk, writes metrics
  of each step, and checkpoints as always: one before the first step, then at the ends of epochs;
- the same steps on batches that were loaded before the clock started.

Both come to the same weights. Prints one JSON object: the median of each, the median of the ratios of neighbours, and
`cpu_ratio`, the same of the processor time of all threads.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.result import write_result
from storage.corpus import default_preprocess, open_corpus, read_batch
from storage.encodings import Dense
from storage.manifest import Manifest
from storage.reader import Store, open_store
from storage.writer import StoreWriter
from studenttrain.checks import data_identity
from studenttrain.config import FitConfig
from studenttrain.distributed import World
from studenttrain.learner import Learner, build_learner
from studenttrain.metrics import MetricsLog
from studenttrain.preparation import build_student, prepare
from studenttrain.schedule import learning_rate
from studenttrain.step import LearningBatch, count_rows, load_batch, train_step
from studenttrain.stream import StudentBatch
from studenttrain.train import Run, open_stream, train

TARGET = 1.05
NUM_CLASSES = 10


def write_ground(folder: Path, num_rows: int) -> tuple[Path, Path]:
    """An IDX file of random images with labels, and a store of random logits for it."""
    generator = np.random.default_rng(0)
    sizes = [num_rows, 28, 28]
    head = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in sizes)
    (folder / "train-images-idx3-ubyte").write_bytes(head + generator.integers(0, 256, sizes, np.uint8).tobytes())
    labels = generator.integers(0, NUM_CLASSES, num_rows, np.uint8)
    head = bytes([0, 0, 8, 1]) + num_rows.to_bytes(4, "big")
    (folder / "train-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    corpus = open_corpus(folder / "train-images-idx3-ubyte")
    preprocess = default_preprocess(corpus)
    manifest = Manifest(
        num_rows=num_rows,
        num_classes=NUM_CLASSES,
        shard_rows=65536,
        chunk_rows=1024,
        encoding=Dense("float16"),
        temperatures=(1.0, 20.0),
        teacher={"digest": "0" * 64, "kind": "weights", "arch": "none", "precision": "fp32"},
        corpus={"kind": corpus.kind, "fingerprint": corpus.fingerprint, "num_samples": num_rows},
        preprocess=preprocess.to_json(),
        class_names=None,
        has_hard_targets=True,
        compressor="none",
        provenance={},
    )
    with StoreWriter.open(folder / "targets.zarr", manifest) as writer:
        for shard in writer.owed_shards():
            start, stop = manifest.layout.shard_bounds(shard)
            arrays = {spec.name: spec.full(stop - start) for spec in manifest.arrays}
            logits = 3 * generator.standard_normal((stop - start, NUM_CLASSES), np.float32)
            arrays |= manifest.encoding.encode(logits, manifest.temperatures)
            arrays["status"][:] = 0
            arrays["sample_digest"][:] = read_batch(corpus, np.arange(start, stop), preprocess).digests_N
            arrays["hard_target"][:] = labels[start:stop]
            arrays["hard_target_logprob"][:] = -1
            writer.write_shard(shard, arrays)
        writer.finalize()
    return folder / "train-images-idx3-ubyte", folder / "targets.zarr"


def prepared_run(config: FitConfig, store: Store, stack: contextlib.ExitStack) -> Run:
    """What `fit` prepares before its loop."""
    prepared = prepare(config, store, stack)
    data = data_identity(prepared.objective, prepared.own_hard_targets, None)
    Path(config.out).mkdir()
    return Run(config, prepared, World(0, 1, torch.device("cpu")), Path(config.out), data, quiet=True)


def new_learner(run: Run) -> Learner:
    """A student at its first step."""
    torch.manual_seed(0)
    student = build_student(run.config, run.prepared.store, run.prepared.preprocess.shape)
    return build_learner(student, run.config, run.world)


def time_fit(run: Run) -> tuple[float, float, Learner]:
    """Wall seconds and CPU seconds of fit's loop, and the student."""
    learner = new_learner(run)
    with open_stream(run) as stream, MetricsLog(run.folder, 0) as metrics:
        start, cpu_start = time.perf_counter(), time.process_time()
        train(run, learner, stream, metrics)
        return time.perf_counter() - start, time.process_time() - cpu_start, learner


def time_memory(run: Run, batches: list[tuple[StudentBatch, LearningBatch]]) -> tuple[float, float, Learner]:
    """The same of the same steps on batches in memory."""
    learner, config, objective = new_learner(run), run.config, run.prepared.objective
    loaded = {id(batch): learning for batch, learning in batches}
    losses = []
    start, cpu_start = time.perf_counter(), time.process_time()
    for batch, _ in batches:
        lr = learning_rate(config.lr, config.schedule, learner.step, len(batches))
        counts = count_rows([batch], objective, None)
        losses.append(
            train_step(learner, [batch], lambda batch: loaded[id(batch)], objective, counts, run.world, lr=lr)
        )
    return time.perf_counter() - start, time.process_time() - cpu_start, learner


def main() -> None:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--student", default="mlp:784-800-800-10")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        data, targets = write_ground(folder, args.rows)
        store = stack.enter_context(open_store(targets))
        options: dict[str, Any] = {"targets": str(targets), "data": str(data), "student": args.student}
        options |= {"epochs": args.epochs, "batch_size": args.batch_size, "temperature": 20.0, "device": "cpu"}
        rounds = []
        for index in range(args.rounds + 1):
            run = prepared_run(FitConfig(**options, out=str(folder / f"run{index}")), store, stack)
            if index == 0:
                manifest, objective = store.manifest, run.prepared.objective
                with open_stream(run) as stream:
                    every = (batch for _ in range(args.epochs) for batch in stream)
                    batches = [(b, load_batch(b, manifest, objective, None, run.world.device)) for b in every]
            fitted, in_memory = time_fit(run), time_memory(run, batches)
            for name, value in fitted[2].student.state_dict().items():
                assert torch.equal(value, in_memory[2].student.state_dict()[name]), "not the same steps"
            if index:  # the first round warms up
                rounds.append((fitted, in_memory))
    figures = {
        "rows": args.rows,
        "epochs": args.epochs,
        "steps_an_epoch": len(batches) // args.epochs,
        "student": args.student,
        "batch_size": args.batch_size,
        "torch_threads": args.threads,
        "rounds": args.rounds,
        "fit_epoch_s": round(statistics.median(fitted[0] for fitted, _ in rounds) / args.epochs, 4),
        "memory_epoch_s": round(statistics.median(memory[0] for _, memory in rounds) / args.epochs, 4),
        "ratio": round(statistics.median(fitted[0] / memory[0] for fitted, memory in rounds), 4),
        "cpu_ratio": round(statistics.median(fitted[1] / memory[1] for fitted, memory in rounds), 4),
        "ratios": [round(fitted[0] / memory[0], 3) for fitted, memory in rounds],
        "target": TARGET,
    }
    print(json.dumps(figures))
    write_result("fit_overhead", figures)


if __name__ == "__main__":
    main()
