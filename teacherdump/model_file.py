"""What a model file is, and who the teacher in it is: from its bytes alone, without loading anything."""

import hashlib
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from storage.errors import StudentError, TeacherError
from studenttrain.hf_files import CONFIG, HfFiles, find_hf_files
from teacherdump.config import Combine, Precision

FileKind = Literal["program", "torchscript", "safetensors", "pickle", "hf"]
"""A `torch.export` program, a TorchScript archive, or weights; `pickle` is what `torch.save` writes, weights or not;
`hf` is a folder of transformers."""

READ_BYTES = 8 << 20
ZIP_MAGIC = b"PK"
SELF_CONTAINED = ("program", "torchscript", "hf")
HF_PREFIX = "hf:"
CONFIG_DIGITS = 12  # of the digest that says which configuration weights of a `hf:DIR` belong to


def file_kind(path: str | Path) -> FileKind:
    """What a model file is, by its content: its suffix is never looked at; `hf:DIR` is a folder of transformers.

    Raises:
        TeacherError: it is missing, empty, damaged, or no model.
    """
    if is_hf(path):
        hf_files(path)
        return "hf"
    where, path = f"teacher '{path}'", Path(path)
    if path.is_dir() and (path / CONFIG).is_file():
        raise TeacherError(f"{where}: expected a model file, got a folder of transformers; say --model hf:{path}")
    if path.is_dir():
        raise TeacherError(f"{where}: expected a model file, got a folder; give the file in it")
    if not path.is_file():
        raise TeacherError(f"{where}: expected a model file, got nothing there; check the path of --model")
    with path.open("rb") as file:
        head = file.read(16)
    if not head:
        raise TeacherError(f"{where}: expected a model, got an empty file; take another copy of it")
    if head.startswith(ZIP_MAGIC):
        return _archive_kind(path, where)
    if _is_safetensors(head, path.stat().st_size, where):
        return "safetensors"
    if head[0] == 0x80 and head[1] in range(2, 6):  # a pickle of protocol 2 to 5, as torch.save wrote before 1.6
        return "pickle"
    raise _no_model(where, "a file of some other kind")


def is_hf(path: str | Path) -> bool:
    """Whether a model is named as a folder of transformers, `hf:DIR`."""
    return str(path).startswith(HF_PREFIX)


def hf_files(path: str | Path) -> HfFiles:
    """What lies in the folder of a `hf:DIR`.

    Raises:
        TeacherError: no model does.
    """
    where = f"teacher '{path}'"
    try:
        files = find_hf_files(str(path).removeprefix(HF_PREFIX), where)
    except StudentError as error:
        raise TeacherError(str(error)) from error
    if not files.weights:
        raise TeacherError(
            f"{where}: expected weights beside {CONFIG}, got none; copy model.safetensors into the folder"
        )
    return files


def hf_digest(files: HfFiles) -> str:
    """Hex sha256 over the configuration and the weights: a line for each, its name and the sha256 of its bytes."""
    lines = [f"{path.name} {file_digest(path)}\n" for path in files.all]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _archive_kind(path: Path, where: str) -> FileKind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if len(set(names)) != len(names) or archive.testzip() is not None:  # torch itself checks no checksum
                raise zipfile.BadZipFile("checksums")
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError) as error:
        raise TeacherError(
            f"{where}: expected a whole model archive, got a truncated or damaged one; take another copy of it"
        ) from error
    inner = {name.partition("/")[2] for name in names}
    if "archive_format" in inner or "serialized_exported_program.json" in names:
        return "program"
    if "constants.pkl" in inner:
        return "torchscript"
    if "data.pkl" in inner:
        return "pickle"
    raise _no_model(where, "a zip archive of something else")


def _is_safetensors(head: bytes, num_bytes: int, where: str) -> bool:
    """Eight bytes of header length, then a JSON object."""
    if len(head) < 10 or head[8:9] != b"{":
        return False
    header_bytes = int.from_bytes(head[:8], "little")
    if header_bytes > num_bytes - 8:
        raise TeacherError(
            f"{where}: expected a header of {header_bytes} bytes, got a file of {num_bytes}; it is truncated or "
            "damaged, take another copy of it"
        )
    return True


def _no_model(where: str, got: str) -> TeacherError:
    return TeacherError(
        f"{where}: expected a torch.export program, a TorchScript archive or weights (torch.save of a state_dict, or "
        f"safetensors), got {got}; save the model as one of these"
    )


def file_digest(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    state = hashlib.sha256()
    with Path(path).open("rb") as file:
        while data := file.read(READ_BYTES):
            state.update(data)
    return state.hexdigest()


def teacher_identity(
    paths: Sequence[str | Path], arch: str | None, combine: Combine | None, precision: Precision
) -> dict[str, Any]:
    """Who the teacher is, as the manifest keeps it: `digest`, `kind`, `arch`, `precision`, `combine`, `members`.

    The digest of one model is the sha256 of its file, or of a folder's `hf_digest`; that of an ensemble the sha256 over
    its members' digests, in order, and how they are combined, a line each. A file's name is no part of it.

    Raises:
        TeacherError: a file is missing, damaged or no model.
        ValueError: `arch` or `combine` would be ignored.
    """
    kinds = [file_kind(path) for path in paths]
    if arch is not None and all(kind in SELF_CONTAINED for kind in kinds):
        raise ValueError(
            f"arch: expected none, since '{paths[0]}' is {_article(kinds[0])} that says itself what it computes, got "
            f"{arch!r}; leave --arch out"
        )
    if combine is not None and len(paths) == 1:
        raise ValueError(f"combine: expected several models, got one with {combine}; leave --combine out")
    members = [
        {"digest": _digest(path, kind), "kind": _model_kind(kind, arch)}
        for path, kind in zip(paths, kinds, strict=True)
    ]
    arch = _arch_without_path(arch, kinds)
    if len(members) == 1:
        return {**members[0], "arch": arch, "precision": precision, "combine": None, "members": []}
    combine = combine or "mean-probs"
    digest = hashlib.sha256("".join(f"{member['digest']}\n" for member in members).encode() + combine.encode())
    return {
        "digest": digest.hexdigest(),
        "kind": "ensemble",
        "arch": arch,
        "precision": precision,
        "combine": combine,
        "members": members,
    }


def _digest(path: str | Path, kind: FileKind) -> str:
    return hf_digest(hf_files(path)) if kind == "hf" else file_digest(path)


def _arch_without_path(arch: str | None, kinds: Sequence[FileKind]) -> str | None:
    """What the manifest calls the architecture: where a folder lies is no part of who the teacher is."""
    if arch is None:
        return "hf" if "hf" in kinds else None
    if not is_hf(arch):
        return arch
    config = Path(arch.removeprefix(HF_PREFIX)) / CONFIG
    if not config.is_file():
        raise TeacherError(
            f"--arch {arch}: expected a folder with a {CONFIG}, got none; give the folder that the weights belong to"
        )
    return f"{HF_PREFIX}{file_digest(config)[:CONFIG_DIGITS]}"


def _model_kind(kind: FileKind, arch: str | None) -> str:
    if kind == "safetensors":
        return "weights"
    if kind == "pickle":
        return "module" if arch is None else "weights"
    return kind


def _article(kind: FileKind) -> str:
    names = {"program": "a torch.export program", "torchscript": "a TorchScript archive"}
    return names.get(kind, "a folder of transformers")
