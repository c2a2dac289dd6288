"""What a run of `teacherdump` is asked to do: one frozen value, checked when it is built. No torch here."""

import math
import re
from dataclasses import dataclass, replace
from typing import Literal, get_args

from storage.corpus.parquet_columns import Columns
from storage.corpus.sequences import SequenceOptions
from storage.encodings import Dense, Encoding, Hidden, Sample, TopK
from storage.encodings.values import ValueType
from storage.manifest import Compressor
from storage.options import ascending_temperatures
from storage.urls import check_local

Combine = Literal["mean-probs", "mean-logits"]
Precision = Literal["fp32", "bf16", "fp16"]
EncodingName = Literal["dense", "topk", "sample", "hidden"]
Resize = Literal["shorter", "stretch"]
Interpolation = Literal["bilinear", "bicubic", "lanczos", "nearest"]

COMBINES: tuple[str, ...] = get_args(Combine)
PRECISIONS: tuple[str, ...] = get_args(Precision)
ENCODINGS: tuple[str, ...] = get_args(EncodingName)
# What stops a run that looks broken; `teacherdump.alarms` says by which signs.
ALARMS = ("undecodable", "not-finite", "constant", "probabilities", "flat", "collapsed", "one-class", "saturated")
ALL_ALARMS = "all"
NOT_OF_RETRY = (
    "limit_samples", "limit_hours", "limit_bytes", "no_alarms", "max_quarantined", "workers", "scheduler",
)  # fmt: skip
DEFAULT_TEMPERATURES = (1.0, 2.0, 4.0)
DEFAULT_TEMPERATURES_OF_TOKENS = (1.0,)  # of sequences, and of draws, which are taken at one


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
        encoding: `dense`, `topk`, `sample` or `hidden`.
        k: kept entries of a row, at least 1; with `topk` only.
        draws: of a row, 1 to 255; with `sample` only.
        seed: of the draws, from 0 to 2^64 - 1; with `sample` only, None is 0.
        temperatures: declared temperatures, above 0, each once; kept ascending. None are 1, 2 and 4, and 1 alone for
            sequences and for `sample`, which takes one.
        values: how a logit, or with `hidden` a hidden state, is stored: `float16` (the default), `float32` or `uint8`;
            not with `sample`.
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
        image_column: column of encoded images in Parquet files; None finds it.
        label_column: column of class numbers in Parquet files; None finds it.
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
        sequence_length: positions of a sequence, of a corpus of tokens or text; None for other corpora.
        tokenizer: `bytes`, a `tokenizers` JSON file or a Hugging Face folder: makes tokens of text, and names those of
            a corpus of tokens.
        token_dtype: type of the ids in a `.bin`.
        boundaries: `.npy` of the offsets at which documents begin.
        separator: id of the token that ends a document.
        text_field: field of a JSONL line that holds its text; None is `text`.
        vocab_size: entries of the vocabulary, where no tokenizer says it; what the teacher's output has behind them is
            cut off.
        store_tokens: whether the tokens are kept beside the targets, so that a student needs no corpus.
        run_log: file to which a line of JSON is added for each shard; `none` writes none; None is `OUT.log.jsonl`
            beside a local store, and none beside one at a URL.
        metrics_port: on which the run gives figures to Prometheus, 0 to 65535; 0 takes a free one; None gives none.
        metrics_host: address of this machine that it listens at; None is 127.0.0.1, for this machine alone.
        no_alarms: names of alarms that are off, or `all`.
        max_quarantined: share of the rows, 0 to 1, that this run may refuse; None for any.
        wait_for_room: hours that a run waits for room on a full disk, at least 0.
        retry_quarantined: a finalized store of which `out` becomes a new version: its refused rows are tried again.
        workers: processes of this machine that dump, one CUDA device each where there are such; None dumps in the
            process itself.
        scheduler: address of a Dask cluster that dumps, such as `tcp://host:8786`; None takes none.

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
    draws: int | None = None
    seed: int | None = None
    temperatures: tuple[float, ...] = ()
    values: ValueType | None = None
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
    image_column: str | None = None
    label_column: str | None = None
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
    sequence_length: int | None = None
    tokenizer: str | None = None
    token_dtype: str | None = None
    boundaries: str | None = None
    separator: int | None = None
    text_field: str | None = None
    vocab_size: int | None = None
    store_tokens: bool = True
    run_log: str | None = None
    metrics_port: int | None = None
    metrics_host: str | None = None
    no_alarms: tuple[str, ...] = ()
    max_quarantined: float | None = None
    wait_for_room: float = 1.0
    retry_quarantined: str | None = None
    workers: int | None = None
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("model: expected at least one, got none; give --model")
        self._check_choices()
        assert self.columns is not None  # built to be checked
        for name in ("batch_size", "limit_samples", "limit_bytes", "shard_rows", "chunk_rows", "readers", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.limit_hours is not None and not 0 < self.limit_hours < math.inf:
            raise ValueError(f"limit_hours: expected a number above 0, got {self.limit_hours}")
        if self.combine is not None and len(self.models) == 1:
            raise ValueError(
                f"combine: expected several models, got one with {self.combine}; leave --combine out, or repeat --model"
            )
        self._check_encoding()
        self._check_sequences()
        self._check_watching()
        self._check_retry()
        self._check_cluster()
        given = self.temperatures or self._default_temperatures()
        object.__setattr__(self, "temperatures", ascending_temperatures(given))
        encoding = self.build_encoding(Hidden(1))
        if isinstance(encoding, Sample):
            encoding.check(1, self.temperatures)

    def _default_temperatures(self) -> tuple[float, ...]:
        is_one = self.encoding == "sample" or self.sequence_length is not None
        return DEFAULT_TEMPERATURES_OF_TOKENS if is_one else DEFAULT_TEMPERATURES

    def _check_encoding(self) -> None:
        """What each encoding needs, and what it would ignore."""
        if self.encoding == "topk" and self.k is None:
            raise ValueError("k: expected how many entries topk keeps, got none; give --k N")
        if self.encoding == "sample" and self.draws is None:
            raise ValueError("draws: expected how many sample takes, got none; give --draws N")
        belongs = {"k": "topk", "draws": "sample", "seed": "sample"}
        for name, encoding in belongs.items():
            value = getattr(self, name)
            if value is not None and self.encoding != encoding:
                raise ValueError(
                    f"{name}: expected none with {self.encoding}, got {value}; it is of {encoding}: leave it out"
                )
        if self.encoding == "sample" and self.values is not None:
            raise ValueError(f"values: expected none with sample, which keeps counts, got {self.values}; leave it out")

    def _check_sequences(self) -> None:
        """Options that say how tokens are read, without the one that says that they are."""
        if self.sequence_length is not None:
            assert self.sequence_options is not None  # built to be checked
            return
        for name in ("tokenizer", "token_dtype", "boundaries", "separator", "text_field", "vocab_size"):
            value = getattr(self, name)
            if value is not None:
                raise ValueError(
                    f"{name}: expected --sequence-length beside it, got none; give it too, or leave this out"
                )
        if not self.store_tokens:
            raise ValueError("store_tokens: expected a corpus of tokens, got no --sequence-length; leave it out")

    def _check_watching(self) -> None:
        """What watches a run, and what stops it."""
        if self.run_log is not None:
            check_local("run_log", self.run_log)
        for name in self.no_alarms:
            if name not in (*ALARMS, ALL_ALARMS):
                raise ValueError(
                    f"no_alarms: expected {', '.join(ALARMS)} or {ALL_ALARMS}, got {name!r}; give one of these"
                )
        if self.max_quarantined is not None and not 0 <= self.max_quarantined <= 1:
            raise ValueError(f"max_quarantined: expected a share from 0 to 1, got {self.max_quarantined}")
        if not 0 <= self.wait_for_room < math.inf:
            raise ValueError(f"wait_for_room: expected hours, 0 or more, got {self.wait_for_room}")
        if self.metrics_port is not None and not 0 <= self.metrics_port <= 65535:
            raise ValueError(f"metrics_port: expected 0 to 65535, got {self.metrics_port}")
        if self.metrics_host is not None and self.metrics_port is None:
            raise ValueError(
                f"metrics_host: expected metrics_port beside it, got {self.metrics_host!r} alone; give --metrics-port"
            )

    def _check_cluster(self) -> None:
        """Who dumps."""
        if self.workers is not None and self.scheduler is not None:
            raise ValueError(
                f"workers: expected none beside a scheduler, whose cluster has its own, got {self.workers}; leave "
                "--workers or --scheduler out"
            )
        if self.scheduler is not None and not re.match(r"(tcp|tls|ws|wss|ucx)://[^/]+:\d{1,5}/?$", self.scheduler):
            raise ValueError(
                f"scheduler: expected an address such as tcp://host:8786, got {self.scheduler!r}; `dask scheduler` "
                "prints it"
            )
        if self.is_on_cluster and self.device.startswith("cuda:"):
            raise ValueError(
                f"device: expected auto, cpu or cuda with several workers, each of which has one device, got "
                f"{self.device}; say which devices with CUDA_VISIBLE_DEVICES"
            )

    @property
    def is_on_cluster(self) -> bool:
        """Whether workers dump, not the process itself."""
        return self.workers is not None or self.scheduler is not None

    def _check_retry(self) -> None:
        """What a new version of a store would ignore: it is written whole, and by this process."""
        for name in NOT_OF_RETRY:
            value = getattr(self, name)
            if self.retry_quarantined is not None and value not in (None, ()):
                raise ValueError(f"{name}: expected none with retry_quarantined, got {value!r}; leave it out")

    @property
    def alarms(self) -> tuple[str, ...]:
        """Names of the alarms that are on."""
        return () if ALL_ALARMS in self.no_alarms else tuple(name for name in ALARMS if name not in self.no_alarms)

    @property
    def sequence_options(self) -> SequenceOptions | None:
        """How a corpus of tokens or text is read; None for other corpora."""
        if self.sequence_length is None:
            return None
        return SequenceOptions(
            length=self.sequence_length,
            tokenizer=self.tokenizer,
            dtype=self.token_dtype,
            boundaries=self.boundaries,
            separator=self.separator,
            text_field=self.text_field,
            vocab_size=self.vocab_size,
        )

    @property
    def columns(self) -> Columns:
        """Which columns of Parquet files are used."""
        return Columns(self.image_column, self.label_column)

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

    def build_encoding(self, hidden: Hidden | None = None) -> Encoding:
        """What is kept of a row.

        Args:
            hidden: what the teacher's head makes of the encoding `hidden`.
        """
        values: ValueType = self.values or "float16"
        if self.encoding == "topk":
            assert self.k is not None
            return TopK(self.k, values)
        if self.encoding == "sample":
            assert self.draws is not None
            return Sample(self.draws, self.seed or 0)
        if self.encoding == "hidden":
            assert hidden is not None
            if values == "uint8":
                raise ValueError(
                    "values: expected float16 or float32 with hidden, got uint8; choose one of these, or leave it out"
                )
            return replace(hidden, values=values)
        return Dense(values)

    def choose_compressor(self) -> Compressor:
        """`zstd` for what compresses well, ids and counts; `none` for values of all classes, which hardly do."""
        return self.compressor or ("zstd" if self.encoding in ("topk", "sample") else "none")
