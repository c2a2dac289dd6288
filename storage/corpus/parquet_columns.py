"""Which columns of a Parquet file are samples, keys and classes, and what the classes are called.

Names follow what the Hugging Face datasets library writes, and the plain files that others write.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from storage.errors import CorpusError

IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")
LABEL_NAMES = ("label", "fine_label")
KEY_NAME = "key"
TEXT_NAME = "text"

# Inside a column of images of the Hugging Face datasets library.
_BYTES = "bytes"


@dataclass(frozen=True)
class Columns:
    """Which columns of Parquet files are used, where it is not left to be found.

    Attributes:
        image: of encoded images.
        label: of class numbers.
    """

    image: str | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("image_column", self.image), ("label_column", self.label)):
            if value == "":
                raise ValueError(f"{name}: expected the name of a column, got nothing; leave it out to have it found")


@dataclass(frozen=True)
class FoundColumns:
    """The columns of a file that are used.

    Attributes:
        image: path of the encoded images, such as `image` or `image.bytes`.
        label: column of class numbers, or None.
        key: column of keys, or None.
        class_names: names in class order, or None where the file does not say them.
    """

    image: str
    label: str | None
    key: str | None
    class_names: tuple[str, ...] | None


def find_columns(schema: Any, columns: Columns, wants_classes: bool, where: str) -> FoundColumns:
    """The columns of images, classes and keys of a schema.

    Args:
        schema: as pyarrow has it.
        columns: what is not left to be found.
        wants_classes: whether class numbers are looked for.
        where: for messages.

    Raises:
        CorpusError: a column is not there or of another type, or it can't be told which one is meant.
    """
    types = {name: _plain(schema.field(name).type) for name in schema.names}
    if len(types) != len(schema.names):
        raise CorpusError(f"{where}: expected columns of different names, got one twice; rename them")
    image = _image_column(types, columns.image, where)
    label = _label_column(types, columns.label, where) if wants_classes else None
    key = KEY_NAME if KEY_NAME in types and (_is_text(types[KEY_NAME]) or _is_integer(types[KEY_NAME])) else None
    names = None if label is None else _class_names(schema.metadata or {}, label)
    return FoundColumns(image, label, key, names)


def find_text(schema: Any, name: str | None, where: str) -> str:
    """The column of texts of a schema.

    Raises:
        CorpusError: there is none, or it is no text.
    """
    name = name or TEXT_NAME
    types = {field: _plain(schema.field(field).type) for field in schema.names}
    if name not in types or not _is_text(types[name]):
        got = str(types[name]) if name in types else f"the columns {_listed(types)}"
        raise CorpusError(f"{where}: expected text in the column {name!r}, got {got}; say which column: --text-field")
    return name


def _image_column(types: Mapping[str, Any], name: str | None, where: str) -> str:
    """The path of the encoded images."""
    if name is not None:
        if name not in types:
            raise CorpusError(f"{where}: expected a column {name!r}, got {_listed(types)}; name one: --image-column")
        path = _image_path(name, types[name])
        if path is None:
            raise CorpusError(
                f"{where}: expected encoded images in the column {name!r}, binary or a struct with binary 'bytes', got "
                f"{types[name]}; name another: --image-column"
            )
        return path
    paths = {name: path for name, type_ in types.items() if (path := _image_path(name, type_)) is not None}
    named = [name for name in IMAGE_NAMES if name in paths]
    chosen = list(paths) if len(paths) == 1 else named[:1] if len(named) == 1 else []
    if not chosen:
        texts = any(map(_is_text, types.values()))
        advice = "say which: --image-column" if paths else "give files that hold one"
        also = ", or for text --sequence-length and --tokenizer" if texts and not paths else ""
        raise CorpusError(
            f"{where}: expected one column of encoded images, got {_listed(paths or types)}; {advice}{also}"
        )
    return paths[chosen[0]]


def _image_path(name: str, type_: Any) -> str | None:
    """The path of the bytes in a column; None where it has none."""
    if _is_binary(type_):
        return name
    if str(type_).startswith("struct<"):
        inner = {type_.field(index).name: type_.field(index).type for index in range(type_.num_fields)}
        if _BYTES in inner and _is_binary(_plain(inner[_BYTES])):
            return f"{name}.{_BYTES}"
    return None


def _label_column(types: Mapping[str, Any], name: str | None, where: str) -> str | None:
    if name is None:
        found = [label for label in LABEL_NAMES if label in types and _is_integer(types[label])]
        if len(found) > 1:
            raise CorpusError(
                f"{where}: expected one column of class numbers, got {_listed(found)}; say which: --label-column, or "
                "none: --labels none"
            )
        return found[0] if found else None
    if name not in types or not _is_integer(types[name]):
        got = str(types[name]) if name in types else _listed(types)
        raise CorpusError(
            f"{where}: expected class numbers, integers, in the column {name!r}, got {got}; name another: "
            "--label-column"
        )
    return name


def _class_names(metadata: Mapping[bytes, bytes], label: str) -> tuple[str, ...] | None:
    """What the classes are called: as the Hugging Face datasets library says it, or in `NAME_names`."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        names = None
    for key in (f"{label}_names", f"{label.removesuffix('_label')}_names"):
        text = metadata.get(key.encode())
        if names is None and text is not None:
            names = _names_of(text)
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def _names_of(text: bytes) -> Any:
    """A JSON list, or what stands between commas."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text.decode("utf-8", "backslashreplace").split(",")


def _plain(type_: Any) -> Any:
    """The type of the values of a column whose equal values are kept once."""
    return type_.value_type if str(type_).startswith("dictionary<") else type_


def _is_binary(type_: Any) -> bool:
    return str(type_) in ("binary", "large_binary", "binary_view")


def _is_text(type_: Any) -> bool:
    return str(type_) in ("string", "large_string", "string_view")


def _is_integer(type_: Any) -> bool:
    return str(type_).removeprefix("u") in ("int8", "int16", "int32", "int64")


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(map(repr, list(names)[:8])) or "none"
