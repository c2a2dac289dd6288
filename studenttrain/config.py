"""What a run of `studenttrain fit` is asked to do: one frozen value, checked when it is built."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from storage.backends.cache import CacheSettings
from storage.console import parse_size
from storage.corpus.parquet_columns import Columns
from storage.urls import check_local, is_url
from studenttrain.optim import OPTIMIZERS, OptimizerName
from studenttrain.precision import PRECISIONS, Precision
from studenttrain.schedule import SCHEDULES, Schedule

# Options that say where things lie or how they are computed, not what is computed: these may change on going on.
# The store, the corpora and the weights behind the paths are held to by their digests.
FREE_ON_RESUME = (
    *(
        "targets",
        "data",
        "corpus_kind",
        "labels",
        "array",
        "image_column",
        "label_column",
        "val_data",
        "val_labels",
        "val_targets",
        "init",
        "out",
    ),
    *("tokenizer", "token_dtype", "boundaries", "separator", "text_field"),
    *("device", "compile", "checkpoint_every", "readers", "cache", "cache_size"),
)

DEFAULT_CACHE_SIZE = "10GB"


@dataclass(frozen=True)
class FitConfig:
    """One training of one student on one store.

    Attributes:
        targets: path of the store of soft targets.
        data: path of the corpus that the store was made from; None takes the tokens that the store keeps.
        student: spec of the student, such as `mlp:784-800-800-10`.
        out: folder of the run.
        epochs: passes over the sealed rows; this or `steps`, not both.
        steps: optimizer steps.
        batch_size: rows of one batch over all ranks, at least 1.
        temperature: above 0; None is the largest that the store declares.
        alpha: weight of the soft targets, in [0, 1]; the hard targets weigh 1 - alpha. None is 0.9 where the store has
            hard targets, else 1. At 0 the soft targets are not even read.
        loss: name of the soft loss; `auto` is the one that fits the encoding.
        lr: highest learning rate, above 0.
        seed: of the initial weights, the order of the rows and dropout; from 0 to 2^63 - 1.
        optimizer: `adamw` or `sgd`.
        momentum: of SGD, in [0, 1); None is 0.9. Not for AdamW.
        weight_decay: of matrices and kernels, at least 0.
        schedule: `cosine` falls to 0, `constant` stays.
        warmup_steps: optimizer steps of linear warm-up.
        clip_norm: largest norm of the whole gradient, above 0; None clips nothing.
        accumulate: batches of one optimizer step, at least 1.
        precision: `fp32`, `bf16` or `fp16` (CUDA only) in matrix products.
        ema: decay of the averaged weights, in (0, 1); None averages nothing. Where it is given, the averaged weights
            are those that are validated and exported.
        init: weights to begin with, `.safetensors` or a run; None begins with random ones.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        compile: whether the student goes through `torch.compile`.
        checkpoint_every: `N` (optimizer steps) or `Ns`, `Nm`, `Nh` (time) between checkpoints. One is written at the
            end of each epoch too, where the last is some seconds old.
        corpus_kind: of `data`; None finds it.
        labels: hard targets of `data`, a file; None finds them.
        array: name of the array in `data`, where it holds several.
        image_column: column of encoded images in Parquet files, those of `val_data` too; None finds it.
        label_column: column of class numbers in Parquet files, those of `val_data` too; None finds it.
        val_data: path of a corpus with hard targets for validation after each epoch.
        val_labels: hard targets of `val_data`, a file.
        val_targets: path of a store made from `val_data` by the same teacher: agreement, and the teacher's calibration.
        readers: threads that read samples, at least 1; None is one for each core, at most 8.
        tokenizer: of the student: `bytes`, a `tokenizers` JSON file or a Hugging Face folder. It must be the one that
            the store was made with; for a corpus of text it is needed.
        token_dtype: type of the ids in a `.bin`.
        boundaries: of `data`, `.npy` of the offsets at which documents begin.
        separator: id of the token that ends a document.
        text_field: field of a JSONL line that holds its text; None is `text`.
        cache: folder in which pieces of stores at URLs are kept, for later epochs and runs; several processes may share
            it. None keeps none.
        cache_size: of the cache, such as `10GB`, which None is.
        only_classes: classes, numbers or names with commas between them, whose rows alone are seen; None sees all.
        without_classes: classes whose rows are left out; this or `only_classes`, not both.
        replay: folder of a run whose epochs are seen again, just the shards of each; None sees what is sealed.

    Raises:
        ValueError: an option is out of range, contradicts another, or would be ignored.
    """

    targets: str
    data: str | None
    student: str
    out: str
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 128
    temperature: float | None = None
    alpha: float | None = None
    loss: str = "auto"
    lr: float = 1e-3
    seed: int = 0
    optimizer: OptimizerName = "adamw"
    momentum: float | None = None
    weight_decay: float = 0.0
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    clip_norm: float | None = None
    accumulate: int = 1
    precision: Precision = "fp32"
    ema: float | None = None
    init: str | None = None
    device: str = "auto"
    compile: bool = False
    checkpoint_every: str = "60s"
    corpus_kind: str | None = None
    labels: str | None = None
    array: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    val_data: str | None = None
    val_labels: str | None = None
    val_targets: str | None = None
    readers: int | None = None
    tokenizer: str | None = None
    token_dtype: str | None = None
    boundaries: str | None = None
    separator: int | None = None
    text_field: str | None = None
    cache: str | None = None
    cache_size: str | None = None
    replay: str | None = None
    only_classes: str | None = None
    without_classes: str | None = None

    def __post_init__(self) -> None:
        self._check_ranges()
        if (self.epochs is None) == (self.steps is None):
            got = "neither" if self.epochs is None else "both"
            raise ValueError(f"epochs, steps: expected one of them, got {got}; say how long to train")
        if self.momentum is not None and self.optimizer != "sgd":
            raise ValueError(f"momentum: expected the optimizer sgd, got {self.optimizer}; leave momentum out")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps: expected fewer than the {self.steps} steps, got {self.warmup_steps}")
        if self.val_data is None and self.val_labels is not None:
            raise ValueError("val_labels: expected val_data beside them, got none; give the corpus too")
        if self.replay is not None and Path(self.replay).resolve() == Path(self.out).resolve():
            raise ValueError(f"replay: expected another folder than --out, got '{self.replay}'; give --out a new one")
        if self.only_classes is not None and self.without_classes is not None:
            raise ValueError("only_classes, without_classes: expected one of them, got both; leave one out")
        if self.data is None:
            for name in ("corpus_kind", "labels", "array", "image_column", "label_column", "boundaries"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: expected --data beside it, got none; give the corpus, or leave this out")
        parse_interval(self.checkpoint_every)
        check_local("out", self.out)
        self._check_cache()
        assert self.columns is not None  # built to be checked

    @property
    def columns(self) -> Columns:
        """Which columns of Parquet files are used."""
        return Columns(self.image_column, self.label_column)

    def _check_cache(self) -> None:
        if self.cache is not None:
            check_local("cache", self.cache)
        if self.cache is None and self.cache_size is not None:
            raise ValueError("cache_size: expected --cache beside it, got none; give the cache's folder")
        if self.cache_size is not None:
            try:
                parse_size(self.cache_size)
            except ValueError as error:
                raise ValueError(f"cache_size: {str(error).removeprefix('size: ')}") from None
        if self.cache is not None and not any(is_url(it) for it in (self.targets, self.val_targets) if it is not None):
            raise ValueError(
                f"cache: expected targets at a URL, got '{self.targets}', which are here; leave the cache out"
            )

    @property
    def cache_settings(self) -> CacheSettings | None:
        """The cache of stores at URLs, or None."""
        if self.cache is None:
            return None
        return CacheSettings(self.cache, parse_size(self.cache_size or DEFAULT_CACHE_SIZE))

    def _check_ranges(self) -> None:
        paths = ("targets", "data", "out", "init", "labels", "val_data", "val_labels", "val_targets", "boundaries")
        for name in (*paths, "student", "tokenizer", "replay", "cache", "only_classes", "without_classes"):
            check_not_empty(name, getattr(self, name))
        counts = ("epochs", "steps", "batch_size", "accumulate", "readers")
        _check(self, counts, lambda value: value >= 1, "at least 1")
        _check(self, ("seed",), lambda value: 0 <= value < 2**63, "0 to 2^63 - 1")
        _check(self, ("warmup_steps", "weight_decay"), lambda value: 0 <= value < math.inf, "at least 0")
        _check(self, ("temperature", "lr", "clip_norm"), lambda value: 0 < value < math.inf, "a number above 0")
        _check(self, ("alpha",), lambda value: 0 <= value <= 1, "a number from 0 to 1")
        _check(self, ("momentum",), lambda value: 0 <= value < 1, "a number from 0 to below 1")
        _check(self, ("ema",), lambda value: 0 < value < 1, "a number between 0 and 1")
        _check(self, ("optimizer",), OPTIMIZERS.__contains__, " or ".join(OPTIMIZERS))
        _check(self, ("schedule",), SCHEDULES.__contains__, " or ".join(SCHEDULES))
        _check(self, ("precision",), PRECISIONS.__contains__, ", ".join(PRECISIONS))

    def to_json(self) -> dict[str, Any]:
        """Every option by name, as JSON has it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Interval:
    """A number of steps, or a time; the other is None."""

    steps: int | None
    seconds: float | None

    def is_over(self, steps: int, seconds: float) -> bool:
        """Whether so many steps and seconds make up the interval."""
        return steps >= self.steps if self.steps is not None else seconds >= (self.seconds or 0.0)


