"""The manifest: what made a store, written once, before any row."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, Self

from storage.arrays import ArraySpec, common_arrays, float_array
from storage.encodings import Encoding, encoding_from_json
from storage.errors import DamageError, FormatVersionError
from storage.layout import MAX_ROWS, Layout
from storage.sequences import Sequences, at_positions

FORMAT_NAME = "logit-store"
FORMAT_VERSION = (1, 1)  # that is read; each store is of the lowest version that has all that it keeps
OPTIONAL_FIELDS = ("sequences", "lineage")  # of later minor versions: left out of the JSON where they are None
COMBINED = "combined"  # in `extra`: how far the store of an ensemble may be from what its members say together
FUSED = "fused"  # the kind of a teacher that is a generalist and its specialists
FIRST_ROW = "first_row"  # in `corpus`, where the rows are only some of its samples
PER_POSITION = {"per": "position"}  # beside a sequence store's encoding: what makes a reader of 1.0 refuse it
COMPRESSION, TIGHT = "compression", "max"  # in the provenance of a store that was packed tightly
MOST_CHUNK_BYTES = (2 << 30) - 64  # of one array: what Blosc takes
MAX_CLASSES = 1 << 22  # what counts classes takes memory for each, whether or not a row has it

Compressor = Literal["none", "zstd"]


@dataclass(frozen=True)
class Manifest:
    """Who made a store, from what, and how its rows are laid out.

    Attributes:
        num_rows: rows, one for each sample of the corpus, fixed for good.
        num_classes: classes of the teacher's logits.
        shard_rows: rows of a full shard.
        chunk_rows: rows of a full chunk.
        encoding: what is kept of a row.
        temperatures: declared temperatures, ascending; statistics are stored at each.
        teacher: `digest` (sha256), `kind`, `arch`, `precision`, `combine`, `members`.
        corpus: `kind`, `fingerprint` (sha256 of the index), `num_samples`.
        preprocess: how a sample becomes the teacher's input, declared and versioned.
        class_names: names in class order, or None where they are not known.
        has_hard_targets: whether the corpus had true classes.
        compressor: of every chunk: `none`, or `zstd` after byte shuffle.
        provenance: when, where and with which software it was made; not part of what the store says.
        format_version: of the format that the store is written in; None is the lowest that has all that it keeps.
        sequences: what makes its rows sequences; None where a row is one distribution.
        lineage: the stores that its rows were taken from, the first one first; None where a teacher gave them.
        extra: fields of a later minor version, kept as they are.

    Raises:
        ValueError: a field is out of range, or fields contradict each other.
    """

    num_rows: int
    num_classes: int
    shard_rows: int
    chunk_rows: int
    encoding: Encoding
    temperatures: tuple[float, ...]
    teacher: Mapping[str, Any]
    corpus: Mapping[str, Any]
    preprocess: Mapping[str, Any]
    class_names: tuple[str, ...] | None
    has_hard_targets: bool
    compressor: Compressor
    provenance: Mapping[str, Any]
    format_version: str = ""
    sequences: Sequences | None = None
    lineage: tuple[Mapping[str, Any], ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Layout(self.num_rows, self.shard_rows, self.chunk_rows)
        if not self.format_version:
            is_first = self.sequences is None and self.lineage is None and self.encoding.name in ("dense", "topk")
            object.__setattr__(self, "format_version", "1.0" if is_first else "1.1")
        if not isinstance(self.num_classes, int) or not 1 <= self.num_classes <= MAX_CLASSES:
            raise ValueError(f"num_classes: expected 1 to {MAX_CLASSES:,}, got {self.num_classes}")
        if not self.temperatures or any(not 0 < value < float("inf") for value in self.temperatures):
            raise ValueError(f"temperatures: expected numbers above 0, got {list(self.temperatures)}")
        if sorted(set(self.temperatures)) != list(self.temperatures):
            raise ValueError(f"temperatures: expected ascending, each once, got {list(self.temperatures)}")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"class_names: expected one for each of {self.num_classes} classes, got {len(self.class_names)}"
            )
        if self.compressor not in ("none", "zstd"):
            raise ValueError(f"compressor: expected none or zstd, got {self.compressor!r}")
        if self.sequences is not None and (self.has_hard_targets or self.class_names is not None):
            raise ValueError("sequences: expected neither class names nor hard targets beside them, got some")
        self.encoding.check(self.num_classes, self.temperatures)
        largest = max(self.arrays, key=lambda spec: spec.row_bytes)
        if self.chunk_rows * largest.row_bytes > MOST_CHUNK_BYTES:
            raise ValueError(
                f"chunk_rows: expected chunks of at most {MOST_CHUNK_BYTES:,} bytes, got "
                f"{self.chunk_rows * largest.row_bytes:,} in {largest.name!r}; use fewer rows a chunk"
            )

    @property
    def is_packed_tightly(self) -> bool:
        """Whether a writer shall spend as much time on compressing as it takes to save the last bytes.

        It says how a store is written, not what it is: any reader of the compressor reads both.
        """
        return self.provenance.get(COMPRESSION) == TIGHT

    @property
    def is_part(self) -> bool:
        """Whether the rows are only some of the corpus's samples: row r is sample `first_row` + r."""
        return FIRST_ROW in self.corpus

    @property
    def first_row(self) -> int:
        """The sample of the corpus that row 0 is of; 0 but where the store is a part of another."""
        return int(self.corpus.get(FIRST_ROW, 0))

    @cached_property
    def layout(self) -> Layout:
        """How rows are cut into shards and chunks."""
        return Layout(self.num_rows, self.shard_rows, self.chunk_rows)

    @cached_property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """Every array of the store, in the order of their names."""
        return store_arrays(
            self.encoding, self.num_classes, len(self.temperatures), self.has_hard_targets, self.sequences
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of one row before compression, all arrays together."""
        return sum(spec.row_bytes for spec in self.arrays)

    def to_json(self) -> dict[str, Any]:
        """The manifest as a JSON object, `format` and `format_version` first."""
        value: dict[str, Any] = {
            "format": FORMAT_NAME,
            "format_version": self.format_version,
        }
        for option in fields(self):
            value[option.name] = getattr(self, option.name)
        value |= value.pop("extra")
        for name in OPTIONAL_FIELDS:
            if value[name] is None:
                del value[name]
        if self.sequences is not None:
            value["sequences"] = self.sequences.to_json()
        if self.lineage is not None:
            value["lineage"] = [dict(origin) for origin in self.lineage]
        value["encoding"] = self.encoding.to_json() | ({} if self.sequences is None else PER_POSITION)
        value["temperatures"] = [float(temperature) for temperature in self.temperatures]
        value["class_names"] = None if self.class_names is None else list(self.class_names)
        for name in ("teacher", "corpus", "preprocess", "provenance"):
            value[name] = dict(value[name])
        return value

    def identity(self) -> dict[str, Any]:
        """What the store says, without how it is packed or who wrote it when: the manifest's part of the digest.

        `chunk_rows`, `compressor` and `provenance` are left out: a copy packed otherwise says the same.
        """
        value = self.to_json()
        for name in ("provenance", "compressor", "chunk_rows"):
            del value[name]
        return value

    def differences(self, other: Self) -> list[str]:
        """The fields in which another manifest would change what the store holds, with both values."""
        mine, theirs = self.to_json(), other.to_json()
        found = []
        for name in {**mine, **theirs}:
            if name != "provenance" and mine.get(name) != theirs.get(name):
                found += _differences(name, mine.get(name), theirs.get(name))
        return found

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """The manifest of a JSON object.

        Raises:
            FormatVersionError: a newer format version, or not a manifest of this format.
            DamageError: a field is missing or has a value that it can't have.
        """
        if not isinstance(value, Mapping) or value.get("format") != FORMAT_NAME:
            raise FormatVersionError(
                f"manifest: expected the format {FORMAT_NAME!r}, got another; is this a logit store?"
            )
        version = str(value.get("format_version"))
        try:
            major = int(version.split(".", maxsplit=1)[0])
        except ValueError:
            raise DamageError(f"manifest: expected a format version, got {version!r}; take another copy") from None
        if major > FORMAT_VERSION[0]:
            raise FormatVersionError(
                f"manifest: expected format version {FORMAT_VERSION[0]}.x, got {version}; install a newer release"
            )
        try:
            known = {option.name for option in fields(cls)} - {"extra"}
            options = {name: value[name] for name in known if name in value or name not in OPTIONAL_FIELDS}
            options["extra"] = {name: value[name] for name in value if name not in known and name != "format"}
            _check_types(options)
            encoding = dict(options["encoding"])
            if "sequences" in options and {"per": encoding.pop("per", None)} != PER_POSITION:
                raise ValueError('encoding: "per": "position" beside sequences')
            options["encoding"] = encoding_from_json(encoding)
            if "sequences" in options:
                options["sequences"] = Sequences.from_json(options["sequences"])
            if "lineage" in options:
                options["lineage"] = tuple(dict(origin) for origin in options["lineage"])
            options["temperatures"] = tuple(float(temperature) for temperature in options["temperatures"])
            if options["class_names"] is not None:
                options["class_names"] = tuple(str(name) for name in options["class_names"])
            return cls(**options)
        except (KeyError, TypeError, ValueError) as error:
            raise DamageError(f"manifest: expected a valid {error}; take another copy of the store") from error


def _check_types(options: Mapping[str, Any]) -> None:
    """Refuse values of another type than the field's, as JSON that somebody else made may have them."""
    for name in ("teacher", "corpus", "preprocess", "provenance", "encoding"):
        if not isinstance(options[name], Mapping):
            raise TypeError(f"{name}, an object")
    if not isinstance(options["has_hard_targets"], bool):
        raise TypeError("has_hard_targets, true or false")
    for name in ("k", "draws", "seed", "width"):
        if not isinstance(options["encoding"].get(name, 0), int):
            raise TypeError(f"{name} of the encoding, a whole number")
    first_row = options["corpus"].get(FIRST_ROW, 0)
    if not isinstance(first_row, int) or not 0 <= first_row < MAX_ROWS:
        raise TypeError("first_row of the corpus, a whole number")


def store_arrays(
    encoding: Encoding,
    num_classes: int,
    num_temperatures: int,
    has_hard_targets: bool,
    sequences: Sequences | None = None,
) -> tuple[ArraySpec, ...]:
    """Every array of a store, in the order of their names."""
    specs = common_arrays(num_temperatures, has_hard_targets)
    specs += encoding.arrays(num_classes, num_temperatures)
    if sequences is not None:
        specs += (float_array("hard_target_logprob", "float16"),)
        specs = tuple(at_positions(spec, sequences) for spec in specs)
        specs += sequences.arrays(num_classes)
    return tuple(sorted(specs, key=lambda spec: spec.name))


def _differences(name: str, mine: Any, theirs: Any) -> list[str]:
    """`name: the store has mine, this run theirs`, one for each key where both are objects."""
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        keys = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
        return [part for key in keys for part in _differences(f"{name}.{key}", mine.get(key), theirs.get(key))]
    return [f"{name}: the store has {_brief(mine)}, this run {_brief(theirs)}"]


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
