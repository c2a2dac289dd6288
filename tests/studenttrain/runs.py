"""Small corpora with a teacher's soft targets, and students that learn from them, for the tests of the trainer."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from storage.arrays import STATUS_UNDECODABLE
from storage.corpus import Corpus, Preprocess, default_preprocess, open_corpus, read_batch
from storage.encodings import Dense, Encoding
from storage.manifest import Manifest
from storage.records import QuarantineEntry
from storage.writer import StoreWriter
from studenttrain.checkpoint import CHECKPOINT, load_checkpoint
from studenttrain.config import FitConfig

Array = NDArray[Any]
NUM_FEATURES, NUM_CLASSES = 8, 4
STUDENT = f"mlp:{NUM_FEATURES}-16-{NUM_CLASSES},dropout=0.3"


def write_blobs(path: Path, num_samples: int = 96, seed: int = 0, labels: bool = True) -> Path:
    """A .npz of points around one centre for each class, float32 `x`, and their classes `y`."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(NUM_CLASSES, NUM_FEATURES)) * 1.5
    classes = generator.integers(0, NUM_CLASSES, num_samples)
    points = centres[classes] + generator.normal(size=(num_samples, NUM_FEATURES))
    arrays: dict[str, Any] = {"x": points.astype(np.float32)}
    if labels:
        arrays["y"] = classes
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


def teacher_logits(inputs: Array, num_classes: int = NUM_CLASSES) -> NDArray[np.float32]:
    """What the teacher of the blobs says: closer centres, larger logits. Other inputs get a fixed random linear map."""
    flat = inputs.reshape(len(inputs), -1).astype(np.float64)
    if flat.shape[1] == NUM_FEATURES and num_classes == NUM_CLASSES:
        centres = np.random.default_rng(99).normal(size=(NUM_CLASSES, NUM_FEATURES)) * 1.5
        distances = ((flat[:, None, :] - centres[None]) ** 2).sum(2)
        return np.asarray(-0.5 * distances, np.float32)
    weights = np.random.default_rng(98).normal(size=(flat.shape[1], num_classes))
    logits: NDArray[np.float32] = (flat @ weights).astype(np.float32)
    return logits


def write_targets(
    path: Path,
    corpus: Corpus,
    *,
    encoding: Encoding | None = None,
    temperatures: Sequence[float] = (1.0, 4.0),
    num_classes: int = NUM_CLASSES,
    shard_rows: int = 16,
    shards: Sequence[int] | None = None,
    finalize: bool = True,
    refused: Sequence[int] = (),
    logits: Array | None = None,
    with_hard_targets: bool = True,
    class_names: tuple[str, ...] | None = None,
    teacher: str = "0",
) -> Path:
    """A store of what `teacher_logits` says of a corpus.

    Args:
        path: `.zarr` or `.h5`.
        corpus: what the rows are made from.
        encoding: float32 dense by default.
        temperatures: declared.
        num_classes: classes of the logits.
        shard_rows: an even number.
        shards: those that are sealed; None seals all.
        finalize: whether nothing may be added any more.
        refused: rows in quarantine.
        logits: said instead of `teacher_logits`.
        with_hard_targets: whether the store keeps those of the corpus.
        class_names: instead of those of the corpus.
        teacher: a digit that tells one teacher from another.
    """
    preprocess = default_preprocess(corpus)
    has_hard = with_hard_targets and corpus.hard_targets is not None
    manifest = Manifest(
        num_rows=corpus.num_samples,
        num_classes=num_classes,
        shard_rows=shard_rows,
        chunk_rows=shard_rows // 2,
        encoding=encoding or Dense("float32"),
        temperatures=tuple(temperatures),
        teacher={"digest": teacher * 64, "kind": "weights", "arch": "mlp:1-1", "precision": "fp32"},
        corpus={"kind": corpus.kind, "fingerprint": corpus.fingerprint, "num_samples": corpus.num_samples},
        preprocess=preprocess.to_json(),
        class_names=class_names or corpus.class_names,
        has_hard_targets=has_hard,
        compressor="none",
        provenance={},
    )
    with StoreWriter.open(path, manifest) as writer:
        for shard in writer.owed_shards():
            if shards is None or shard in shards:
                _write_shard(writer, shard, corpus, preprocess, refused, logits)
        if finalize:
            writer.finalize(partial=True)
    return path


