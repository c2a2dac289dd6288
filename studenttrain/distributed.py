"""The ranks of a run: one alone, or those that `torchrun` started. Only this file talks to `torch.distributed`."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from storage.errors import StudentError

# One rank reads the whole corpus while the others wait; `torchrun` is what notices a rank that died.
LONGEST_WAIT = timedelta(days=2)

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """A rank of how many, and the device that it computes on.

    Attributes:
        rank: from 0.
        size: ranks in the run, at least 1.
        device: of this rank.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a CPU tensor over all ranks, the same on each; over gloo, so that no accelerator has to wait."""
        if self.size > 1:
            values = values.clone()
            with self._errors():
                dist.all_reduce(values)
        return values

    def sum_numbers(self, values: list[int]) -> list[int]:
        """The sums of whole numbers over all ranks, the same on each."""
        return values if self.size == 1 else self.sum(torch.tensor(values)).tolist()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, with its gradients averaged over the ranks where there are several."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)

    def without_sync(self, model: nn.Module, skip: bool) -> contextlib.AbstractContextManager[None]:
        """A context in which backward leaves the gradients to a later one, where `skip` asks for it."""
        if skip and isinstance(model, DistributedDataParallel):
            return model.no_sync()
        return contextlib.nullcontext()

    def gather(self, values: Tensor) -> list[Tensor]:
        """A CPU tensor of every rank, all of one shape, the same list on each."""
        if self.size == 1:
            return [values]
        found = [torch.empty_like(values) for _ in range(self.size)]
        with self._errors():
            dist.all_gather(found, values)
        return found

    def from_main(self, value: T) -> T:
        """A small value of the main rank, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        with self._errors():
            dist.broadcast_object_list(values)
        return values[0]

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Say that it is another rank that stopped, where this one can't reach it any more."""
        try:
            yield
        except RuntimeError as error:
            raise StudentError(
                f"rank {self.rank}: expected all {self.size} ranks to go on, got one that stopped; see its message"
            ) from error

    def main_first(self, act: Callable[[], object]) -> None:
        """Let the main rank do something while the others wait.

        Raises:
            StudentError: on the other ranks, if the main one could not do it; what it raised goes on there.
        """
        if self.is_main:
            try:
                act()
            except BaseException:
                self.sum(torch.ones(1))
                raise
        if self.sum(torch.zeros(1)).item():
            raise StudentError(f"rank {self.rank}: expected rank 0 to go on, got an error there; see its message")


@contextlib.contextmanager
def join_world(device: str) -> Iterator[World]:
    """The world that the environment tells of: `torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK.

    Args:
        device: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        ValueError: the device is unknown or not there, or one CUDA device is named for several ranks.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device)
    if size == 1:
        yield World(0, 1, chosen)
        return
    if chosen.type == "cuda":
        if chosen.index is not None:
            raise ValueError(f"device: expected cuda, one for each of {size} ranks, got {device}; give --device cuda")
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    # two backends: gradients go over nccl, the few numbers that steer the loop over gloo
    backends = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backends, timeout=LONGEST_WAIT)
    try:
        yield World(dist.get_rank(), size, chosen)
    finally:
        dist.destroy_process_group()


def is_main_rank() -> bool:
    """Whether this process is the rank that writes and speaks, by what the environment tells."""
    return os.environ.get("RANK", "0") == "0"


def choose_device(name: str) -> torch.device:
    """The device of a name; `auto` is CUDA where there is one.

    Raises:
        ValueError: no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected one of {torch.cuda.device_count()} CUDA devices, got {name!r}; give --device cpu"
        )
    return device
