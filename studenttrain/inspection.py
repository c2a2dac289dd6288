"""A closer look at some rows of a store, for the report: what teacher and student say of them, with their pictures.

Legend: N rows, C classes, T temperatures, B buckets of classes.
"""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from storage.arrays import STATUS_OK, Array
from storage.corpus import Corpus, Preprocess, SampleError, read_batch
from storage.reader import Store
from studenttrain.figures import EvalFigures, Tally
from studenttrain.loss import target_arrays
from studenttrain.top1 import stored_top1

TEMPERATURES = (1.0, 2.0, 5.0, 10.0, 20.0)
MAX_ROWS = 2000  # that are looked at; they stand for the rest within a point or so
NUM_VIEWS = 6
MAX_BUCKETS = 10
PICTURE_SIDE = 112


@dataclass(frozen=True)
class SampleView:
    """What teacher and student say of one sample.

    Attributes:
        row: in the store.
        key: of the sample.
        hard_target: name of its true class, or None.
        entropy: of the teacher at T = 1, nats.
        picture: PNG, or None where the sample is not an image.
        temperatures: exact in the store.
        labels: of the buckets: a class each, the last one maybe `rest`.
        teacher_TB: probabilities as stored.
        student_TB: probabilities of the student.
    """

    row: int
    key: str
    hard_target: str | None
    entropy: float
    picture: bytes | None
    temperatures: tuple[float, ...]
    labels: tuple[str, ...]
    teacher_TB: NDArray[np.float64]  # noqa: N815
    student_TB: NDArray[np.float64]  # noqa: N815


@dataclass(frozen=True)
class Inspection:
    """What the rows that were looked at show.

    Attributes:
        figures: of the student on them.
        views: a few of them; those where the teacher is least sure first.
    """

    figures: EvalFigures
    views: tuple[SampleView, ...]


def inspect(
    model: nn.Module,
    store: Store,
    corpus: Corpus,
    preprocess: Preprocess,
    hard_targets: NDArray[np.int32] | None,
    device: torch.device,
    readers: int,
) -> Inspection:
    """Try a student on rows that are spread over the sealed ones, and take a closer look at a few.

    Args:
        model: the student, on the device.
        store: the targets, stored from the corpus.
        corpus: its samples.
        preprocess: how a sample becomes the student's input.
        hard_targets: int32 (num_rows,), -1 where unknown; or None.
        device: that the student is on.
        readers: threads that read samples, at least 1.
    """
    tally, rows, entropies, logits = Tally(), [], [], []
    was_training = model.training
    model.eval()
    with torch.inference_mode(), ThreadPoolExecutor(readers) as pool:
        for start, stop in spread_pieces(store, MAX_ROWS):
            batch = read_batch(corpus, np.arange(start, stop), preprocess, pool)
            arrays = store.read(["status", "entropy"], start, stop)
            refused = np.zeros(stop - start, bool)
            refused[list(batch.errors)] = True
            good = np.flatnonzero((arrays["status"] == STATUS_OK) & ~refused)
            if not len(good):
                continue
            logits_NC = model(torch.from_numpy(batch.inputs[good]).to(device)).float().cpu()
            hard_N = None if hard_targets is None else torch.from_numpy(hard_targets[start:stop][good].astype(np.int64))
            tally.add(logits_NC, hard_N, torch.from_numpy(stored_top1(store, start, stop)[good]))
            rows += (start + good).tolist()
            entropies += arrays["entropy"][good].astype(float).tolist()
            logits.append(logits_NC)
    model.train(was_training)
    if not rows:
        return Inspection(tally.figures(), ())
    logits_NC = torch.cat(logits)
    chosen = choose_views(entropies, NUM_VIEWS)
    views = [_view(store, corpus, hard_targets, rows[index], entropies[index], logits_NC[index]) for index in chosen]
    return Inspection(tally.figures(), tuple(views))


