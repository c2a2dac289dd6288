"""A closer look at some rows of a store, for the report: what teacher and student say of them, with their pictures.

Legend: N rows, P positions, R flat rows: N, or N * P, C classes, T temperatures, B buckets of classes, K stored ones.
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
from storage.corpus import Corpus, Preprocess, SampleError, load_tokenizer, read_batch
from storage.encodings import Hidden
from storage.reader import Store
from storage.sequences import flatten_positions
from studenttrain.answers import answers, sequence_targets
from studenttrain.figures import EvalFigures, Tally
from studenttrain.loss import target_arrays
from studenttrain.top1 import stored_top1

TEMPERATURES = (1.0, 2.0, 5.0, 10.0, 20.0)
MAX_ROWS = 2000  # flat ones that are looked at; they stand for the rest within a point or so
MAX_VALUES = 1 << 27  # of their logits
CONTEXT_TOKENS = 24  # that are shown before a position
BYTE_VALUES = 256
NUM_VIEWS = 6
MAX_BUCKETS = 10
PICTURE_SIDE = 112


@dataclass(frozen=True)
class SampleView:
    """What teacher and student say of one sample.

    Attributes:
        row: in the store.
        key: of the sample.
        hard_target: name of its true class, or next token, or None.
        entropy: of the teacher at T = 1, nats.
        picture: PNG, or None where the sample is not an image.
        context: the tokens up to a position of a sequence; None of other samples.
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
    context: str | None
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
    manifest, tally = store.manifest, Tally()
    places: list[_Place] = []
    logits: list[Tensor] = []
    num_positions = 1 if manifest.sequences is None else manifest.sequences.num_positions
    most = max(1, min(MAX_ROWS, MAX_VALUES // manifest.num_classes) // num_positions)
    was_training = model.training
    model.eval()
    with torch.inference_mode(), ThreadPoolExecutor(readers) as pool:
        for start, stop in spread_pieces(store, most):
            batch = read_batch(corpus, np.arange(start, stop), preprocess, pool)
            arrays = store.read(["status", "entropy"], start, stop)
            refused = np.zeros(stop - start, bool)
            refused[list(batch.errors)] = True
            good = np.flatnonzero((arrays["status"] == STATUS_OK) & ~refused)
            if not len(good):
                continue
            inputs = torch.from_numpy(batch.inputs[good])
            logits_RC = torch.cat(list(answers(model, inputs.to(device), manifest.num_classes))).float().cpu()
            entropy_R = arrays["entropy"][good].astype(float).reshape(-1)
            top1_R = torch.from_numpy(stored_top1(store, start, stop).reshape(stop - start, -1)[good].reshape(-1))
            hard_R = None
            if manifest.sequences is not None:
                hard_R = sequence_targets(inputs)
            elif hard_targets is not None:
                hard_R = torch.from_numpy(hard_targets[start:stop][good].astype(np.int64))
            shown = np.arange(len(logits_RC))
            if manifest.sequences is not None and hard_R is not None:
                shown = np.flatnonzero(hard_R.numpy() >= 0)  # the others have no target in their document
                logits_RC, hard_R, top1_R = logits_RC[shown], hard_R[shown], top1_R[shown]
            tally.add(logits_RC, hard_R, top1_R)
            known = [None] * len(shown) if hard_R is None else [it if it >= 0 else None for it in hard_R.tolist()]
            for flat, hard in zip(shown.tolist(), known, strict=True):
                row, position = divmod(flat, num_positions)
                places.append(_Place(start + int(good[row]), position, float(entropy_R[flat]), hard))
            logits.append(logits_RC)
    model.train(was_training)
    if not places:
        return Inspection(tally.figures(), ())
    logits_RC = torch.cat(logits)
    chosen = choose_views([place.entropy for place in places], NUM_VIEWS)
    views = [_view(store, corpus, places[index], logits_RC[index]) for index in chosen]
    return Inspection(tally.figures(), tuple(views))


@dataclass(frozen=True)
class _Place:
    """A flat row: of a sample, or of one position of a sequence.

    Attributes:
        row: in the store.
        position: in the sequence; 0 of other samples.
        entropy: of the teacher at T = 1, nats.
        hard_target: its true class, or next token, or None.
    """

    row: int
    position: int
    entropy: float
    hard_target: int | None


def spread_pieces(store: Store, most: int, num_pieces: int = 25) -> list[tuple[int, int]]:
    """Runs of sealed rows, evenly spread over the sealed chunks, at most `most` rows in all."""
    layout = store.layout
    chunks = [(shard, chunk) for shard in store.sealed_shards() for chunk in range(layout.num_chunks(shard))]
    if store.num_sealed_rows <= most:
        return [layout.chunk_bounds(*place) for place in chunks]
    chosen = sorted({int(index) for index in np.linspace(0, len(chunks) - 1, min(num_pieces, most))})
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


def _view(store: Store, corpus: Corpus, place: _Place, logits_C: Tensor) -> SampleView:
    manifest, row = store.manifest, place.row
    temperatures = manifest.encoding.exact_temperatures(manifest.temperatures) or TEMPERATURES
    arrays = flatten_positions(manifest.sequences, store.read([*target_arrays(manifest)], row, row + 1))
    arrays = {name: values[place.position : place.position + 1] for name, values in arrays.items()}
    said = [_stored_probs(store, arrays, temperature) for temperature in temperatures]
    classes = _bucket_classes(*said[0], manifest.num_classes)
    teacher, student = [], []
    for temperature, (ids_K, probs_K) in zip(temperatures, said, strict=True):
        found = dict(zip(ids_K.tolist(), probs_K.tolist(), strict=True))
        teacher.append(_with_rest(np.array([found.get(index, 0.0) for index in classes]), manifest.num_classes))
        probs_C = (logits_C.double() / temperature).softmax(0).numpy()
        student.append(_with_rest(probs_C[classes], manifest.num_classes))
    name = _class_name
    key, context = corpus.key(row), None
    if manifest.sequences is not None:
        name = _token_name if _is_bytes(manifest.sequences.tokenizer) else _class_name
        key, context = f"{key}, position {place.position}", _context(corpus, place, name is _token_name)
    labels = [name(manifest.class_names, index) for index in classes]
    labels += ["rest"] * (len(classes) < manifest.num_classes)
    return SampleView(
        row=row,
        key=key,
        hard_target=None if place.hard_target is None else name(manifest.class_names, place.hard_target),
        entropy=place.entropy,
        picture=picture_of(corpus, row) if context is None else None,
        context=context,
        temperatures=tuple(temperatures),
        labels=tuple(labels),
        teacher_TB=np.stack(teacher),
        student_TB=np.stack(student),
    )


def _stored_probs(store: Store, arrays: dict[str, Array], temperature: float) -> tuple[Array, NDArray[np.float64]]:
    """Classes and their stored probabilities of one flat row; what is left over belongs to the others."""
    manifest, encoding = store.manifest, store.manifest.encoding
    if isinstance(encoding, Hidden):
        logprobs_C = encoding.logprobs(arrays, temperature, manifest.temperatures, store.head())[0]
        return np.arange(manifest.num_classes), np.exp(logprobs_C.astype(np.float64))
    probs_B = np.exp(encoding.logprobs(arrays, temperature, manifest.temperatures)[0].astype(np.float64))
    if "counts" in arrays:
        drawn = np.flatnonzero(arrays["counts"][0])
        return arrays["ids"][0][drawn], probs_B[drawn]
    if "ids" in arrays:
        return arrays["ids"][0], probs_B[:-1]
    return np.arange(manifest.num_classes), probs_B


def _bucket_classes(ids_K: Array, probs_K: NDArray[np.float64], num_classes: int) -> list[int]:
    """The classes that get a bar: all in order where they are few and known, else those that the teacher likes best."""
    if len(ids_K) == num_classes <= MAX_BUCKETS:
        return sorted(ids_K.tolist())
    best: list[int] = ids_K[np.argsort(-probs_K, kind="stable")][: MAX_BUCKETS - 1].tolist()
    return best


def _is_bytes(tokenizer: str | None) -> bool:
    return tokenizer is not None and tokenizer == load_tokenizer("bytes").fingerprint


def _context(corpus: Corpus, place: _Place, is_bytes: bool) -> str:
    """The last tokens up to a position, of its document: as text where they are bytes, else as ids."""
    tokens, positions = corpus.decode(corpus.read_raw(place.row))
    first = max(place.position - min(int(positions[place.position]), CONTEXT_TOKENS - 1), 0)
    shown = tokens[first : place.position + 1].tolist()
    if is_bytes and max(shown) < BYTE_VALUES:
        return bytes(shown).decode("utf-8", "replace")
    return " ".join(map(str, shown))


def _with_rest(probs_B: NDArray[np.float64], num_classes: int) -> NDArray[np.float64]:
    """The bars, and what they leave where some classes have none."""
    if len(probs_B) == num_classes:
        return probs_B
    return np.append(probs_B, max(0.0, 1.0 - float(probs_B.sum())))


def _class_name(names: tuple[str, ...] | None, index: int) -> str:
    name = str(index) if names is None else names[index]
    return name if len(name) <= 14 else name[:13] + "…"


def _token_name(names: tuple[str, ...] | None, index: int) -> str:
    """A byte as what it prints as."""
    del names
    return repr(chr(index))[1:-1].replace(" ", "space") if index < BYTE_VALUES // 2 else f"0x{index:02x}"


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
