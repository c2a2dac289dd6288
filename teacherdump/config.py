"""What a run of `teacherdump` is asked to do: one frozen value, checked when it is built. No torch here."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from storage.encodings import Dense, Encoding, TopK
from storage.encodings.values import ValueType
from storage.manifest import Compressor

Combine = Literal["mean-probs", "mean-logits"]
Precision = Literal["fp32", "bf16", "fp16"]
EncodingName = Literal["dense", "topk"]
Resize = Literal["shorter", "stretch"]
Interpolation = Literal["bilinear", "bicubic", "lanczos", "nearest"]

COMBINES: tuple[str, ...] = get_args(Combine)
PRECISIONS: tuple[str, ...] = get_args(Precision)
ENCODINGS: tuple[str, ...] = get_args(EncodingName)
DEFAULT_TEMPERATURES = (1.0, 2.0, 4.0)


@dataclass(frozen=True)
class DumpConfig:
    """One teacher over one corpus into one store.

    Attributes:
        models: model files; more than one is an ensemble.
        data: path of the corpus.
        out: path of the store: `.h5` and `.hdf5` HDF5, else Zarr.
        arch: what weights belong to, such as `mlp:784-1200-1200-10`; None for a file that says it itself.
        combine: how an ensemble's members become one teacher: `mean-probs` (arithmetic, the default) or `mean-logits`
            (geometric); None for one model.
        encoding: `dense` or `topk`.
        k: kept entries of a row, at least 1; with `topk` only.
        temperatures: declared temperatures, above 0, each once; kept ascending.
        values: how a logit is stored: `float16`, `float32` or `uint8`.
        device: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`.
        precision: of matrix products and convolutions: `fp32`, `bf16` or `fp16` (CUDA only).
        batch_size: rows of one forward pass, at least 1; None chooses it, or takes what the store was begun with.
        compile: whether the teacher goes through `torch.compile`.
        limit_samples: rows that this run adds at most, rounded up to whole shards; None for all.
        limit_hours: hours that this run takes at most, in whole shards; None for any.
        limit_bytes: bytes that this run adds at most, in whole shards; None for any.
        corpus_kind: of `data`; None finds it.
        labels: hard targets of `data`, a file; None finds them, `none` leaves them and the class names out.
        array: name of the array in `data`, where it holds several.
        image_size: height and width that the teacher takes, pixels; None where images have one size, and it is that.
        resize: `shorter` (the shorter side, then a centre crop; the default with an image size) or `stretch`.
        shorter_side: pixels of the shorter side before the centre crop; None is the larger of height and width.
        interpolation: of a resize: `bilinear` (the default), `bicubic`, `lanczos` or `nearest`.
        channels: 1 or 3, grey or RGB; None takes what the corpus has.
        scale: factor of every value; None is 1/255 for images and 1 for arrays.
        mean: subtracted after the scale, one number for each channel.
        std: divided by after that, one number for each channel.
        shard_rows: rows of a shard; None chooses it.
        chunk_rows: rows of a chunk; None chooses it.
        compressor: `none` or `zstd`; None is zstd for topk and none for dense.
        readers: threads that read samples, at least 1; None is one for each core, at most 8.
        trust_pickle: whether a file may run code while it is loaded.

    Raises:
        ValueError: an option is out of range, contradicts another, or would be ignored.
    """

    models: tuple[str, ...]
    data: str
    out: str
    arch: str | None = None
    combine: Combine | None = None
    encoding: EncodingName = "dense"
    k: int | None = None
    temperatures: tuple[float, ...] = DEFAULT_TEMPERATURES
    values: ValueType = "float16"
    device: str = "auto"
    precision: Precision = "fp32"
    batch_size: int | None = None
    compile: bool = False
    limit_samples: int | None = None
    limit_hours: float | None = None
    limit_bytes: int | None = None
    corpus_kind: str | None = None
    labels: str | None = None
    array: str | None = None
    image_size: tuple[int, int] | None = None
    resize: Resize | None = None
    shorter_side: int | None = None
    interpolation: Interpolation | None = None
    channels: int | None = None
    scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    shard_rows: int | None = None
    chunk_rows: int | None = None
    compressor: Compressor | None = None
    readers: int | None = None
    trust_pickle: bool = False

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("model: expected at least one, got none; give --model")
        self._check_choices()
        for name in ("batch_size", "limit_samples", "limit_bytes", "shard_rows", "chunk_rows", "readers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.limit_hours is not None and not 0 < self.limit_hours < math.inf:
            raise ValueError(f"limit_hours: expected a number above 0, got {self.limit_hours}")
        if self.combine is not None and len(self.models) == 1:
            raise ValueError(
                f"combine: expected several models, got one with {self.combine}; leave --combine out, or repeat --model"
            )
        if self.encoding == "topk" and self.k is None:
            raise ValueError("k: expected how many entries topk keeps, got none; give --k N")
        if self.encoding != "topk" and self.k is not None:
            raise ValueError(
                f"k: expected none with {self.encoding}, which keeps every class, got {self.k}; leave it out"
            )
        object.__setattr__(self, "temperatures", tuple(sorted({float(value) for value in self.temperatures})))
        if not self.temperatures or any(not 0 < value < math.inf for value in self.temperatures):
            raise ValueError(f"temperatures: expected numbers above 0, got {list(self.temperatures)}")
        self.build_encoding()

    def _check_choices(self) -> None:
        choices = {
            "combine": (None, *COMBINES),
            "precision": PRECISIONS,
            "encoding": ENCODINGS,
            "compressor": (None, *get_args(Compressor)),
            "resize": (None, *get_args(Resize)),
            "interpolation": (None, *get_args(Interpolation)),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}: expected {' or '.join(filter(None, allowed))}, got {value!r}")

    def build_encoding(self) -> Encoding:
        """What is kept of a row."""
        return Dense(self.values) if self.k is None else TopK(self.k, self.values)

    def choose_compressor(self) -> Compressor:
        """`zstd` for topk, whose ids compress well, and `none` for dense, whose values hardly do."""
        return self.compressor or ("zstd" if self.encoding == "topk" else "none")
