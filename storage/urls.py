"""What a URL of a store or a corpus may look like; pure."""

import re
from pathlib import Path
from urllib.parse import urlsplit

from storage.errors import PathError

SCHEMES = ("s3", "gs", "az", "abfs", "abfss", "http", "https")


def is_url(path: str | Path) -> bool:
    """Whether a path is a URL.

    Example:
        >>> is_url("s3://bucket/logits.zarr"), is_url("logits.zarr")
        (True, False)
    """
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(path)) is not None


def is_broken_url(path: str) -> bool:
    """Whether a path is most likely meant to be a URL, but lacks a slash.

    Example:
        >>> is_broken_url("s3:/bucket/logits.zarr"), is_broken_url("s3://bucket/logits.zarr")
        (True, False)
    """
    return not is_url(path) and path.lower().startswith(tuple(f"{it}:" for it in SCHEMES))


def check_local(where: str, path: str) -> None:
    """Refuse a URL where a path of this machine is needed: it would become a folder that is called `s3:`.

    Args:
        where: what the path is for, for the message.
        path: as it was given.

    Raises:
        ValueError: it is a URL, or one without its slashes.
    """
    if is_url(path) or is_broken_url(path):
        scheme = path.split(":", 1)[0]
        raise ValueError(f"{where}: expected a path on this machine, got a URL, {scheme}:...; give a path")


def checked_url(url: str) -> str:
    """A URL that may be used, without a slash at its end.

    Raises:
        PathError: a scheme that is not known, no bucket, or something that must not stand in a URL.
    """
    shown = re.sub(r"://[^/@]*@", "://...@", re.split("[?#]", url, maxsplit=1)[0])
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise PathError(f"{shown}: expected a URL, got one that can't be: {error}; check it") from None
    scheme = parts.scheme.lower()
    if scheme == "file":
        raise PathError(f"{shown}: expected a path on this machine, got a file URL; give the path itself")
    if scheme not in SCHEMES:
        raise PathError(f"{shown}: expected one of {', '.join(f'{it}://' for it in SCHEMES)}, got '{scheme}://'")
    user, at, _ = parts.netloc.rpartition("@")
    if at and (":" in user or scheme not in ("abfs", "abfss")):
        raise PathError(
            f"{shown}: expected a URL without a user, got one; put credentials into the environment, such as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if "?" in url or "#" in url:
        raise PathError(
            f"{shown}: expected a URL without ? and #, got one with them; a signed address would lie in manifests and "
            "logs: put credentials into the environment"
        )
    if not parts.netloc:
        raise PathError(f"{shown}: expected a {'host' if scheme in ('http', 'https') else 'bucket'}, got none; name it")
    path = parts.path.strip("/")
    if path:
        checked_key(path, shown)
    return f"{scheme}://{parts.netloc}" + (f"/{path}" if path else "")


def checked_key(key: str, where: str) -> str:
    """A key that stays below the place it is relative to.

    Raises:
        PathError: it does not, or can't be one.
    """
    bad = next((it for it in key.split("/") if it in ("", ".", "..")), None)
    if bad is not None or any(ord(letter) < 32 or ord(letter) == 127 for letter in key) or "\\" in key:
        raise PathError(f"{where}: expected a key without empty, '.' and '..' parts, got {key!r}; give another")
    return key


def split_url(url: str) -> tuple[str, str]:
    """The URL of what holds an object, and the object's name in it.

    Example:
        >>> split_url("s3://bucket/a/x.tar")
        ('s3://bucket/a', 'x.tar')
    """
    url = checked_url(url)
    start = url.index("://") + 3
    parent, slash, name = url[start:].rpartition("/")
    return (url[:start] + parent, name) if slash else (url, "")
