"""A student as files: each gives the student's own logits again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from storage.errors import StudentError
from studenttrain.export import StudentCard, export_student, load_card, load_student, load_weights
from studenttrain.models import build_model
from studenttrain.train import fit
from tests.studenttrain.runs import Ground

CNN = "cnn:1-4-6-3"


def make_card(student: str = CNN, input_shape: tuple[int, ...] = (1, 7, 6)) -> StudentCard:
    return StudentCard(
        student, input_shape, 3, ("a", "b", "c"), {"kind": "image"}, {"digest": "0", "content_digest": None}
    )


def export(folder: Path, student: str = CNN) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(student)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 1, 7, 6))
    assert export_student(folder, model, make_card(student)) is None
    return model


@pytest.mark.parametrize("num_rows", [1, 2, 5, 64])
def test_the_program_gives_the_same_logits_for_any_batch(tmp_path: Path, num_rows: int) -> None:
    model = export(tmp_path).eval()
    inputs = torch.randn(num_rows, 1, 7, 6)
    program = torch.export.load(tmp_path / "student.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(inputs), model(inputs))


def test_weights_and_card_come_back(tmp_path: Path) -> None:
    model = export(tmp_path).eval()
    inputs = torch.randn(5, 1, 7, 6)
    for path in (tmp_path, tmp_path / "student.safetensors"):
        found, card = load_student(path)
        assert card == make_card()
        assert not found.training
        assert torch.equal(found(inputs), model(inputs))
    assert json.loads((tmp_path / "student.json").read_text())["class_names"] == ["a", "b", "c"]


def test_a_run_is_loaded_from_its_exports_or_its_checkpoint(ground: Ground, no_report: None) -> None:
    config = ground.config(steps=3, ema=0.5)
    fit(config, quiet=True)
    inputs = torch.randn(5, 8)
    exported, _ = load_student(Path(config.out))
    loaded, card = load_student(Path(config.out) / "checkpoint.pt")
    assert torch.equal(exported(inputs), loaded(inputs))
    assert card.input_shape == (8,)
    program = torch.export.load(Path(config.out) / "student.pt2").module()
    torch.testing.assert_close(program(inputs), exported(inputs))


class Tied(nn.Module):
    """A model that uses one matrix twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (N, 4)."""
        return self.second(self.first(inputs))  # type: ignore[no-any-return]


def test_tied_weights_are_exported(tmp_path: Path) -> None:
    model = Tied()
    assert export_student(tmp_path, model, make_card(input_shape=(4,))) is None
    other = Tied()
    load_weights(tmp_path / "student.safetensors", other)
    assert torch.equal(other.second.weight, model.first.weight)


class Untraceable(nn.Linear):
    """A model whose path depends on its values."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (N, 4)."""
        return super().forward(inputs if inputs.sum().item() > 0 else -inputs)


def test_a_model_that_can_not_be_traced_still_has_its_weights(tmp_path: Path) -> None:
    (tmp_path / "student.pt2").write_bytes(b"of another student")
    reason = export_student(tmp_path, Untraceable(4, 4), make_card(input_shape=(4,)))
    assert reason is not None
    assert "\n" not in reason
    assert (tmp_path / "student.safetensors").is_file()
    assert not (tmp_path / "student.pt2").exists()


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from torch import nn
from storage.errors import OutOfSpaceError
from studenttrain import export
from studenttrain.checkpoint import save_checkpoint
from tests.studenttrain import test_export as here

folder = Path(sys.argv[1])
model = nn.Linear(4, 4)
export.save_weights = lambda *_: None  # so that the program is what meets the end of the disk
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for act in (
    lambda: here.export_student(folder, model, here.make_card(input_shape=(4,))),
    lambda: save_checkpoint(folder / "checkpoint.pt", {"model": model.state_dict()}),
):
    try:
        act()
    except OutOfSpaceError as error:
        print("refused:", error)
"""


def test_a_disk_that_is_full_at_the_program_or_a_checkpoint_does_not_end_the_process(tmp_path: Path) -> None:
    code = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(code, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    program, checkpoint = done.stdout.splitlines()
    assert "student.pt2: expected room on the disk, got none" in program
    assert "checkpoint.pt: expected room on the disk, got none" in checkpoint
    assert {path.name for path in tmp_path.iterdir()} == {"student.json"}


FULL_FOR_WEIGHTS = """
import resource, sys
from pathlib import Path
from torch import nn
from storage.errors import OutOfSpaceError
from studenttrain.export import save_weights

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    save_weights(Path(sys.argv[1]) / "student.safetensors", nn.Linear(40, 40))
except OutOfSpaceError as error:
    print("refused:", error)
"""


def test_a_disk_that_is_full_at_the_weights_is_said_in_one_line(tmp_path: Path) -> None:
    code = [sys.executable, "-c", FULL_FOR_WEIGHTS, str(tmp_path)]
    done = subprocess.run(code, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "student.safetensors: expected room on the disk, got none" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_or_damaged_or_foreign_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudentError, match="expected a file, got nothing there"):
        load_student(tmp_path)
    export(tmp_path)
    with pytest.raises(StudentError, match=r"expected weights of this student, got others .*; give the student's"):
        load_weights(tmp_path / "student.safetensors", build_model("cnn:1-4-3"))
    data = (tmp_path / "student.safetensors").read_bytes()
    (tmp_path / "student.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(StudentError, match=r"expected a whole .safetensors file, got a damaged or foreign one"):
        load_student(tmp_path)
    (tmp_path / "student.json").write_text("{}")
    with pytest.raises(StudentError, match="expected a student's card, got a damaged file"):
        load_card(tmp_path / "student.json")
    (tmp_path / "student.json").unlink()
    with pytest.raises(StudentError, match="expected the card that `studenttrain fit` writes beside the weights"):
        load_student(tmp_path / "student.safetensors")
