"""Step time of `fit` from topk 64 over the same step from hard targets alone, at a vocabulary of 50,257.

    python -m benchmarks.fit_step [--rounds 5] [--steps 8]

A store of sequences with random targets is written once; then the same student learns from it for a few and for some
more steps, from soft targets (`--alpha 1`) and from hard ones (`--alpha 0`), in turn in each round. The time of a step
is the difference of the two runs over the difference of their steps, so that start-up and checks are not in it.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.result import write_result
from storage.corpus import SequenceOptions, TokenCorpus, default_preprocess, open_corpus, sample_digests
from storage.encodings import TopK
from storage.manifest import Manifest
from storage.sequences import Sequences
from storage.writer import StoreWriter
from studenttrain.config import FitConfig
from studenttrain.train import fit
from teacherdump.sparsify import TeacherRows, build_sparsify

VOCABULARY, LENGTH, BATCH, K = 50_257, 256, 8, 64
STUDENT = "gpt:4x256"


def write_store(folder: Path, num_rows: int) -> Path:
    """Topk targets of random logits for random tokens."""
    generator = np.random.default_rng(0)
    tokens = generator.zipf(1.3, num_rows * LENGTH + 1) % VOCABULARY
    np.save(folder / "tokens.npy", tokens.astype(np.uint32))
    corpus = open_corpus(folder / "tokens.npy", sequence=SequenceOptions(LENGTH, vocab_size=VOCABULARY))
    assert isinstance(corpus, TokenCorpus)
    manifest = Manifest(
        num_rows=num_rows, num_classes=VOCABULARY, shard_rows=num_rows, chunk_rows=1, encoding=TopK(K),
        temperatures=(1.0,), teacher={"digest": "0" * 64}, corpus={"kind": "tokens", "fingerprint": corpus.fingerprint,
        "num_samples": num_rows}, preprocess=default_preprocess(corpus).to_json(), class_names=None,
        has_hard_targets=False, compressor="zstd", provenance={}, sequences=Sequences(LENGTH, True, None, 0),
    )  # fmt: skip
    sparsify = build_sparsify(manifest.encoding, (1.0,))
    arrays = {spec.name: np.zeros((num_rows, *spec.row_shape), spec.dtype) for spec in manifest.arrays}
    samples = corpus.read_rows(np.arange(num_rows))
    arrays["token_ids"][...], arrays["position_ids"][...] = samples[:, 0], samples[:, 1]
    arrays["sample_digest"][...] = sample_digests(corpus, 0, num_rows)
    torch.manual_seed(0)
    for row in range(num_rows):
        found = sparsify(TeacherRows(torch.randn(LENGTH, VOCABULARY) * 3))
        for name, values in found.items():
            if name in arrays:
                arrays[name][row] = values.numpy()
    with StoreWriter.open(folder / "targets.zarr", manifest) as writer:
        writer.write_shard(0, arrays)
        writer.finalize()
    return folder / "targets.zarr"


def seconds(folder: Path, targets: Path, alpha: float, steps: int, number: int) -> float:
    """How long a run takes, from its start to its end."""
    config = FitConfig(
        targets=str(targets), data=None, student=STUDENT, out=str(folder / f"run-{number}"), steps=steps,
        batch_size=BATCH, alpha=alpha, device="cpu", schedule="constant", checkpoint_every="1h",
    )  # fmt: skip
    begin = time.perf_counter()
    fit(config, quiet=True)
    return time.perf_counter() - begin


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    few = 2
    times: dict[str, list[float]] = {"topk": [], "hard": []}
    with tempfile.TemporaryDirectory() as name:
        folder, number = Path(name), 0
        targets = write_store(folder, BATCH * 8)
        for _ in range(options.rounds):
            for kind, alpha in (("topk", 1.0), ("hard", 0.0)):
                took = [seconds(folder, targets, alpha, count, number + count) for count in (few, few + options.steps)]
                times[kind].append((took[1] - took[0]) / options.steps)
                number += 1000
    ratios = [topk / hard for topk, hard in zip(times["topk"], times["hard"], strict=True)]
    figures = {
        "student": STUDENT, "vocabulary": VOCABULARY, "positions_a_step": BATCH * LENGTH, "k": K,
        "step_s": {name: round(statistics.median(values), 3) for name, values in times.items()},
        "topk_over_hard": round(statistics.median(ratios), 3), "ratios": [round(ratio, 3) for ratio in ratios],
    }  # fmt: skip
    print(f"topk {figures['step_s']} s a step, {figures['topk_over_hard']} times hard targets alone")
    write_result("fit_step", figures)


if __name__ == "__main__":
    main()
