"""A student with the teacher live, at the same rows in the same order as `studenttrain fit` sees them: the full KL.

    python -m benchmarks.shakespeare.live --teacher RUN/teacher.pt --arch gpt:4x128 --targets RUN/dense.zarr \
        --student gpt:2x64 --steps 600 --seed 0 --out RUN/live-seed0

It is `studenttrain.train.train` with the teacher where stored targets would be decoded; of the store it takes the
tokens and the order of the rows. Writes the student's weights and card as `fit` does, for `studenttrain eval`.
"""

import argparse
import contextlib
from pathlib import Path

import torch
from torch import Tensor

from storage.corpus.stored import StoredTokens
from storage.reader import open_store
from studenttrain.answers import language_inputs, sequence_targets
from studenttrain.checks import Objective
from studenttrain.config import FitConfig
from studenttrain.distributed import World
from studenttrain.export import export_student
from studenttrain.learner import build_learner
from studenttrain.loss import DenseTargets
from studenttrain.preparation import build_student, prepare
from studenttrain.schedule import learning_rate
from studenttrain.step import LearningBatch, count_rows, train_step
from studenttrain.stream import StudentBatch, TargetStream
from teacherdump.teacher import Teacher, load_teacher


def said(teacher: Teacher, samples: Tensor, num_classes: int) -> Tensor:
    """The teacher's logits of every position, (R, C)."""
    return torch.cat([part.logits_RC for part in teacher.speak_tokens(samples, num_classes)])


def main() -> None:
    """Train the student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "arch", "targets", "student", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    teacher = load_teacher([options.teacher], options.arch, device="cpu")
    world, objective = World(0, 1, torch.device("cpu")), Objective("kl", 1.0, 1.0)
    config = FitConfig(
        targets=options.targets, data=None, student=options.student, out=options.out, steps=options.steps,
        batch_size=options.batch_size, lr=options.lr, seed=options.seed, temperature=1.0, alpha=1.0, device="cpu",
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(open_store(config.targets))
        prepared = prepare(config, store, stack)
        num_classes = store.manifest.num_classes

        def load(batch: StudentBatch) -> LearningBatch:
            samples = torch.from_numpy(batch.inputs)
            targets = DenseTargets.of_logits(said(teacher, samples, num_classes), 1.0)
            counted_R = sequence_targets(samples) >= 0
            token_ids_NP, position_ids_NP = language_inputs(samples)
            targets = DenseTargets(targets.values_NC, counted_R, 1.0)
            return LearningBatch(token_ids_NP, targets, None, position_ids_NP)

        torch.manual_seed(config.seed)
        student = build_student(config, store, prepared.preprocess.shape)
        learner = build_learner(student, config, world, num_classes)
        corpus = StoredTokens(store)
        stream = stack.enter_context(
            TargetStream(store, corpus, prepared.preprocess, config.batch_size, config.seed, readers=1)
        )
        while learner.step < options.steps:
            for batch in stream:
                lr = learning_rate(config.lr, config.schedule, learner.step, options.steps)
                counts = count_rows([batch], objective, None)
                train_step(learner, [batch], load, objective, counts, world, lr=lr)
                if learner.step == options.steps:
                    break
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        export_student(out, student, prepared.card)
        print(f"{learner.step} steps: {out}")


if __name__ == "__main__":
    main()