def parse_interval(text: str) -> Interval:
    """An interval from `500` (steps), `90s`, `10m` or `2h`.

    Example:
        >>> parse_interval("10m")
        Interval(steps=None, seconds=600.0)
    """
    match = re.fullmatch(r"(\d+)([smh]?)", text.strip())
    if match is None or int(match[1]) == 0:
        raise ValueError(f"checkpoint_every: expected steps as 500, or a time as 90s, 10m or 2h, got {text!r}")
    count, unit = int(match[1]), match[2]
    if not unit:
        return Interval(count, None)
    return Interval(None, float(count * {"s": 1, "m": 60, "h": 3600}[unit]))


def differing_options(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`--option THEN, not NOW` for each option that would change what a run computes."""
    names = [name for name in now if name not in FREE_ON_RESUME and then.get(name) != now[name]]
    return [f"--{name.replace('_', '-')} {_said(then.get(name))}, not {_said(now[name])}" for name in names]


def check_not_empty(name: str, value: str | None) -> None:
    """Refuse an empty text, which would be read as the current folder, where None means that nothing was given.

    Raises:
        ValueError: it is empty.
    """
    if value == "":
        raise ValueError(f"{name}: expected some text, got none; is a variable of your shell empty?")


def _said(value: Any) -> str:
    return "left out" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _check(config: FitConfig, names: tuple[str, ...], holds: Any, expected: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not holds(value):
            raise ValueError(f"{name}: expected {expected}, got {value}")