def spread_pieces(store: Store, most: int, num_pieces: int = 25) -> list[tuple[int, int]]:
    """Runs of sealed rows, evenly spread over the sealed chunks, at most `most` rows in all."""
    layout = store.layout
    chunks = [(shard, chunk) for shard in store.sealed_shards() for chunk in range(layout.num_chunks(shard))]
    if store.num_sealed_rows <= most:
        return [layout.chunk_bounds(*place) for place in chunks]
    chosen = sorted({int(index) for index in np.linspace(0, len(chunks) - 1, num_pieces)})
    bounds = [layout.chunk_bounds(*chunks[index]) for index in chosen]
    return [(start, min(stop, start + most // len(chosen))) for start, stop in bounds]


def choose_views(entropies: Sequence[float], count: int) -> list[int]:
    """Positions to look at: half of them where the entropy is highest, the others spread over all.

    Example:
        >>> choose_views([0.1, 0.9, 0.2, 0.8, 0.3], 4)
        [1, 3, 0, 4]
    """
    order = sorted(range(len(entropies)), key=lambda index: (-entropies[index], index))
    unsure = order[: -(-count // 2)]
    others = [index for index in range(len(entropies)) if index not in unsure]
    places = np.linspace(0, len(others) - 1, min(count - len(unsure), len(others)))
    return unsure + sorted({others[int(place)] for place in places})


def _view(
    store: Store,
    corpus: Corpus,
    hard_targets: NDArray[np.int32] | None,
    row: int,
    entropy: float,
    logits_C: Tensor,
) -> SampleView:
    manifest = store.manifest
    temperatures = manifest.encoding.exact_temperatures(manifest.temperatures) or TEMPERATURES
    names = [*target_arrays(manifest)]
    arrays = store.read(names, row, row + 1)
    classes = _bucket_classes(arrays, manifest.num_classes)
    teacher, student = [], []
    for temperature in temperatures:
        said_B = np.exp(manifest.encoding.logprobs(arrays, temperature, manifest.temperatures)[0].astype(np.float64))
        kept_B = said_B[: len(classes)] if "ids" in arrays else said_B[classes]
        teacher.append(_with_rest(kept_B, manifest.num_classes))
        probs_C = (logits_C.double() / temperature).softmax(0).numpy()
        student.append(_with_rest(probs_C[classes], manifest.num_classes))
    labels = [_class_name(manifest.class_names, index) for index in classes]
    labels += ["rest"] * (len(classes) < manifest.num_classes)
    known = hard_targets is not None and hard_targets[row] >= 0
    return SampleView(
        row=row,
        key=corpus.key(row),
        hard_target=_class_name(manifest.class_names, int(hard_targets[row]))
        if known and hard_targets is not None
        else None,
        entropy=entropy,
        picture=picture_of(corpus, row),
        temperatures=tuple(temperatures),
        labels=tuple(labels),
        teacher_TB=np.stack(teacher),
        student_TB=np.stack(student),
    )


def _bucket_classes(arrays: dict[str, Array], num_classes: int) -> list[int]:
    """The classes that get a bar: all in order where they are few, else those that the teacher likes best."""
    if "ids" in arrays:
        kept: list[int] = arrays["ids"][0].astype(np.int64).tolist()
        return kept if len(kept) == num_classes <= MAX_BUCKETS else kept[: MAX_BUCKETS - 1]
    if num_classes <= MAX_BUCKETS:
        return list(range(num_classes))
    values_C = arrays["values"][0].astype(np.float32) * (-1.0 if arrays["values"].dtype == np.uint8 else 1.0)
    best: list[int] = np.argsort(-values_C, kind="stable")[: MAX_BUCKETS - 1].tolist()
    return best


def _with_rest(probs_B: NDArray[np.float64], num_classes: int) -> NDArray[np.float64]:
    """The bars, and what they leave where some classes have none."""
    if len(probs_B) == num_classes:
        return probs_B
    return np.append(probs_B, max(0.0, 1.0 - float(probs_B.sum())))


def _class_name(names: tuple[str, ...] | None, index: int) -> str:
    name = str(index) if names is None else names[index]
    return name if len(name) <= 14 else name[:13] + "…"


def picture_of(corpus: Corpus, row: int) -> bytes | None:
    """A sample as PNG, enlarged where it is tiny; None where it is not an image, or can't be read."""
    try:
        sample = corpus.decode(corpus.read_raw(row))
    except SampleError:
        return None
    if sample.ndim == 2 and sample.dtype == np.uint8:
        sample = sample[:, :, None]
    if sample.ndim != 3 or sample.dtype != np.uint8 or sample.shape[2] not in (1, 3):
        return None
    image = Image.fromarray(sample[:, :, 0] if sample.shape[2] == 1 else sample)
    scale = PICTURE_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
