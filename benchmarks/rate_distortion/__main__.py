"""Rate and distortion: bytes a token of each encoding against the batch gradient that a student gets from it.

    python -m benchmarks.rate_distortion.prepare --run RUN [--text FILE_OR_FOLDER ...]
    python -m benchmarks.rate_distortion --run RUN

Bytes a token: what a store of the batch takes on the disk, compressed (Blosc zstd level 3 after byte shuffle, in the
chunks that a large dump has), the arrays of the encoding and those that every store keeps; without the JSON, and
without the head of hidden states, which is there once. Distortion: the gradient of the mean loss over a batch that is
held fixed, with respect to all weights of the student, from targets that were written, read back and decoded, against
the gradient of full KD, forward KL at T = 1 to float32 logits: the angle, and the length of the difference over the
length of the true one. An early and a late student; draws are the mean of several seeds.

Then the angles of students between and before these two; those over the positions where the teacher is sure alone; and
the distortion over more and more batches, added up: what chance does shrinks, what is biased stays. Writes
`benchmarks/results/rate_distortion.json` and a picture beside it.
"""

import argparse
import json
import math
import statistics
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.rate_distortion.figure import draw
from benchmarks.rate_distortion.gradients import Distortion, Gradient, batch_gradient, distortion, full_gradient
from benchmarks.rate_distortion.prepare import OTHERS, STUDENTS, TEACHER
from benchmarks.rate_distortion.stores import Batch, Stored, store_batch
from benchmarks.rate_distortion.text import LENGTH, VOCABULARY, held_out_sequences
from benchmarks.rate_distortion.training import load_or_train
from benchmarks.result import RESULTS, write_result
from storage.encodings import Dense, Encoding, Hidden, Sample, TopK
from studenttrain.gpt import GPT
from studenttrain.targets import DenseTargets

KEPT = (4, 8, 12, 24, 50, 128, 256)
DRAWS = (8, 16, 24, 60, 128, 255)
COMPARED = ("tail-bucket", "truncated", "renormalised")
CLAIMED = (12, 50, 128)  # k at which students of several ages are compared
SURE = 0.9  # mass of the 12 largest entries from which a teacher is called sure
SUMMED = (1, 4, 16)  # batches whose gradients are added up
SUMMED_SEQUENCES = 4  # of each of them
SUMMED_WAYS: tuple[tuple[str, Encoding, str], ...] = (
    ("sample 24", Sample(24), "sampled-ce"),
    ("topk 12 float16, tail bucket", TopK(12), "tail-bucket"),
    ("topk 12 float16, renormalised", TopK(12), "renormalised"),
)


@dataclass(frozen=True)
class Curve:
    """An encoding with its losses, each a point of a line of the picture.

    Attributes:
        size: what a point is labelled with.
        encodings: one, or the same with several seeds.
        losses: line of the picture to loss.
    """

    size: str
    encodings: tuple[Encoding, ...]
    losses: dict[str, str]


def curves(num_seeds: int) -> list[Curve]:
    """All that is measured, in order of their lines."""
    found = [Curve(values, (Dense(values),), {"dense, full KL": "kl"}) for values in ("uint8", "float16")]
    found.append(Curve(str(TEACHER.width), (Hidden(TEACHER.width),), {"hidden float16, full KL": "kl"}))
    for k in KEPT:
        losses = {f"topk float16, {loss.replace('-', ' ')}": loss for loss in COMPARED}
        found.append(Curve(str(k), (TopK(k),), losses))
        found.append(Curve(str(k), (TopK(k, "uint8"),), {"topk uint8, tail bucket": "tail-bucket"}))
    for draws in DRAWS:
        seeds = tuple(Sample(draws, seed) for seed in range(num_seeds))
        found.append(Curve(str(draws), seeds, {"sample, sampled cross entropy": "sampled-ce"}))
    return found