def _write_shard(
    writer: StoreWriter,
    shard: int,
    corpus: Corpus,
    preprocess: Preprocess,
    refused: Sequence[int],
    logits: Array | None,
) -> None:
    manifest = writer.manifest
    start, stop = manifest.layout.shard_bounds(shard)
    batch = read_batch(corpus, np.arange(start, stop), preprocess)
    said = teacher_logits(batch.inputs, manifest.num_classes) if logits is None else logits[start:stop]
    arrays = {spec.name: spec.full(stop - start) for spec in manifest.arrays}
    arrays |= manifest.encoding.encode(said, manifest.temperatures)
    arrays["status"][:] = 0
    arrays["sample_digest"][:] = batch.digests_N
    if manifest.has_hard_targets and corpus.hard_targets is not None:
        hard_N = corpus.hard_targets[start:stop]
        arrays["hard_target"][:] = hard_N
        logprobs = Dense("float32").logprobs(Dense("float32").encode(said, (1.0,)), 1.0, (1.0,))
        arrays["hard_target_logprob"][:] = np.take_along_axis(logprobs, np.maximum(hard_N, 0)[:, None], 1)[:, 0]
    mine = [row for row in refused if start <= row < stop]
    for row in mine:
        for spec in manifest.arrays:
            if spec.name not in ("sample_digest", "hard_target"):
                arrays[spec.name][row - start] = spec.fill_value
        arrays["status"][row - start] = STATUS_UNDECODABLE
    writer.write_shard(shard, arrays, [QuarantineEntry(row, corpus.key(row), "refused by the test") for row in mine])


@dataclasses.dataclass(frozen=True)
class Ground:
    """A corpus with its store, and where runs go.

    Attributes:
        folder: holds all.
        data: the corpus.
        targets: the store.
    """

    folder: Path
    data: Path
    targets: Path

    def config(self, out: str = "run", **options: Any) -> FitConfig:
        """Options of a short run on them."""
        given: dict[str, Any] = {"targets": str(self.targets), "data": str(self.data), "out": str(self.folder / out)}
        given |= {"student": STUDENT, "batch_size": 16, "device": "cpu", "readers": 1}
        if "steps" not in options:
            given["epochs"] = 2
        return FitConfig(**given | options)


def make_ground(folder: Path, num_samples: int = 96, labels: bool = True, **store: Any) -> Ground:
    """A corpus of blobs and its store in a folder; options go to `write_targets`."""
    data = write_blobs(folder / "corpus.npz", num_samples, labels=labels)
    targets = write_targets(folder / "targets.zarr", open_corpus(data), **store)
    return Ground(folder, data, targets)


def command(config: FitConfig) -> list[str]:
    """The arguments of `studenttrain fit` that mean the same."""
    words = ["fit"]
    defaults = {field.name: field.default for field in dataclasses.fields(FitConfig)}
    for name, value in config.to_json().items():
        if value is not None and value != defaults[name]:
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def final_state(config: FitConfig) -> dict[str, torch.Tensor]:
    """The weights in a run's checkpoint: the averaged ones too, with `ema.` before their names."""
    checkpoint = load_checkpoint(Path(config.out) / CHECKPOINT)
    averaged = {f"ema.{name}": value for name, value in (checkpoint["ema"] or {}).items()}
    return {**checkpoint["model"], **averaged}


def assert_same_weights(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> None:
    """Two models have the same weights, bit for bit."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def metric_lines(config: FitConfig, kind: str = "train") -> list[dict[str, Any]]:
    """The metrics of a run, of one kind."""
    text = (Path(config.out) / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]
