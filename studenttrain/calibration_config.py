"""What `studenttrain calibrate` is asked to do: one frozen value, checked when it is built."""

import math
from dataclasses import dataclass
from typing import Literal

from storage.urls import check_local
from studenttrain.config import check_not_empty

Method = Literal["match", "shift"]
METHODS = ("match", "shift")
TemperatureFrom = Literal["none", "labels", "targets"]
TEMPERATURES = ("none", "labels", "targets")
DEFAULT_BATCH_SIZE = 512


@dataclass(frozen=True)
class CalibrationConfig:
    """One calibration of one student.

    Attributes:
        checkpoint: folder of a run, a `.safetensors` file with its card beside it, or a checkpoint.
        data: path of the corpus: for `match` samples as the student will meet them, for `shift` those that it learned
            from. Its labels are read only where the temperature is fitted to them.
        out: folder of the calibrated student.
        prior: share of each class where the student will be used: path of a store, whose mean soft-target mass it is,
            `uniform`, or a `.json` file. None leaves the biases as they are.
        method: `match` finds biases with which the mean mass over `data` meets the prior; `shift` is the closed form
            from the mean mass over `data` to the prior. None is `match`.
        slack: of `match`, at least 0: standard deviations of a share among so many samples that a class may miss its
            share by for a bias of 1; at most three times as many. None is 0 where the prior is that of the very samples
            of `data`, else 1.
        temperature: `none`, `labels` (least loss on the hard targets of `data`) or `targets` (least cross entropy to
            the soft targets of `targets`).
        targets: store made from `data`: for the temperature, and for `shift` of a student that learned from some of
            its rows, which it tells.
        labels: hard targets of `data`, a file, for the temperature; None finds them.
        corpus_kind: of `data`; None finds it.
        array: name of the array in `data`, where it holds several.
        image_column: column of encoded images in Parquet files; None finds it.
        label_column: column of class numbers in Parquet files; None finds it.
        tokenizer: of a corpus of text, or of token ids.
        token_dtype: type of the ids in a `.bin`.
        boundaries: `.npy` of the offsets at which documents begin.
        separator: id of the token that ends a document.
        text_field: field of a JSONL line that holds its text.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        batch_size: samples of a batch, at least 1.
        readers: threads that read samples, at least 1; None is one a core, at most 8.

    Raises:
        ValueError: an option is out of range, contradicts another, or would be ignored.
    """

    checkpoint: str
    data: str
    out: str
    prior: str | None = None
    method: Method | None = None
    slack: float | None = None
    temperature: TemperatureFrom = "none"
    targets: str | None = None
    labels: str | None = None
    corpus_kind: str | None = None
    array: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    tokenizer: str | None = None
    token_dtype: str | None = None
    boundaries: str | None = None
    separator: int | None = None
    text_field: str | None = None
    device: str = "auto"
    batch_size: int = DEFAULT_BATCH_SIZE
    readers: int | None = None

    def __post_init__(self) -> None:
        for name in ("checkpoint", "data", "out", "prior", "targets", "labels"):
            check_not_empty(name, getattr(self, name))
        for name in ("batch_size", "readers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.slack is not None and not 0 <= self.slack < math.inf:
            raise ValueError(f"slack: expected a number of at least 0, got {self.slack:g}")
        if self.method is not None and self.method not in METHODS:
            raise ValueError(f"method: expected {' or '.join(METHODS)}, got {self.method!r}")
        if self.temperature not in TEMPERATURES:
            raise ValueError(f"temperature: expected {', '.join(TEMPERATURES)}, got {self.temperature!r}")
        check_local("out", self.out)
        self._check_together()

    def _check_together(self) -> None:
        if self.prior is None and self.temperature == "none":
            raise ValueError("prior, temperature: expected one of them, or both, got neither; say what to calibrate")
        if self.prior is None and self.method is not None:
            raise ValueError(f"method: expected a prior beside it, got none, so that {self.method} has nothing to do")
        if self.slack is not None and (self.prior is None or self.method == "shift"):
            raise ValueError("slack: expected a prior and the method match beside it, got others; leave it out")
        if self.targets is None and self.temperature == "targets":
            raise ValueError(
                "targets: expected the store whose targets the temperature is fitted to, got none; give it"
            )
        if self.targets is not None and self.temperature != "targets" and self.method != "shift":
            raise ValueError(
                f"targets: expected --temperature targets or --method shift beside it, got neither, so that nothing "
                f"would be read of '{self.targets}'; leave it out"
            )
