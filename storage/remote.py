"""Objects at a URL: S3, Google, Azure, and HTTP for reading. The only module that knows obstore.

Credentials come from the environment, in each process, and stay inside the library: a place is its URL, and pickles as
that. Every request is tried again until it is answered or `LOGITSTORE_RETRY_S` is over.
"""

import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from storage.errors import DamageError, RemoteError
from storage.remote_environment import (
    AWS_ENDPOINTS,
    AZURE_ENDPOINTS,
    CREDENTIAL_VARIABLES,
    check_environment,
    named_variables,
)
from storage.remote_retry import LostObjectError, is_answer, retried
from storage.urls import checked_key, checked_url, is_url, split_url

if TYPE_CHECKING:
    from obstore.store import ObjectStore

__all__ = ["Entry", "LostObjectError", "Place", "State", "is_url", "open_place", "split_url"]

PART_BYTES = 16 << 20  # more is read and written in parts, so that a cut connection costs no more than one
SMALL_BYTES = 1 << 20
PARALLEL_PARTS = 8
MERGE_BYTES = 4 << 10  # a gap that costs less than a request of its own
CONNECT_TIMEOUT_S, READ_TIMEOUT_S, REQUEST_TIMEOUT_S = 5, 30, 120
PATIENT_TIMEOUT_S = 900  # of a request that carries a shard's array
DELETED_AT_ONCE = 1000


@dataclass(frozen=True)
class Entry:
    """An object that is there.

    Attributes:
        key: relative to the place.
        num_bytes: its size.
        version: what changes when the object does.
    """

    key: str
    num_bytes: int
    version: str


@dataclass(frozen=True)
class State:
    """An object as it was at one moment, to be replaced only if it still is.

    Attributes:
        num_bytes: its size.
        e_tag: what changes with its bytes, or None.
        version: of it, where the storage keeps versions, or None.
    """

    num_bytes: int
    e_tag: str | None
    version: str | None


def open_place(url: str) -> "Place":
    """A place by its URL; nothing is asked of it yet.

    Raises:
        PathError: the URL can't be used.
        RemoteError: the library for it is not installed.
    """
    return Place(checked_url(str(url)))


