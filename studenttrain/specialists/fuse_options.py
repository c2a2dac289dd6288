"""What `studenttrain specialists fuse` is asked for, and what it tells."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from storage.encodings.values import ValueType
from storage.manifest import Compressor
from storage.options import ascending_temperatures, check_choice
from studenttrain.config import check_not_empty
from studenttrain.evaluate import DEFAULT_BATCH_SIZE
from studenttrain.specialists.fusion import DEFAULT_TOLERANCE
from studenttrain.specialists.specialist import Phase


@dataclass(frozen=True)
class FuseOptions:
    """What is fused, and how the new store keeps it; None is as the generalist's store has it.

    Attributes:
        specialists: folder of `studenttrain specialists fit`.
        targets: the generalist's store, finalized.
        data: corpus that the store was made from.
        out: where the new store shall be; its suffix names the backend.
        encoding: `dense` or `topk`.
        k: kept entries, with topk.
        temperatures: that the new store declares.
        values: how a logit is stored; None is float16, or what a dense store has.
        compressor: `none` or `zstd`; None is zstd with topk, else none.
        phase: which specialists, `hard` or `soft`; None is the last phase that they were trained in.
        active_top: how many of the generalist's likeliest classes make a specialist active, at least 1.
        tolerance: the largest gradient that a row's fusion may be left with.
        corpus_kind: None finds it.
        array: name of the array, where there are several.
        image_column: column of encoded images in Parquet files; None finds it.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        batch_size: samples of a batch, at least 1.
        readers: threads that read samples, at least 1; None is one a core, at most 8.

    Raises:
        ValueError: an option is out of range, or would be ignored.
    """

    specialists: str
    targets: str
    data: str
    out: str
    encoding: Literal["dense", "topk"] = "dense"
    k: int | None = None
    temperatures: tuple[float, ...] = ()
    values: ValueType | None = None
    compressor: Compressor | None = None
    phase: Phase | None = None
    active_top: int = 1
    tolerance: float = DEFAULT_TOLERANCE
    corpus_kind: str | None = None
    array: str | None = None
    image_column: str | None = None
    device: str = "auto"
    batch_size: int = DEFAULT_BATCH_SIZE
    readers: int | None = None

    def __post_init__(self) -> None:
        for name in ("specialists", "targets", "data", "out"):
            check_not_empty(name, getattr(self, name))
        for name, allowed in (
            ("encoding", ("dense", "topk")),
            ("values", get_args(ValueType)),
            ("compressor", get_args(Compressor)),
        ):
            check_choice(name, getattr(self, name), allowed)
        if self.encoding == "topk" and self.k is None:
            raise ValueError("k: expected how many entries topk keeps, got none; give --k N")
        if self.encoding == "dense" and self.k is not None:
            raise ValueError(f"k: expected none with dense, got {self.k}; it is of topk: leave it out")
        for name, number in (("batch_size", self.batch_size), ("readers", self.readers), ("k", self.k)):
            if number is not None and number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        object.__setattr__(self, "temperatures", ascending_temperatures(self.temperatures))


@dataclass(frozen=True)
class FuseResult:
    """What was written.

    Attributes:
        path: the new store.
        content_digest: of the new store.
        source_digest: of the generalist's.
        encoding: of the new store, as a JSON object.
        num_rows: its sealed rows.
        num_quarantined: of these, rows without targets.
        num_active: rows with an active specialist, of those that this run wrote.
        num_changed: of these, rows whose top-1 is not the generalist's.
        num_written: rows with targets that this run wrote: all, but where it went on with a store.
        num_bytes: of the new store on the disk.
        residual: largest gradient that the fusion left in a row that this run wrote.
        tolerance: that was asked for.
    """

    path: str
    content_digest: str
    source_digest: str
    encoding: dict[str, Any]
    num_rows: int
    num_quarantined: int
    num_active: int
    num_changed: int
    num_written: int
    num_bytes: int
    residual: float
    tolerance: float
