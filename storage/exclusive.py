"""One run at a time: what a command holds for as long as it writes a store.

Within a run many workers may write; each shard has a lock of its own for that. This one is for the run as a whole. It
is on the folder that the store is written in, so that nothing of it stays behind, and the kernel lets go of it when the
process ends, however it ends.

Object storage has no such locks. There two runs may write one store: each shard is sealed by one of them, and both end
with the same store.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from storage.backends import Hdf5Backend, backend_for
from storage.backends.files import clear_os_errors, make_folder
from storage.backends.zarr3 import GROUP
from storage.errors import PathError
from storage.head import HEAD_FOLDER
from storage.manifest import Manifest
from storage.reader import Store
from storage.records import MANIFEST
from storage.urls import is_url


@contextlib.contextmanager
def sole_run(path: str | Path) -> Iterator[None]:
    """Keep every other run from writing a store; the folder that it is written in is made where nothing is there.

    A store at a URL is not locked.

    Raises:
        PathError: another run is writing it.
    """
    folder = _writing_folder(path)
    if folder is None:
        yield  # at a URL, a finished file, or no store: whoever opens it says so
        return
    is_new = not folder.exists()
    with clear_os_errors(path):
        make_folder(folder)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another run removed it just now
            raise _is_busy(path) from None
    try:
        _lock(descriptor, folder, path)
        yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it holds a store now, or is gone
                folder.rmdir()
        os.close(descriptor)


def discard_unsealed(store: Store) -> bool:
    """Remove what makes a store of which nothing is sealed, and nothing else; for the one who holds `sole_run`.

    Returns:
        False where it stays, since it is at a URL: another run may be writing it.
    """
    assert not store.sealed_shards()
    if is_url(store.path):
        return False
    store.close()
    discard_begun(store.path, store.manifest)
    return True


def discard_begun(path: str, manifest: Manifest) -> None:
    """Remove what makes a store on this machine of which nothing is sealed, be it whole or only begun."""
    folder = _writing_folder(path)
    assert folder is not None
    with clear_os_errors(path):
        for name in (MANIFEST, HEAD_FOLDER, "seals", "shards", *(spec.name for spec in manifest.arrays), GROUP):
            if (folder / name).is_dir() and not (folder / name).is_symlink():
                shutil.rmtree(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        for left in folder.glob("*.partial"):
            left.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds something else
            folder.rmdir()


def _writing_folder(path: str | Path) -> Path | None:
    """The folder that a store is written in; None for a URL, a path where no store can be, or a finished file."""
    if is_url(path):
        return None
    backend = backend_for(path)
    if isinstance(backend, Hdf5Backend):
        folder, is_taken = backend.parts, backend.path.exists()
    else:
        folder, is_taken = Path(os.path.realpath(path)), False
    return None if is_taken or (folder.exists() and not folder.is_dir()) else folder


def _lock(descriptor: int, folder: Path, path: str | Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _is_busy(path) from None
    except OSError:
        return  # no locks on this file system: then one run at a time is the caller's duty
    try:
        is_same = os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        is_same = False
    if not is_same:  # it was removed between its opening and its lock
        raise _is_busy(path)


def _is_busy(path: str | Path) -> PathError:
    return PathError(
        f"{path}: expected a store that nobody writes, got a busy one: another teacherdump run is writing this store; "
        "wait for it, or stop it"
    )
