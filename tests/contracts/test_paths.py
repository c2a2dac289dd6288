"""Paths that can't be, places that can't be written, disks that are full: one clear error each."""

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr

from storage.backends import backend_for, zarr3
from storage.backends.files import clear_os_errors, make_folder, only_one, sync_folder, write_new
from storage.errors import DamageError, FormatVersionError, OutOfSpaceError, PathError
from storage.reader import open_store
from storage.records import MANIFEST
from storage.writer import StoreWriter
from tests.contracts.small import ON_DISK, compressor_of, path_of, small_manifest, write

SUFFIXES = ("zarr", "h5")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_store_is_refused(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(PathError, match="expected a logit store, got no such path; check the path, or make one"):
        open_store(tmp_path / f"no.{suffix}")


def test_a_url_of_a_hdf5_file_is_refused() -> None:
    with pytest.raises(PathError, match=r"s3://bucket/x.h5: expected a Zarr store at a URL, got the name of an HDF5"):
        open_store("s3://bucket/x.h5")


def test_a_url_that_was_made_a_path_is_refused() -> None:
    with pytest.raises(PathError, match=r"s3:/bucket/x.zarr: expected a URL as text, got it as a path, which lost"):
        open_store(Path("s3://bucket/x.zarr"))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"text", b"\x89HDF\r\n\x1a\n"])
