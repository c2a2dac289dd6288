"""How an epoch begins: its rows are fixed, the same on every rank, and written down before its first step."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from storage.errors import StudentError
from studenttrain.config import FitConfig
from studenttrain.distributed import World
from studenttrain.epochs import EpochLog, EpochSeen, Replay
from studenttrain.preparation import Prepared, look_again
from studenttrain.stream import TargetStream

# What one rank sees of a folder, another one sees a little later on a network file system.
LONGEST_LAG_S, LOOK_AGAIN_S = 60.0, 0.2


@dataclass(frozen=True)
class EpochStart:
    """What fixes the rows of a run's epochs.

    Attributes:
        config: the options.
        prepared: what is read.
        world: this rank of how many.
        replay: the run whose epochs are seen again, or None.
        epochs: where they are written down; None on the ranks that write nothing.
    """

    config: FitConfig
    prepared: Prepared
    world: World
    replay: Replay | None
    epochs: EpochLog | None

    def begin(self, step: int, stream: TargetStream) -> None:
        """Fix the shards of the stream's epoch, where it has not begun, and note them; nothing once the run is over.

        Args:
            step: optimizer steps done.
            stream: where the student stands.

        Raises:
            StoreError: what was sealed since does not fit, or a replay does not find what it is to see again.
            ValueError: the warm-up would not end.
        """
        if is_over(self.config, step, stream.epoch):
            return
        if not stream.has_begun:
            stream.begin_epoch(epoch_shards(self.prepared, self.world, self.replay, stream.epoch))
        state = stream.state()
        seen = EpochSeen(
            epoch=stream.epoch,
            seed=stream.seed,
            batch_size=stream.batch_size,
            sealed=tuple((start, stop) for start, stop in state["sealed"]),
            block_rows=state["block_rows"],
            window_blocks=state["window_blocks"],
            num_rows=stream.num_rows,
            step=step - -(-stream.batch // self.config.accumulate),
            total_steps=count_steps(self.config, step, stream),
        )
        if self.replay is not None:
            self.replay.check(seen)
        if self.epochs is not None:
            self.epochs.add(seen)


def epoch_shards(prepared: Prepared, world: World, replay: Replay | None, epoch: int) -> Sequence[int]:
    """The shards of an epoch that begins: those that the main rank finds sealed now, or those of the replay.

    Raises:
        NotSealedError: shards of the replay are not sealed.
        StudentError: this rank does not see so much of a series as the main one.
    """
    store = prepared.store
    mine: tuple[int, ...] = ()
    if world.is_main:
        look_again(prepared)
        mine = tuple(store.sealed_shards() if replay is None else replay.sealed(epoch, store))
    sealed, num_rows = world.from_main((mine, store.manifest.num_rows))
    deadline = time.monotonic() + LONGEST_LAG_S
    while not world.is_main:
        look_again(prepared)
        if store.manifest.num_rows >= num_rows:
            break
        if time.monotonic() > deadline:
            raise StudentError(
                f"rank {world.rank}: expected {num_rows} rows in '{store.path}', as rank 0 sees them, got "
                f"{store.manifest.num_rows}; give every rank the same place"
            )
        time.sleep(LOOK_AGAIN_S)
    return sealed


def is_over(config: FitConfig, step: int, epoch: int) -> bool:
    """Whether so many steps, or epochs, are all of the run."""
    return step >= config.steps if config.steps is not None else epoch >= (config.epochs or 0)


def count_steps(config: FitConfig, step: int, stream: TargetStream) -> int:
    """Optimizer steps of the whole run, if its other epochs are as long as this one.

    Raises:
        ValueError: the warm-up would not end.
    """
    if config.steps is not None:
        return config.steps
    left = -(-(stream.num_batches - stream.batch) // config.accumulate)
    others = (config.epochs or 0) - stream.epoch - 1
    total = step + left + others * -(-stream.num_batches // config.accumulate)
    if config.warmup_steps >= total:
        raise ValueError(
            f"warmup_steps: expected fewer than the {total} steps of the run, got {config.warmup_steps}; warm up less"
        )
    return total
