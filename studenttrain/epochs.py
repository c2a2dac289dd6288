"""What a student saw: a line for each epoch in `epochs.jsonl`, durable before the epoch's first step, to be replayed.

The order of an epoch is a function of the seed, the epoch and the shards that were sealed when it began. Where a dump
goes on beside the training, the last of these is a matter of time, so it is written down. With it the same training
can be run again, bit for bit, from the finished store or series.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import click

from storage.errors import NotSealedError, PathError, StudentError
from storage.layout import from_ranges
from storage.reader import Store
from studenttrain.checkpoint import CHECKPOINT, load_checkpoint, write_durably
from studenttrain.checks import check_same_store
from studenttrain.config import FitConfig, differing_options

EPOCHS = "epochs.jsonl"


@dataclass(frozen=True)
class EpochSeen:
    """The rows of one epoch, and their order.

    Attributes:
        epoch: from 0.
        seed: of the order.
        batch_size: rows of a batch over all ranks.
        sealed: the shards of the epoch, as half-open ranges.
        block_rows: rows that stay together until a window is shuffled.
        window_blocks: blocks of a window.
        num_rows: rows of the epoch.
        step: optimizer steps before it.
        total_steps: steps of the whole run, as they were counted when it began: the schedule of the learning rate.
    """

    epoch: int
    seed: int
    batch_size: int
    sealed: tuple[tuple[int, int], ...]
    block_rows: int
    window_blocks: int
    num_rows: int
    step: int
    total_steps: int

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "EpochSeen":
        """The epoch of a JSON object; fields that a later release added are passed over."""
        known = {field.name: value[field.name] for field in fields(cls)}
        sealed = tuple((int(start), int(stop)) for start, stop in known.pop("sealed"))
        return cls(sealed=sealed, **{name: int(number) for name, number in known.items()})


class EpochLog:
    """The epochs of a run, in its folder.

    Args:
        folder: of the run.
        epoch: of the next batch: what was written of it and of later ones is cut off, for it may begin otherwise.
    """

    def __init__(self, folder: Path, epoch: int) -> None:
        self.path = folder / EPOCHS
        self._seen = [seen for seen in read_epochs(self.path) if seen.epoch < epoch]

    def add(self, seen: EpochSeen) -> None:
        """Write an epoch down, durably, if it is not there."""
        if self._seen and self._seen[-1] == seen:
            return
        self._seen.append(seen)
        lines = "".join(json.dumps(asdict(entry)) + "\n" for entry in self._seen)
        write_durably(self.path, lambda file: file.write(lines.encode()))


def read_epochs(path: Path) -> list[EpochSeen]:
    """The epochs in a file, none where there is no file.

    Raises:
        StudentError: a line is no epoch.
    """
    if not path.is_file():
        return []
    try:
        return [EpochSeen.from_json(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, KeyError, TypeError) as error:
        raise StudentError(
            f"{path}: expected a line of JSON for each epoch, got something else ({error}); take another copy"
        ) from error


@dataclass(frozen=True)
class Replay:
    """The epochs of a run that is run again.

    Attributes:
        run: its folder.
        epochs: in order, from 0.
    """

    run: str
    epochs: Sequence[EpochSeen]

    @property
    def block_rows(self) -> int:
        """Rows of a block in all epochs."""
        return self.epochs[0].block_rows

    @property
    def window_blocks(self) -> int:
        """Blocks of a window in all epochs."""
        return self.epochs[0].window_blocks

    def at(self, epoch: int) -> EpochSeen:
        """What was seen in an epoch.

        Raises:
            StudentError: the run did not come so far.
        """
        if epoch >= len(self.epochs):
            raise StudentError(
                f"replay '{self.run}': expected the epoch {epoch} in its {EPOCHS}, got {len(self.epochs)} epochs; give "
                "the --epochs or --steps of that run, or let it go on first"
            )
        return self.epochs[epoch]

    def sealed(self, epoch: int, store: Store) -> list[int]:
        """The shards of an epoch.

        Raises:
            NotSealedError: the store does not have all of them.
        """
        shards = from_ranges(self.at(epoch).sealed)
        missing = sorted(set(shards) - set(store.sealed_shards()))
        if missing:
            raise NotSealedError(
                f"{store.path}: expected shard {missing[0]} sealed, as in epoch {epoch} of the run '{self.run}', got "
                "no seal; give the store, or the series, that the run learned from"
            )
        return shards

    def check(self, now: EpochSeen) -> None:
        """Refuse an epoch that is not just as it was in the run.

        Raises:
            StudentError: it differs; the message says in what.
        """
        then = self.at(now.epoch)
        for field in fields(EpochSeen):
            one, two = getattr(then, field.name), getattr(now, field.name)
            if one != two:
                raise StudentError(
                    f"replay '{self.run}': expected {field.name} {one} in epoch {now.epoch}, as there, got {two}; give "
                    "the options, and the store or series, of that run"
                )


def load_replay(config: FitConfig, store: Store, quiet: bool) -> Replay | None:
    """The run that is run again, or None; options that differ from its own are said.

    Raises:
        PathError: there is no such run.
        MismatchError: it learned from another store or series.
        StudentError: its epochs can't be read, or its batches were others.
    """
    if config.replay is None:
        return None
    folder = Path(config.replay)
    epochs = read_epochs(folder / EPOCHS)
    if not epochs:
        raise PathError(
            f"replay '{folder}': expected the folder of a run with {EPOCHS}, got none there; give a run of studenttrain"
        )
    if [seen.epoch for seen in epochs] != list(range(len(epochs))):
        raise StudentError(
            f"replay '{folder}': expected its epochs from 0 on, got {epochs[0].epoch} first; it was begun by an "
            "earlier release, which wrote none down"
        )
    for name in ("seed", "batch_size"):
        then, now = getattr(epochs[0], name), getattr(config, name)
        if then != now:
            option = name.replace("_", "-")
            raise StudentError(f"replay '{folder}': expected --{option} {then}, as there, got {now}; give that")
    if (folder / CHECKPOINT).is_file():
        checkpoint = load_checkpoint(folder / CHECKPOINT)
        check_same_store(checkpoint["card"]["store"], store)
        different = differing_options({**checkpoint["config"], "replay": config.replay}, config.to_json())
        if different and not quiet:
            click.echo(
                f"note: not as in the run '{folder}', so the weights will be others: {'; '.join(different)}", err=True
            )
    return Replay(config.replay, epochs)