def measure(curve: Curve, batch: Batch, students: dict[str, GPT], full: dict[str, Gradient]) -> list[dict[str, Any]]:
    """The points of one encoding."""
    stored: Stored | None = None
    seen: dict[tuple[str, str], list[Distortion]] = {}
    for encoding in curve.encodings:
        stored = store_batch(batch, encoding)
        for line, loss in curve.losses.items():
            for name, student in students.items():
                gradient = batch_gradient(student, batch.sequences_NQ, stored.targets, loss)
                seen.setdefault((line, name), []).append(distortion(gradient, full[name]))
    assert stored is not None
    points = []
    for line, loss in curve.losses.items():
        point: dict[str, Any] = {
            "line": line,
            "size": curve.size,
            "encoding": curve.encodings[0].to_json(),
            "loss": loss,
            "bytes_a_token": round(stored.bytes_a_token, 2),
            "of_the_encoding": round(stored.encoding_bytes, 2),
            **{name: mean_distortion(seen[line, name]) for name in students},
        }
        points.append(point)
        figures = "".join(f"{point[name]['angle']:9.3f} {point[name]['relative_error']:8.4f}" for name in students)
        print(f"{line:<32}{curve.size:>8}{point['bytes_a_token']:>12,.1f}{figures}", flush=True)
    return points


def mean_distortion(found: list[Distortion]) -> dict[str, float]:
    """The mean of each figure over seeds."""
    return {
        option.name: _rounded(statistics.mean(getattr(one, option.name) for one in found))
        for option in fields(Distortion)
    }


