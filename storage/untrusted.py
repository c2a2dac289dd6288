"""JSON and files that somebody else may have made: read in bounded memory, and never through a link.

A store may come from anywhere. Its records are JSON that says how large everything else is, so that nothing that they
say is believed before it was held against a limit.
"""

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage.errors import DamageError

MAX_RECORD_BYTES = 256 << 20
MAX_HEAD_BYTES = 16 << 30  # of a `head/*.npy`, which is no JSON
MAX_RECORD_VALUES = 5_000_000  # each takes some 100 bytes once it is parsed
MAX_DEPTH = 32  # objects and lists in one another; a manifest has about five
NOT_FOLLOWED = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe would be waited for forever


def parse_json(data: bytes, where: str) -> Any:
    """What the bytes of a record say.

    Raises:
        DamageError: no JSON, too much of it, a key that comes twice, or a number that no JSON has.
    """
    check_record_size(len(data), where)
    num_values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if num_values > MAX_RECORD_VALUES:
        raise DamageError(
            f"{where}: expected at most {MAX_RECORD_VALUES:,} values, got more; this is no record of a logit store"
        )
    try:
        value = json.loads(
            data, object_pairs_hook=_once_each, parse_constant=_refuse_constant, parse_float=_finite_float
        )
    except (ValueError, RecursionError):
        raise DamageError(f"{where}: expected JSON, got something else; take another copy of the store") from None
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        raise DamageError(f"{where}: expected JSON, got it nested too deep; take another copy of the store")
    return value


def record_limit(name: str) -> int:
    """Bytes that the record of a name may have at most."""
    return MAX_HEAD_BYTES if name.startswith("head/") else MAX_RECORD_BYTES


def check_record_size(num_bytes: int, where: str, most: int | None = None) -> None:
    """Refuse a record that is too large to be one, before it is read.

    Raises:
        DamageError: it is.
    """
    limit = MAX_RECORD_BYTES if most is None else most
    if num_bytes > limit:
        raise DamageError(f"{where}: expected at most {limit} bytes, got {num_bytes}; this is no logit store")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key comes twice")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is more than a float holds")
    return value


def _is_deeper(value: Any, depth: int) -> bool:
    waiting = [(value, 1)]
    while waiting:
        item, level = waiting.pop()
        if isinstance(item, dict | list):
            if level > depth:
                return True
            members = item.values() if isinstance(item, dict) else item
            waiting.extend((member, level + 1) for member in members if isinstance(member, dict | list))
    return False


def is_count(value: Any) -> bool:
    """Whether a parsed value is a whole number, at least 0, that 64 bits hold."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def check_object_names(objects: Any) -> None:
    """Refuse anything but names inside a store, each with a size and a digest.

    Raises:
        ValueError: it is something else; the message goes on a `expected`.
    """
    if not isinstance(objects, dict):
        raise ValueError("objects by their names")  # noqa: TRY004 - one kind of error for a record that is wrong
    for key, digest in objects.items():
        if any(part in ("", ".", "..") for part in key.split("/")) or "\\" in key or "\0" in key:
            raise ValueError(f"names of objects inside the store, got {key[:80]!r}")
        if (
            not isinstance(digest, Mapping)
            or set(digest) != {"num_bytes", "xxh3_128"}
            or not is_count(digest["num_bytes"])
            or not isinstance(digest["xxh3_128"], str)
        ):
            raise ValueError(f"num_bytes and xxh3_128 of {key[:80]!r}")


def refuse_links(root: Path, path: Path) -> None:
    """Refuse a path that leads out of a store's folder: a link anywhere below the root. The root itself may be one.

    Raises:
        DamageError: there is a link.
    """
    here = root
    for part in path.relative_to(root).parts:
        here = here / part
        try:
            mode = here.lstat().st_mode
        except OSError:
            return  # nothing there, so nothing behind it
        if stat.S_ISLNK(mode):
            raise _is_link(root, here)


def open_inside(root: Path, path: Path, flags: int = os.O_RDONLY, mode: int = 0o666) -> int:
    """A file descriptor of a plain file in a store's folder, opened without following links below the root.

    Raises:
        DamageError: there is a link on the way, or something that is no plain file.
        OSError: as `os.open` says.
    """
    refuse_links(root, path.parent)
    try:
        descriptor = os.open(path, flags | NOT_FOLLOWED, mode)
    except OSError:
        if path.is_symlink():
            raise _is_link(root, path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamageError(
            f"{root}: {path.relative_to(root)}: expected a plain file, got something else; take another copy of the "
            "store"
        )
    return descriptor


def _is_link(root: Path, path: Path) -> DamageError:
    return DamageError(
        f"{root}: {path.relative_to(root)}: expected a file or folder of the store, got a link, which is not followed; "
        "put in its place what it leads to, or take another copy of the store"
    )
