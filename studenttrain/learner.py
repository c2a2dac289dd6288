"""The student while it learns: all that changes from step to step, so all that a checkpoint must bring back."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from storage.errors import StoreError, StudentError
from studenttrain.checkpoint import Checkpoint
from studenttrain.config import FitConfig
from studenttrain.distributed import World
from studenttrain.export import load_state
from studenttrain.language import sequence_logits
from studenttrain.optim import build_ema, build_optimizer
from studenttrain.precision import build_scaler

DEFAULT_MOMENTUM = 0.9


@dataclass
class Learner:
    """A student, what moves it, and how far it has come.

    Attributes:
        student: the module itself, on the device.
        trained: the same weights behind `torch.compile` and `DistributedDataParallel`, where these were asked for.
        optimizer: of the student's weights.
        scaler: of the loss, where the precision is fp16.
        ema: the averaged weights, or None.
        step: optimizer steps done.
        num_rows_seen: rows that the student has learned from, over all ranks, a row counted as often as it came; of
            sequences their positions.
        device: of the student.
        num_classes: of the targets: what the student's logits have behind them only pads its vocabulary; None: nothing.
    """

    student: nn.Module
    trained: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None
    step: int = 0
    num_rows_seen: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    num_classes: int | None = None

    @property
    def result(self) -> nn.Module:
        """What is validated and exported: the averaged weights where there are any."""
        return self.student if self.ema is None else self.ema.module

    def update(self) -> None:
        """Take the optimizer step that the gradients ask for, and clear them."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.student)
        self.step += 1

    def idle(self, inputs: Tensor) -> Tensor:
        """A zero that depends on all weights: the part in a step of a rank that has no row in it.

        The other ranks wait for its gradients. It runs one input of zeros in evaluation mode, which leaves the
        averages of normalisation layers as they are.

        Args:
            inputs: of shape (0, ...), or token ids (0, P).
        """
        self.trained.eval()
        zeros = inputs.new_zeros(1, *inputs.shape[1:])
        logits = self.trained(zeros) if zeros.dtype.is_floating_point else sequence_logits(self.trained, zeros[:, :1])
        self.trained.train()
        return 0.0 * logits.float().sum()

    def state(self, world: World) -> Checkpoint:
        """What `restore` takes back. Every rank calls it, and only the first one's is whole."""
        return {
            "step": self.step,
            "num_rows_seen": self.num_rows_seen,
            "model": self.student.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "num_averaged": 0 if self.ema is None else int(self.ema.n_averaged),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": world.gather(torch.get_rng_state()),
            "random_cuda": None if self.device.type != "cuda" else world.gather(torch.cuda.get_rng_state(self.device)),
        }

    def restore(self, checkpoint: Checkpoint, world: World, path: Path) -> None:
        """Go back to where a checkpoint was taken.

        On a CPU, with as many ranks as then, what follows is what would have followed, bit for bit.

        Args:
            checkpoint: as `state` gave it.
            world: the ranks of now.
            path: where it comes from, for messages.

        Raises:
            StudentError: the weights are of another model.
        """
        self.step, self.num_rows_seen = checkpoint["step"], checkpoint["num_rows_seen"]
        load_state(path, self.student, checkpoint["model"])
        if self.ema is not None:
            load_state(path, self.ema.module, checkpoint["ema"])
            self.ema.n_averaged.fill_(checkpoint["num_averaged"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        if len(checkpoint["random"]) != world.size:
            return  # other ranks than then: other dropout, so a generator that is as good as any
        torch.set_rng_state(checkpoint["random"][world.rank])
        if checkpoint["random_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint["random_cuda"][world.rank], self.device)


def build_learner(student: nn.Module, config: FitConfig, world: World, num_classes: int | None = None) -> Learner:
    """A student at the first step, on the world's device, its random numbers seeded for this rank."""
    student.to(world.device).train()
    momentum = DEFAULT_MOMENTUM if config.momentum is None else config.momentum
    optimizer = build_optimizer(student, config.optimizer, config.lr, momentum, config.weight_decay)
    ema = None if config.ema is None else build_ema(student, config.ema)
    trained = cast("nn.Module", torch.compile(student)) if config.compile else student
    if world.size > 1:
        # the ranks began with the same weights; their dropout must not be the same
        torch.manual_seed((config.seed * 65_537 + world.rank + 1) % 2**63)
    return Learner(
        student=student,
        trained=world.wrap(trained),
        optimizer=optimizer,
        scaler=build_scaler(config.precision, world.device),
        ema=ema,
        device=world.device,
        num_classes=num_classes,
    )


@contextlib.contextmanager
def forward_errors(step: int, num_rows: int) -> Iterator[None]:
    """Say in one line what a student's own code made of a batch.

    Raises:
        StudentError: the device has no room for the batch, or the student can't take it.
    """
    try:
        yield
    except (StoreError, NotImplementedError):
        raise
    except torch.OutOfMemoryError as error:
        raise StudentError(
            f"step {step}: expected room on the device for a batch of {num_rows} rows, got none left; give a smaller "
            "--batch-size, and --accumulate to make up for it"
        ) from error
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise StudentError(
            f"step {step}: expected a student that learns from a batch of {num_rows} rows, got {type(error).__name__}: "
            f"{reason}; mend the student, or give another --batch-size"
        ) from error