def by_age(batch: Batch, students: dict[str, GPT], measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Angles of the tail bucket and the two losses that are there to compare with, for students of more ages."""
    found: dict[str, Any] = {}
    for name in STUDENTS:
        for point in measured:
            if point["encoding"].get("values") == "float16" and point["encoding"].get("k") in CLAIMED:
                found.setdefault(name, {}).setdefault(point["loss"], {})[point["size"]] = point[name]["angle"]
    full = {name: full_gradient(student, batch.sequences_NQ, batch.logits_RC) for name, student in students.items()}
    for k in CLAIMED:
        targets = store_batch(batch, TopK(k)).targets
        for name, student in students.items():
            of_student = found.setdefault(name, {"kl_to_teacher": round(full[name].loss, 3)})
            for loss in COMPARED:
                here = distortion(batch_gradient(student, batch.sequences_NQ, targets, loss), full[name])
                of_student.setdefault(loss, {})[str(k)] = _rounded(here.angle)
    print(json.dumps(found), flush=True)
    return found


def where_sure(batch: Batch, students: dict[str, GPT]) -> dict[str, Any]:
    """Angles over the positions alone where few entries have nearly all of the mass, as those of a large teacher do."""
    sorted_RK = batch.logits_RC.softmax(1).topk(max(CLAIMED)).values
    sure_R = sorted_RK[:, : min(CLAIMED)].sum(1) >= SURE
    dense = DenseTargets.of_logits(batch.logits_RC, 1.0)
    found: dict[str, Any] = {
        "share_of_positions": _rounded(float(sure_R.float().mean())),
        "mean_mass": {str(k): _rounded(float(sorted_RK[sure_R, :k].sum(1).mean())) for k in CLAIMED},
    }
    ways: list[tuple[Encoding, dict[str, str]]] = [
        (TopK(k), {f"topk {k}, {loss}": loss for loss in COMPARED}) for k in CLAIMED
    ]
    ways.append((Sample(24), {"sample 24": "sampled-ce"}))
    true = {
        name: batch_gradient(student, batch.sequences_NQ, replace(dense, valid_N=sure_R), "kl")
        for name, student in students.items()
    }
    found |= {name: {} for name in students}
    for encoding, losses in ways:
        targets = replace(store_batch(batch, encoding).targets, valid_N=sure_R)
        for name, student in students.items():
            for way, loss in losses.items():
                here = distortion(batch_gradient(student, batch.sequences_NQ, targets, loss), true[name])
                found[name][way] = mean_distortion([here])
    print(json.dumps(found), flush=True)
    return found


def summed(teacher: GPT, students: dict[str, GPT], run: Path) -> dict[str, Any]:
    """Distortion of gradients that are added up over more and more batches, against full KD over the same batches.

    `one batch of full KD` tells how far the first batch alone is from all of them: the noise that a step has anyhow.
    """
    sequences_NQ = held_out_sequences(run, max(SUMMED) * SUMMED_SEQUENCES, seed=2)
    totals: dict[tuple[str, str], Gradient] = {}
    first: dict[str, Gradient] = {}
    found: dict[str, Any] = {name: {way: {} for way, _, _ in SUMMED_WAYS} for name in students}
    for number, part_NQ in enumerate(sequences_NQ.split(SUMMED_SEQUENCES)):
        batch = Batch.of(teacher, part_NQ)
        kept = {way: store_batch(batch, reseeded(encoding, number)) for way, encoding, _ in SUMMED_WAYS}
        for name, student in students.items():
            gradients = {"full": full_gradient(student, part_NQ, batch.logits_RC)}
            for way, _, loss in SUMMED_WAYS:
                gradients[way] = batch_gradient(student, part_NQ, kept[way].targets, loss)
            for way, gradient in gradients.items():
                totals[name, way] = totals[name, way] + gradient if number else gradient
            first.setdefault(name, gradients["full"])
            if number + 1 in SUMMED:
                for way, _, _ in SUMMED_WAYS:
                    here = distortion(totals[name, way], totals[name, "full"])
                    found[name][way][str(number + 1)] = mean_distortion([here])
                    print(f"{name}, {number + 1} batches, {way}: {here.angle:.2f}", flush=True)
    for name in students:
        found[name]["one batch of full KD against all"] = {
            "angle": _rounded(distortion(first[name], totals[name, "full"]).angle)
        }
    return {"positions_of_a_batch": SUMMED_SEQUENCES * LENGTH, **found}


def reseeded(encoding: Encoding, seed: int) -> Encoding:
    """The same encoding, draws with another seed: rows are counted from 0 in each batch."""
    return Sample(encoding.draws, seed) if isinstance(encoding, Sample) else encoding


def teacher_figures(batch: Batch, run: Path) -> dict[str, Any]:
    """How the teacher's distribution looks on the batch: entropy in nats, and mass of the largest entries."""
    probs_RC = batch.logits_RC.softmax(1)
    entropy_R = -torch.xlogy(probs_RC, probs_RC).sum(1)
    sorted_RK = probs_RC.topk(max(KEPT)).values
    return {
        **json.loads((run / "teacher.json").read_text()),
        "entropy_mean": round(float(entropy_R.mean()), 3),
        "entropy_median": round(float(entropy_R.median()), 3),
        "top1_median": round(float(sorted_RK[:, 0].median()), 3),
        "mean_mass": {str(k): round(float(sorted_RK[:, :k].sum(1).mean()), 4) for k in KEPT},
    }


def main() -> None:
    """Measure, print, draw, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder that `prepare` filled")
    parser.add_argument("--sequences", type=int, default=32, help=f"of the batch, {LENGTH} positions each")
    parser.add_argument("--seeds", type=int, default=3, help="of the draws")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    teacher = load_or_train(TEACHER, options.run)
    students = {name: load_or_train(recipe, options.run) for name, recipe in STUDENTS.items()}
    batch = Batch.of(teacher, held_out_sequences(options.run, options.sequences))
    figures = teacher_figures(batch, options.run)
    print(json.dumps(figures), flush=True)
    full = {name: full_gradient(student, batch.sequences_NQ, batch.logits_RC) for name, student in students.items()}
    points = [point for curve in curves(options.seeds) for point in measure(curve, batch, students, full)]
    others = {name: load_or_train(recipe, options.run) for name, recipe in OTHERS.items()}
    cards = {name: json.loads((options.run / f"{name}.json").read_text()) for name in students}
    result = {
        "vocabulary": VOCABULARY,
        "text": json.loads((options.run / "text.json").read_text()),
        "positions": options.sequences * LENGTH,
        "seeds_of_draws": options.seeds,
        "torch_threads": options.threads,
        "teacher": figures,
        "students": {name: cards[name] | {"kl_to_teacher": round(full[name].loss, 3)} for name in students},
        "hidden_head_bytes": 4 * teacher.head.weight.numel(),
        "points": points,
        "angles_by_age": by_age(batch, others, points),
        "where_the_teacher_is_sure": where_sure(batch, students),
        "summed_batches": summed(teacher, students, options.run),
    }
    write_result("rate_distortion", result)
    draw(result, RESULTS / "rate_distortion.png")


def _rounded(value: float) -> float:
    """Four digits that count."""
    return 0.0 if value == 0 else round(value, 3 - math.floor(math.log10(abs(value))))


if __name__ == "__main__":
    main()
