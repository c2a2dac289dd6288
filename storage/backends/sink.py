"""A file that HDF5 can write to though the disk is full."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Sink:
    """A new file whose writes never fail for the one that writes it. A context manager.

    HDF5 can't close a file that it failed to write to, and crashes the process later. So the first error is kept here,
    what is written after it is dropped, and HDF5 closes in peace; then `check` raises the error.
    """

    def __init__(self, path: Path) -> None:
        self.error: OSError | None = None
        self._file = path.open("xb+", buffering=0)

    def check(self) -> None:
        """Raise what went wrong, if anything did."""
        if self.error is not None:
            raise self.error

    def write(self, data: Any) -> int:
        """Write all bytes at the place in the file."""
        view = memoryview(data).cast("B")
        if self.error is None:
            try:
                done = 0
                while done < len(view):
                    done += self._file.write(view[done:])
            except OSError as error:
                self.error = error
        return len(view)

    def read(self, size: int) -> bytes:
        """Read bytes back; h5py asks for the method and calls `readinto`."""
        data = bytearray(size)
        self.readinto(data)
        return bytes(data)

    def readinto(self, buffer: Any) -> int:
        """Read bytes back, zeros where they were dropped."""
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view):
            got = self._file.readinto(view[done:]) or 0
            if not got:
                view[done:] = bytes(len(view) - done)
                break
            done += got
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Make the file that long."""
        if self.error is None:
            try:
                return self._file.truncate(size)
            except OSError as error:
                self.error = error
        return size or 0

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place in the file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The place in the file."""
        return self._file.tell()

    def flush(self) -> None:
        """Nothing is buffered here."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