def test_a_plain_file_is_no_store(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"file.{suffix}"
    path.write_bytes(content)
    with pytest.raises(
        (PathError, DamageError), match=r"expected (a logit store|an HDF5 file|an HDF5 file that opens), got"
    ):
        open_store(path)
    with pytest.raises((PathError, DamageError), match=r"expected (nothing|an HDF5 file)"):
        StoreWriter.open(path, small_manifest())
    assert path.read_bytes() == content


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_of_something_else_is_neither_read_nor_touched(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"folder.{suffix}"
    (path / "inside").mkdir(parents=True)
    (path / "inside" / "notes.txt").write_text("mine")
    with pytest.raises(PathError, match=r"expected (a logit store|an HDF5 file), got something"):
        open_store(path)
    with pytest.raises(PathError, match=r"expected (nothing, or a logit store|an HDF5 file), got something"):
        StoreWriter.open(path, small_manifest())
    assert (path / "inside" / "notes.txt").read_text() == "mine"


def test_the_zarr_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "other.zarr"
    group = zarr.create_group(path)
    group.create_array("lse", shape=(3,), dtype="f4")
    before = {file: file.read_bytes() for file in path.rglob("zarr.json")}
    with pytest.raises(PathError, match="expected nothing, or a logit store, got something else; give another"):
        StoreWriter.open(path, small_manifest())
    assert {file: file.read_bytes() for file in path.rglob("*.json")} == before


def test_a_tree_of_empty_folders_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "x.zarr" / "inside").mkdir(parents=True)
    with pytest.raises(PathError, match="expected nothing, or a logit store"):
        StoreWriter.open(tmp_path / "x.zarr", small_manifest())
    assert (tmp_path / "x.zarr" / "inside").is_dir()


def test_the_hdf5_file_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(3)
        file["records/notes"] = np.arange(3)
    before = path.read_bytes()
    with pytest.raises(PathError, match="expected a logit store, got something without a manifest"):
        open_store(path)
    with pytest.raises(PathError, match="expected nothing, or a logit store, got something else; give another path"):
        StoreWriter.open(path, small_manifest())
    assert path.read_bytes() == before


def test_parts_of_something_else_are_not_touched(tmp_path: Path) -> None:
    parts = tmp_path / "x.h5.parts"
    parts.mkdir()
    (parts / "notes.txt").write_text("mine")
    with pytest.raises(PathError, match="expected nothing, or parts of a logit store; give another path"):
        StoreWriter.open(tmp_path / "x.h5", small_manifest())
    assert (parts / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_path_inside_a_file_is_refused(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PathError, match="got no such path"):
        open_store(tmp_path / "file" / f"x.{suffix}")
    with pytest.raises(PathError, match=r"expected a path in a folder, got (Not a directory|File exists) at"):
        StoreWriter.open(tmp_path / "file" / f"x.{suffix}", small_manifest())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_name_that_is_too_long_is_refused(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(PathError, match="expected a path in a folder, got File name too long"):
        StoreWriter.open(tmp_path / f"{'x' * 300}.{suffix}", small_manifest())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_broken_link_is_no_store_and_a_writer_makes_what_it_points_to(suffix: str, tmp_path: Path) -> None:
    link = tmp_path / f"link.{suffix}"
    link.symlink_to(tmp_path / "target")
    with pytest.raises(PathError, match="expected a logit store, got no such path"):
        open_store(link)
    with StoreWriter.open(link, small_manifest()) as writer:
        write(writer)
        writer.finalize()
    with open_store(link) as store:
        assert store.finalized
        store.check_shard(2)


def test_a_link_to_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.zarr").symlink_to(tmp_path / "disk")
    with StoreWriter.open(tmp_path / "link.zarr", small_manifest()) as writer:
        write(writer)
    assert (tmp_path / "disk" / MANIFEST).is_file()


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.zarr").symlink_to(tmp_path / "x.zarr")
    with pytest.raises(PathError):
        open_store(tmp_path / "x.zarr")
    with pytest.raises(PathError):
        StoreWriter.open(tmp_path / "x.zarr", small_manifest())


@pytest.mark.parametrize("kind", ON_DISK)
def test_a_newer_version_is_refused(kind: str, tmp_path: Path) -> None:
    path = path_of(kind, tmp_path)
    StoreWriter.open(path, small_manifest(compressor=compressor_of(kind))).close()
    manifest = (path if path.is_dir() else tmp_path / "store.h5.parts") / MANIFEST
    manifest.write_text(manifest.read_text().replace('"1.0"', '"2.0"'))
    with pytest.raises(FormatVersionError, match=r"expected format version 1.x, got 2.0; install a newer release"):
        open_store(path)
    with pytest.raises(FormatVersionError, match="install a newer release"):
        StoreWriter.open(path, small_manifest(compressor=compressor_of(kind)))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_place_without_permission_to_write_is_refused(
    number: int, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    message = f"expected a path that may be read and written, got {os.strerror(number)}; choose another"
    with pytest.raises(PathError, match=message):
        StoreWriter.open(tmp_path / f"x.{suffix}", small_manifest())


@pytest.mark.parametrize("kind", ["zarr-none", "hdf5-none"])
def test_records_without_permission_to_read_are_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = path_of(kind, tmp_path)
    StoreWriter.open(path, small_manifest()).close()

    def refuse(root: Path, path: Path) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(zarr3, "open_inside", refuse)
    with pytest.raises(PathError, match="expected a path that may be read and written, got Permission denied"):
        open_store(path)
    with pytest.raises(PathError, match="expected a path that may be read and written, got Permission denied"):
        StoreWriter.open(path, small_manifest())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PathError, match="expected a path that may be read and written, got Permission denied"):
            StoreWriter.open(tmp_path / "x.zarr", small_manifest())
    finally:
        tmp_path.chmod(0o755)


def test_a_disk_that_can_not_be_read_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StoreWriter.open(tmp_path / "x.zarr", small_manifest()) as writer:
        write(writer)

        def fail(*_: Any) -> int:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(
            DamageError, match=r"array 'lse', shard 0: expected bytes that can be read, got .*Input/output"
        ):
            writer.store.read(["lse"], 0, 8)


FULL = """
import resource, signal, sys
from pathlib import Path
from storage.errors import OutOfSpaceError
from tests.contracts.small import *
kind, path, most, before = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), map(int, sys.argv[4].split(","))
manifest = small_manifest(encoding=ENCODINGS["dense-float32"], num_classes=3000, compressor=compressor_of(kind))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with StoreWriter.open(path, manifest) as writer:
    write(writer, *before)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    try:
        write(writer)
        writer.finalize()
    except OutOfSpaceError as error:
        print(error)
    print(writer.sealed_shards())
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print([left.name for left in path.parent.rglob("*.partial") if ".lock" not in left.suffixes])
    write(writer)
    print(writer.finalize())
"""


@pytest.mark.parametrize(
    ("kind", "most", "before"),
    [(kind, most, "0") for kind in ON_DISK for most in (3_000, 60_000)] + [("hdf5-none", 140_000, "0,1,2")],
)
def test_a_full_disk_is_told_and_mended_by_going_on(kind: str, most: int, before: str, tmp_path: Path) -> None:
    """No file may pass the limit: one of a shard, or the one that HDF5 packs at the end."""
    path = path_of(kind, tmp_path)
    command = [sys.executable, "-c", FULL, kind, str(path), str(most), before]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].endswith("expected room on the disk, got none; free space and run the same command again")
    assert lines[1] == str(tuple(map(int, before.split(","))) if "," in before else (0,))
    assert lines[2] == "[]"
    with open_store(path) as store:
        assert store.content_digest == lines[3]
        for shard in store.sealed_shards():
            store.check_shard(shard)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_kind_of_full_disk_is_told(number: int) -> None:
    with pytest.raises(OutOfSpaceError, match="x: expected room on the disk, got none"), clear_os_errors("x"):
        raise OSError(number, "text")
    with pytest.raises(OutOfSpaceError), clear_os_errors("x"):
        raise OSError("write failed: No space left on device")


def test_other_os_errors_stay_as_they_are() -> None:
    with pytest.raises(OSError, match="text"), clear_os_errors("x"):
        raise OSError(errno.EIO, "text")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was synced, linked and renamed, by name, in order."""
    found: list[str] = []
    link, replace = os.link, Path.replace

    def fsync(descriptor: int) -> None:
        found.append("sync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)

    def spy_link(source: Any, target: Any) -> None:
        found.append(f"link {Path(target).name}")
        link(source, target)

    def spy_replace(self: Path, target: Any) -> Path:
        found.append(f"rename {Path(target).name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", spy_link)
    monkeypatch.setattr(Path, "replace", spy_replace)
    return found


def brief(calls: list[str]) -> list[str]:
    return ["sync (partial)" if call.endswith(".partial") else call for call in calls]


def test_a_record_is_durable_before_it_has_its_name(tmp_path: Path, calls: list[str]) -> None:
    assert write_new(tmp_path / "a" / "b" / "seal.json", b"x")
    assert brief(calls) == [f"sync {tmp_path.name}", "sync a", "sync (partial)", "link seal.json", "sync b"]
    assert not write_new(tmp_path / "a" / "b" / "seal.json", b"y")
    assert (tmp_path / "a" / "b" / "seal.json").read_bytes() == b"x"


def test_all_of_a_shard_is_durable_before_its_seal(tmp_path: Path, calls: list[str]) -> None:
    with StoreWriter.open(tmp_path / "x.zarr", small_manifest(encoding=small_manifest().encoding)) as writer:
        assert f"sync {tmp_path.name}" in calls  # the store's own name
        for name in ("values", "lse"):
            assert calls.index(f"sync {name}") < calls.index("link manifest.json")
        calls.clear()
        write(writer, 1)
    seal = calls.index("link 00000001.json")
    before, after = calls[:seal], calls[seal:]
    assert brief(before).count("sync (partial)") == 10 + 1  # the files of ten arrays, and the seal
    assert all(brief(before)[at - 1] == "sync (partial)" for at, call in enumerate(before) if call.startswith("rename"))
    assert {"sync 1", "sync c", "sync values", "sync x.zarr"} <= set(before)
    assert after == ["link 00000001.json", "sync seals"]


def test_a_hdf5_part_is_durable_before_its_seal_and_the_file_before_its_parts_go(
    tmp_path: Path, calls: list[str]
) -> None:
    with StoreWriter.open(tmp_path / "x.h5", small_manifest()) as writer:
        calls.clear()
        write(writer, 0)
        seal = calls.index("link 00000000.json")
        assert brief(calls[:seal])[-4:] == ["sync (partial)", "rename 00000000.h5", "sync shards", "sync (partial)"]
        calls.clear()
        writer.finalize(partial=True)
        assert brief(calls) == ["sync (partial)", "rename x.h5", f"sync {tmp_path.name}"]


def test_a_disk_without_hard_links_is_written_by_renaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert write_new(tmp_path / "x", b"one")
    assert not write_new(tmp_path / "x", b"two")
    assert (tmp_path / "x").read_bytes() == b"one"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_disk_that_links_nothing_for_another_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_new(tmp_path / "x", b"one")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_syncs_no_folders_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> Any:
        def fail(_: int) -> None:
            raise OSError(number, os.strerror(number))

        return fail

    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)


def test_a_disk_without_locks_lets_everybody_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with only_one(tmp_path / "lock", tmp_path / "done"), only_one(tmp_path / "lock", tmp_path / "done"):
        (tmp_path / "done").touch()
    assert not (tmp_path / "lock").exists()


def test_a_folder_that_is_there_is_left_as_it_is(tmp_path: Path, calls: list[str]) -> None:
    make_folder(tmp_path)
    assert not calls


def test_the_limit_of_this_process_is_untouched() -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert signal.getsignal(signal.SIGXFSZ) is not None
    assert not backend_for("nowhere.zarr").exists()
