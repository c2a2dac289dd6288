"""Checkpoints: whole or the old one, and nothing foreign or damaged is loaded."""

import resource
from pathlib import Path

import pytest
import torch

from storage.errors import OutOfSpaceError, PathError, StudentError
from studenttrain.checkpoint import load_checkpoint, save_checkpoint, write_durably


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 7, "model": {"w": torch.arange(5.0)}, "stream": {"sealed": [[0, 3]], "epoch": None}})
    found = load_checkpoint(path)
    assert found["step"] == 7
    assert found["stream"] == {"sealed": [[0, 3]], "epoch": None}
    assert torch.equal(found["model"]["w"], torch.arange(5.0))
    assert list(tmp_path.iterdir()) == [path]


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"model": {"w": torch.arange(64.0)}})
    data = path.read_bytes()
    weights = data.index(torch.arange(64.0).numpy().tobytes())
    num_refused = 0
    for place in [*range(weights, weights + 256, 32), *range(0, len(data), 61)]:
        damaged = bytearray(data)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        try:
            found = load_checkpoint(path)
        except StudentError:
            num_refused += 1
        else:
            assert torch.equal(found["model"]["w"], torch.arange(64.0)), place
    assert num_refused >= 8


def test_a_missing_or_cut_or_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(StudentError, match="expected a file, got nothing there; give the folder of a run"):
        load_checkpoint(path)
    save_checkpoint(path, {"step": 1})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(StudentError, match="expected a whole checkpoint, got a damaged or foreign file"):
        load_checkpoint(path)
    torch.save({"weights": 1}, path)
    with pytest.raises(StudentError, match=r"got another file of torch; give the run's folder or its student.safe"):
        load_checkpoint(path)


def test_a_pickled_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"format": "studenttrain-checkpoint", "model": torch.nn.Linear(1, 1)}, path)
    with pytest.raises(StudentError, match="expected a whole checkpoint, got a damaged or foreign file"):
        load_checkpoint(path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"format": "studenttrain-checkpoint", "format_version": 99}, path)
    with pytest.raises(StudentError, match="expected format version 1, got 99; install a newer release"):
        load_checkpoint(path)


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # a limit on the size of a file fails a write just as a full disk does, and needs no rights
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OutOfSpaceError, match="expected room on the disk, got none; free space and run the same"):
            save_checkpoint(path, {"step": 2, "model": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_checkpoint(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_can_not_be_written_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with pytest.raises(PathError, match="got Permission denied; choose another"):
        write_durably(tmp_path / "file", refuse)