class Place:
    """Objects below a URL. Threads may share it; it pickles as its URL.

    Attributes:
        url: without a slash at its end.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        parts = urlsplit(url)
        self._root = f"{parts.scheme}://{parts.netloc}"
        self.is_read_only = parts.scheme in ("http", "https")
        path = parts.path.strip("/")
        self._prefix = unquote(path) if self.is_read_only else path  # the library escapes what it is given
        self._counting = threading.Lock()
        self._bytes_read = self._bytes_written = 0
        _ = self._store

    @property
    def _store(self) -> "ObjectStore":
        return self._connection(is_patient=False)

    def _store_for(self, data: bytes) -> "ObjectStore":
        """For a request that carries so much: where it is much, nothing is heard for long."""
        return self._connection(is_patient=len(data) > SMALL_BYTES)

    def _connection(self, is_patient: bool) -> "ObjectStore":
        environment = {name: value for name, value in os.environ.items() if name.startswith(CREDENTIAL_VARIABLES)}
        return _connect(self._root, is_patient, hash(frozenset(environment.items())), os.getpid())

    @property
    def bytes_read(self) -> int:
        """Bytes of objects that came from there so far."""
        return self._bytes_read

    @property
    def bytes_written(self) -> int:
        """Bytes of objects that went there so far."""
        return self._bytes_written

    def _count(self, num_read: int = 0, num_written: int = 0) -> None:
        with self._counting:
            self._bytes_read += num_read
            self._bytes_written += num_written

    def _path(self, key: str) -> str:
        """A key inside the bucket."""
        if not key:
            return self._prefix
        checked_key(key, self.url)
        return f"{self._prefix}/{key}" if self._prefix else key

    def _where(self, key: str) -> str:
        return f"{self.url}/{key}" if key else self.url

    def get(self, key: str, max_bytes: int | None = None) -> bytes | None:
        """An object's bytes, or None where there is none.

        Args:
            key: relative to the URL; "" is the object at the URL itself.
            max_bytes: of the object; a larger one is not read.

        Raises:
            DamageError: the object is larger than that.
            RemoteError: it can't be read.
        """
        found = self.look(key, max_bytes)
        return None if found is None else found[0]

    def look(self, key: str, max_bytes: int | None = None) -> tuple[bytes, State] | None:
        """What `get` gives, with the state of the object that had these bytes."""
        path, where = self._path(key), self._where(key)

        def ask() -> tuple[bytes | None, State]:
            result = self._store.get(path)
            state = _state(result.meta)
            if max_bytes is not None and state.num_bytes > max_bytes:
                raise DamageError(
                    f"{where}: expected at most {max_bytes} bytes, got {state.num_bytes}; this is not what it should be"
                )
            if state.num_bytes > PART_BYTES:
                return None, state
            return _whole(bytes(result.bytes()), state.num_bytes), state

        try:
            data, state = retried(where, ask)
        except FileNotFoundError:
            return None
        if data is None:
            return self.get_range(key, 0, state.num_bytes), state
        self._count(len(data))
        return data, state

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of an object, just as many as that.

        Raises:
            RemoteError: there is no such object, it is shorter, or it can't be read.
        """
        if stop - start <= PART_BYTES:
            return self._get_part(key, start, stop)
        cuts = [*range(start, stop, PART_BYTES), stop]
        with ThreadPoolExecutor(min(PARALLEL_PARTS, len(cuts) - 1), "parts") as pool:
            return b"".join(pool.map(lambda at: self._get_part(key, cuts[at], cuts[at + 1]), range(len(cuts) - 1)))

    def _get_part(self, key: str, start: int, stop: int) -> bytes:
        if not 0 <= start <= stop:
            raise ValueError(f"start, stop: expected 0 <= start <= stop, got {start}, {stop}")
        if start == stop:
            return b""
        path, where = self._path(key), self._where(key)
        try:
            data = retried(where, lambda: bytes(self._store.get_range(path, start=start, end=stop)))
        except FileNotFoundError:
            raise LostObjectError(f"{where}: expected an object, got none; check the URL") from None
        self._count(len(data))
        if len(data) != stop - start:
            raise LostObjectError(
                f"{where}: expected bytes {start} to {stop - 1}, got {len(data)} of them; the object is shorter than "
                "it should be: take another copy"
            )
        return data

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Bytes of each range of an object; ranges that lie close together come with one request.

        Raises:
            RemoteError: as `get_range`.
        """
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(ranges):
            if merged and start - merged[-1][1] <= MERGE_BYTES and stop - merged[-1][0] <= PART_BYTES:
                merged[-1] = merged[-1][0], max(stop, merged[-1][1])
            else:
                merged.append((start, stop))
        if len(merged) == 1:
            pieces = [self.get_range(key, *merged[0])]
        else:
            with ThreadPoolExecutor(min(PARALLEL_PARTS, max(1, len(merged))), "ranges") as pool:
                pieces = list(pool.map(lambda it: self.get_range(key, *it), merged))
        found = []
        for start, stop in ranges:
            at = next(at for at, (low, high) in enumerate(merged) if low <= start and stop <= high)
            low = merged[at][0]
            found.append(pieces[at][start - low : stop - low])
        return found

    def size(self, key: str) -> int | None:
        """Bytes of an object, or None where there is none."""
        state = self.state(key)
        return None if state is None else state.num_bytes

    def state(self, key: str) -> State | None:
        """An object's state, or None where there is none."""
        path = self._path(key)
        try:
            return _state(retried(self._where(key), lambda: self._store.head(path)))
        except FileNotFoundError:
            return None

    def put(self, key: str, data: bytes) -> None:
        """Write an object, over what is there; it appears whole."""
        self.refuse_to_write()
        path, where = self._path(key), self._where(key)
        is_large = len(data) > PART_BYTES
        try:
            retried(where, lambda: self._store_for(data).put(path, data, use_multipart=is_large, chunk_size=PART_BYTES))
        except FileNotFoundError:
            raise self._no_bucket(where) from None
        self._count(num_written=len(data))

    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object if there is none.

        Returns:
            False where there is another one; True where there is one of the same bytes too: it may be this one, written
            by a request whose answer was lost.
        """
        return self._put_if(key, data, "create")

    def put_over(self, key: str, data: bytes, state: State) -> bool:
        """Write an object over the one that had a state, if it still has it.

        Returns:
            False where it has not; True where what is there has the same bytes, as in `put_new`.
        """
        mode: Any = {name: value for name in ("e_tag", "version") if (value := getattr(state, name)) is not None}
        return self._put_if(key, data, mode)

    def _put_if(self, key: str, data: bytes, mode: Any) -> bool:
        self.refuse_to_write()
        path, where = self._path(key), self._where(key)

        def ask() -> bool:
            try:
                self._store_for(data).put(path, data, mode=mode, use_multipart=False)
            except FileNotFoundError:
                if mode == "create":
                    raise
                return False  # what was to be replaced is gone
            except Exception as error:
                if not is_answer(error):
                    raise
                there = self.state(key)
                if there is None and mode == "create":  # two at once, and neither came through; or it was just deleted
                    raise TimeoutError("kind: Request") from None
                return there is not None and self._holds(key, there, data)
            self._count(num_written=len(data))
            return True

        try:
            return retried(where, ask)
        except FileNotFoundError:
            raise self._no_bucket(where) from None

    def _holds(self, key: str, state: State, data: bytes) -> bool:
        """Whether an object has just these bytes; it is read only where its state does not tell."""
        if state.num_bytes != len(data):
            return False
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        return (state.e_tag or "").strip('"') == digest or self.get(key) == data

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """The objects below a prefix, which is whole parts of a key, by key where the storage sorts them.

        Raises:
            RemoteError: the storage can't list, or did not answer.
        """
        if self.is_read_only:
            raise RemoteError(
                f"{self.url}: expected a storage that can list objects, got HTTP; name each object, or use s3://, "
                "gs:// or az://"
            )
        below = self._path(prefix) if prefix else self._prefix
        skip, last = len(self._prefix) + 1 if self._prefix else 0, ""
        while True:
            page = retried(self._where(prefix), partial(self._page, below, last))
            for meta in page:
                version = str(meta["e_tag"] or meta["version"] or meta["last_modified"].isoformat())
                yield Entry(meta["path"][skip:], int(meta["size"]), version)
            if not page:
                return
            last = page[-1]["path"]

    def _page(self, below: str, last: str) -> Sequence[Any]:
        """Some objects behind one, so that a listing that was cut off goes on where it was."""
        try:
            for page in self._store.list(below or None, offset=last or None, chunk_size=1000):
                return page
        except FileNotFoundError:
            raise self._no_bucket(self.url) from None
        return ()

    def delete(self, key: str) -> None:
        """Remove an object; nothing where there is none."""
        self.refuse_to_write()
        path = self._path(key)
        try:
            retried(self._where(key), lambda: self._store.delete(path))
        except FileNotFoundError:
            return

    def delete_all(self, keys: Sequence[str]) -> None:
        """Remove many objects, some with each request."""
        self.refuse_to_write()
        for start in range(0, len(keys), DELETED_AT_ONCE):
            paths = [self._path(key) for key in keys[start : start + DELETED_AT_ONCE]]
            try:
                retried(self.url, partial(self._store.delete, paths))
            except FileNotFoundError:  # of a storage that deletes one by one: the others are to go all the same
                for key in keys[start : start + DELETED_AT_ONCE]:
                    self.delete(key)

    def copy(self, key: str, target_key: str) -> None:
        """Copy an object inside the place, over what is there, without its bytes coming here."""
        self.refuse_to_write()
        source, target = self._path(key), self._path(target_key)
        try:
            retried(self._where(key), lambda: self._store.copy(source, target))
        except FileNotFoundError:
            raise RemoteError(f"{self._where(key)}: expected an object, got none; check the URL") from None

    def refuse_to_write(self) -> None:
        """Refuse a place that can only be read.

        Raises:
            RemoteError: it is one.
        """
        if self.is_read_only:
            raise RemoteError(
                f"{self.url}: expected a storage that can be written, got HTTP, which is for reading; use s3://, gs:// "
                "or az://"
            )

    def _no_bucket(self, where: str) -> RemoteError:
        return RemoteError(f"{where}: expected a bucket, got none of that name; make it, or check the URL")

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return open_place, (self.url,)

    def __repr__(self) -> str:
        return f"Place({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Place) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)


def _state(meta: Any) -> State:
    return State(int(meta["size"]), meta["e_tag"], meta["version"])


def _whole(data: bytes, size: int) -> bytes:
    """Bytes, if all of them came."""
    if len(data) != size:
        raise TimeoutError("kind: Interrupted")
    return data


@lru_cache(maxsize=64)
def _connect(root: str, is_patient: bool, _environment: int, _process: int) -> "ObjectStore":
    """The library's own store of a bucket or host: one for all places of a process in it, for they share connections.

    Raises:
        RemoteError: the library is not installed, or the environment contradicts itself.
    """
    try:
        from obstore.store import from_url
    except ImportError:
        raise RemoteError(f"{root}: expected obstore, got none; install it: pip install 'logitstore[remote]'") from None
    scheme = urlsplit(root).scheme
    check_environment(scheme, os.environ)
    endpoints = (os.environ.get(name, "") for name in AWS_ENDPOINTS + AZURE_ENDPOINTS)
    plain = scheme == "http" or (scheme != "https" and any(it.startswith("http://") for it in endpoints))
    client: Any = {
        "allow_http": plain,
        "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
        "timeout": timedelta(seconds=PATIENT_TIMEOUT_S if is_patient else REQUEST_TIMEOUT_S),
    }
    if not is_patient:
        client["read_timeout"] = timedelta(seconds=READ_TIMEOUT_S)
    retry: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=1)}  # `retried` does it
    try:
        store: ObjectStore = from_url(root, client_options=client, retry_config=retry)
    except Exception as error:  # noqa: BLE001 - what the library raises has no common class
        kind = type(error).__name__
        raise RemoteError(
            f"{root}: expected a URL and an environment that fit, got {kind}; check the URL and the variables that "
            f"name the account, such as {named_variables(root)}"
        ) from None
    return store
