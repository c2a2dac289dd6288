"""Checkpoints: one file that is always whole, and that says which run and which store it belongs to."""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from storage.backends.files import clear_os_errors, sync_folder
from storage.errors import StudentError

CHECKPOINT = "checkpoint.pt"
FORMAT = "studenttrain-checkpoint"
FORMAT_VERSION = 1

Checkpoint = dict[str, Any]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint durably, in place of the one that is there: a kill leaves the old one or the new one, whole.

    Args:
        path: where it goes.
        checkpoint: tensors, numbers, strings, and dicts and lists of them, so that it loads with `weights_only=True`.

    Raises:
        OutOfSpaceError: the disk is full; the checkpoint that was there is as it was.
        PathError: the folder can't be written.
    """
    header = {"format": FORMAT, "format_version": FORMAT_VERSION}

    def write(file: BinaryIO) -> None:
        sink = _Sink(file)
        torch.save(header | checkpoint, sink)  # type: ignore[arg-type]
        if sink.error is not None:
            raise sink.error

    write_durably(path, write)


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a file, on the CPU, every byte of it checked.

    Raises:
        StudentError: the file is missing, damaged, or not a checkpoint of this release.
    """
    advice = (
        "give the run's folder or its student.safetensors; where this is the run's own checkpoint, take another copy "
        "of it, or begin again in a new --out"
    )
    if not path.is_file():
        raise StudentError(f"checkpoint '{path}': expected a file, got nothing there; give the folder of a run")
    try:
        # torch does not check the checksums of its own archive, so a flipped bit would load as a weight
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad is not None:
            raise StudentError(f"checkpoint '{path}': expected its checksums to hold, got damage in '{bad}'; {advice}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise StudentError(
            f"checkpoint '{path}': expected a whole checkpoint, got a damaged or foreign file ({reason}); {advice}"
        ) from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise StudentError(
            f"checkpoint '{path}': expected a checkpoint of studenttrain, got another file of torch; {advice}"
        )
    if checkpoint["format_version"] > FORMAT_VERSION:
        raise StudentError(
            f"checkpoint '{path}': expected format version {FORMAT_VERSION}, got {checkpoint['format_version']}; "
            "install a newer release"
        )
    return checkpoint


class _Sink:
    """A file that keeps the error of a write to itself: raised inside torch's archive writer, it may end the process.

    Attributes:
        error: the first one, or None; nothing is written after it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write some bytes, and say so whether or not they went anywhere."""
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Nothing: who opened the file flushes it, where it may fail."""


def write_durably(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file under another name, make it durable, then give it its name.

    Args:
        path: the file's name in the end; its folder exists.
        write: called with the open file.

    Raises:
        OutOfSpaceError: the disk is full.
        PathError: the folder can't be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    with clear_os_errors(path):
        try:
            with partial.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)
