"""Teachers load from every kind of file, say the same as the module, and are refused in one line where they can't."""

import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from storage.errors import TeacherError
from studenttrain.models import build_model
from teacherdump.model_file import file_digest, teacher_identity
from teacherdump.teacher import Teacher, find_device, load_teacher, probe_teacher

ARCH = "mlp:12-16-5"
Saving = dict[str, Callable[..., Path]]


class Odd(nn.Module):
    """Gives whatever a function makes of its input."""

    def __init__(self, give: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.give = give

    def forward(self, inputs: Tensor) -> Any:
        return self.give(inputs)


class Regularised(nn.Module):
    """Dropout and batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 5))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.body(inputs)
        return logits


def make_regularised() -> nn.Module:
    return Regularised()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return build_model(ARCH).eval()


def load(*paths: Path, **options: Any) -> Teacher:
    return load_teacher(paths, **{"device": "cpu", **options})


def odd(give: Callable[[Tensor], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Teacher:
    """A teacher whose module gives whatever a function says."""
    module = type(sys)("odd_models")
    module.__dict__["make"] = lambda: Odd(give)
    monkeypatch.setitem(sys.modules, "odd_models", module)
    with_state = Odd(give)
    with_state.register_buffer("unit", torch.ones(1))
    module.__dict__["make"] = lambda: with_state
    torch.save(with_state.state_dict(), tmp_path / "odd.pt")
    return load(tmp_path / "odd.pt", arch="odd_models:make")


# What loads


def test_every_kind_of_file_gives_the_logits_of_the_module(
    tmp_path: Path, saving: Saving, model: nn.Module, inputs: Tensor
) -> None:
    state = model.state_dict()
    torch.save(state, tmp_path / "plain.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "wrapped.pt")
    torch.save({"model": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "parallel.pt")
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    saving["program"](tmp_path / "program.pt2", model, inputs)
    saving["script"](tmp_path / "scripted.pt", model)
    saving["script"](tmp_path / "traced.pt", model, inputs)
    torch.save(model, tmp_path / "module.pt")
    expected = model(inputs).detach()
    for name in ("plain.pt", "old.pt", "wrapped.pt", "parallel.pt", "weights.safetensors"):
        teacher = load(tmp_path / name, arch=ARCH)
        assert (teacher.kind, teacher.arch) == ("weights", ARCH)
        torch.testing.assert_close(teacher(inputs), expected)
    for name, kind in {"program.pt2": "program", "scripted.pt": "torchscript", "traced.pt": "torchscript"}.items():
        teacher = load(tmp_path / name)
        assert (teacher.kind, teacher.arch) == (kind, None)
        torch.testing.assert_close(teacher(inputs), expected)
    teacher = load(tmp_path / "module.pt", trust_pickle=True)
    assert teacher.kind == "module"
    torch.testing.assert_close(teacher(inputs), expected)


def test_the_content_of_a_file_decides_and_not_its_suffix(
    tmp_path: Path, saving: Saving, model: nn.Module, inputs: Tensor
) -> None:
    saving["program"](tmp_path / "program.pt2", model, inputs).rename(tmp_path / "weights.safetensors")
    assert load(tmp_path / "weights.safetensors").kind == "program"


def test_the_digest_is_the_files_and_its_name_is_no_part_of_who_it_is(tmp_path: Path, weights: Path) -> None:
    identity = load(weights, arch=ARCH).describe()
    assert identity["digest"] == file_digest(weights)
    other = weights.rename(tmp_path / "other.name")
    assert load(other, arch=ARCH).describe() == identity
    assert teacher_identity([other], ARCH, None, "fp32") == identity


def test_an_architecture_of_the_current_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: Tensor
) -> None:
    (tmp_path / "my_models.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(12, 5)\n")
    torch.save(nn.Linear(12, 5).state_dict(), tmp_path / "linear.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load(tmp_path / "linear.pt", arch="my_models:make")(inputs).shape == (6, 5)


def test_an_architecture_takes_its_number_of_classes_from_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: Tensor
) -> None:
    source = "import torch\ndef make(num_classes=1000):\n    return torch.nn.Linear(12, num_classes)\n"
    (tmp_path / "wide_models.py").write_text(source)
    torch.save(nn.Linear(12, 7).state_dict(), tmp_path / "linear.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load(tmp_path / "linear.pt", arch="wide_models:make")(inputs).shape == (6, 7)


def test_logits_of_a_transformers_output_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: Tensor
) -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    expected = inputs[:, :5]
    for give in (lambda x: Output(x[:, :5]), lambda x: {"logits": x[:, :5]}, lambda x: (x[:, :5],)):
        torch.testing.assert_close(odd(give, tmp_path, monkeypatch)(inputs), expected)


def test_half_precision_logits_come_out_as_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: Tensor
) -> None:
    assert odd(lambda x: x[:, :5].half(), tmp_path, monkeypatch)(inputs).dtype == torch.float32


def test_bf16_is_close_to_fp32_and_another_teacher(weights: Path, inputs: Tensor) -> None:
    full, half = load(weights, arch=ARCH), load(weights, arch=ARCH, precision="bf16")
    assert full.describe() != half.describe()
    difference = (full(inputs) - half(inputs)).abs().max()
    assert 0 < difference < 0.05


def test_a_program_for_one_batch_size_is_fed_padded_batches(
    tmp_path: Path, saving: Saving, model: nn.Module, inputs: Tensor
) -> None:
    teacher = load(saving["program"](tmp_path / "fixed.pt2", model, inputs[:4], None))
    assert teacher.max_batch == 4
    for count in (1, 3, 4):
        torch.testing.assert_close(teacher(inputs[:count]), model(inputs[:count]).detach())


def test_a_program_with_bounds_on_its_batch_keeps_to_them(
    tmp_path: Path, saving: Saving, model: nn.Module, inputs: Tensor
) -> None:
    bounded = torch.export.Dim("batch", min=3, max=8)
    teacher = load(saving["program"](tmp_path / "bounded.pt2", model, inputs[:4], bounded))
    assert (teacher.max_batch, teacher.members[0].min_batch) == (8, 3)
    torch.testing.assert_close(teacher(inputs[:1]), model(inputs[:1]).detach())


# Ensembles


def ensemble_logits(paths: list[Path], inputs: Tensor) -> np.ndarray[Any, Any]:
    return np.stack([load(path, arch=ARCH)(inputs).double().numpy() for path in paths])


@pytest.fixture
def members(tmp_path: Path, saving: Saving) -> list[Path]:
    return [saving["weights"](tmp_path / f"member{seed}.pt", ARCH, seed) for seed in range(3)]


def test_mean_probs_is_the_log_of_the_mean_of_the_members_probabilities(members: list[Path], inputs: Tensor) -> None:
    logits_MNC = ensemble_logits(members, inputs)
    probs_MNC = np.exp(logits_MNC) / np.exp(logits_MNC).sum(2, keepdims=True)
    for combine in (None, "mean-probs"):
        found = load(*members, arch=ARCH, combine=combine)(inputs)
        np.testing.assert_allclose(found, np.log(probs_MNC.mean(0)), rtol=1e-5, atol=1e-6)


def test_mean_logits_is_the_mean_of_the_members_logits(members: list[Path], inputs: Tensor) -> None:
    found = load(*members, arch=ARCH, combine="mean-logits")(inputs)
    np.testing.assert_allclose(found, ensemble_logits(members, inputs).mean(0), rtol=1e-5, atol=1e-6)


def test_an_ensembles_digest_says_its_members_their_order_and_how_they_are_combined(members: list[Path]) -> None:
    def digest(*paths: Path, **options: Any) -> Any:
        return load(*paths, arch=ARCH, **options).digest

    digests = {
        digest(*members),
        digest(*members, combine="mean-logits"),
        digest(*members[:2]),
        digest(*members[::-1]),
        digest(members[0]),
    }
    assert len(digests) == 5
    assert digest(*members) == digest(*members, combine="mean-probs")
    assert load(*members, arch=ARCH).kind == "ensemble"


def test_an_ensemble_of_files_of_several_kinds_works(
    tmp_path: Path, saving: Saving, members: list[Path], model: nn.Module, inputs: Tensor
) -> None:
    program = saving["program"](tmp_path / "program.pt2", model, inputs)
    torch.testing.assert_close(load(members[0], program, arch=ARCH)(inputs), model(inputs).detach().log_softmax(1))


def test_members_with_other_numbers_of_classes_are_refused(
    tmp_path: Path, saving: Saving, model: nn.Module, inputs: Tensor
) -> None:
    paths = [
        saving["program"](tmp_path / "five.pt2", model, inputs),
        saving["program"](tmp_path / "six.pt2", build_model("mlp:12-6").eval(), inputs),
    ]
    with pytest.raises(TeacherError, match=r"six.pt2': expected 5 classes, as the first model gives, got 6"):
        load(*paths)(inputs)


def test_combine_with_one_model_is_refused(weights: Path) -> None:
    with pytest.raises(ValueError, match="combine: expected several models, got one with mean-logits"):
        load(weights, arch=ARCH, combine="mean-logits")


# Files that are no teacher


def refused(message: str, *paths: Path, **options: Any) -> None:
    with pytest.raises(TeacherError, match=message) as caught:
        load(*paths, **options)
    assert "\n" not in str(caught.value)


def test_a_missing_empty_or_strange_file_is_refused(tmp_path: Path) -> None:
    refused("expected a model file, got nothing there; check the path of --model", tmp_path / "no.pt")
    refused("expected a model file, got a folder; give the file in it", tmp_path)
    (tmp_path / "empty.pt").touch()
    refused("expected a model, got an empty file; take another copy", tmp_path / "empty.pt")
    (tmp_path / "text.pt").write_text("not a model at all, whatever its suffix says")
    refused("got a file of some other kind; save the model as one of these", tmp_path / "text.pt")
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("readme", "nothing")
    refused("got a zip archive of something else", tmp_path / "other.pt2")


def test_truncated_files_are_refused(tmp_path: Path, saving: Saving, model: nn.Module, inputs: Tensor) -> None:
    torch.save(model.state_dict(), tmp_path / "new.pt")
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    saving["program"](tmp_path / "program.pt2", model, inputs)
    saving["script"](tmp_path / "script.pt", model)
    for name in ("new.pt", "old.pt", "weights.safetensors", "program.pt2", "script.pt"):
        path = tmp_path / name
        data = path.read_bytes()
        for share in (0.3, 0.7, 0.99):
            path.write_bytes(data[: int(len(data) * share)])
            arch = ARCH if name in ("new.pt", "old.pt", "weights.safetensors") else None
            refused("truncated or damaged|can't be read", path, arch=arch)


@pytest.mark.parametrize("name", ["weights.pt", "program.pt2", "script.pt"])
def test_a_flipped_bit_in_an_archive_is_refused(
    tmp_path: Path, saving: Saving, model: nn.Module, inputs: Tensor, name: str
) -> None:
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    saving["program"](tmp_path / "program.pt2", model, inputs)
    saving["script"](tmp_path / "script.pt", model)
    path = tmp_path / name
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(path.read_bytes())
    data[entry.header_offset + entry.compress_size // 2 + 100] ^= 4
    path.write_bytes(data)
    refused("expected a whole model archive, got a truncated or damaged one", path)


def test_bytes_that_only_begin_like_a_pickle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "garbage.pt").write_bytes(b"\x80\x02" + bytes(range(200)))
    refused("expected weights that torch.save wrote, got one that can't be read", tmp_path / "garbage.pt", arch=ARCH)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_a_pickled_module_is_refused_without_running_it(tmp_path: Path, model: nn.Module) -> None:
    torch.save(model, tmp_path / "module.pt")
    message = r"got a pickled studenttrain.models.MLP, which may run any code.*or say --trust-pickle if you made it"
    refused(message, tmp_path / "module.pt")
    refused(message, tmp_path / "module.pt", arch=ARCH)
    torch.save({"state_dict": model.state_dict(), "extra": Trap(tmp_path / "sprung")}, tmp_path / "trap.pt")
    refused("which may run any code", tmp_path / "trap.pt", arch=ARCH)
    assert not (tmp_path / "sprung").exists()


def test_what_plain_pickle_wrote_is_refused_too(tmp_path: Path, model: nn.Module) -> None:
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(model, protocol=4))
    refused("got a pickled object, which may run any code", tmp_path / "plain.pkl")


def test_a_trusted_pickle_beside_an_architecture_or_without_its_class_is_refused(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(model, tmp_path / "module.pt")
    refused("got a whole pickled module; leave --arch out", tmp_path / "module.pt", arch=ARCH, trust_pickle=True)
    vanishing = type(sys)("vanishing")
    vanishing.__dict__["Gone"] = type("Gone", (nn.Linear,), {"__module__": "vanishing"})
    monkeypatch.setitem(sys.modules, "vanishing", vanishing)
    torch.save(vanishing.__dict__["Gone"](12, 5), tmp_path / "gone.pt")
    monkeypatch.delitem(sys.modules, "vanishing")
    refused(
        "whose classes can be imported from here.*No module named 'vanishing'", tmp_path / "gone.pt", trust_pickle=True
    )


def test_a_pickle_inside_a_program_is_refused_without_running_it(
    tmp_path: Path, saving: Saving, model: nn.Module, inputs: Tensor
) -> None:
    path = saving["program"](tmp_path / "program.pt2", model, inputs)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    torch.save((Trap(tmp_path / "sprung"),), tmp_path / "payload")
    payload = (tmp_path / "payload").read_bytes()

    def refused_with(changes: dict[str, bytes]) -> None:
        changed = {**entries, **{f"program/{name}": value for name, value in changes.items()}}
        with zipfile.ZipFile(path, "w") as archive:
            for name, value in changed.items():
                archive.writestr(name, value)
        refused("which may run any code when it is loaded", path)
        assert not (tmp_path / "sprung").exists()

    refused_with({"data/sample_inputs/model.pt": payload})
    config = {"config": {"c": {"path_name": "tensor_0", "is_param": False, "use_pickle": True, "tensor_meta": None}}}
    config_name = "data/constants/model_constants_config.json"
    refused_with({config_name: json.dumps(config).encode(), "data/constants/tensor_0": payload})
    refused_with({"data/constants/opaque_obj_0": payload})
    refused_with({"data/aotinductor/model/lib.so": b"code"})


# Weights and architectures


def test_weights_without_an_architecture_are_refused(tmp_path: Path, weights: Path, model: nn.Module) -> None:
    message = "expected --arch beside a file that holds weights only, got none; say what they belong to"
    refused(message, weights)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    refused(message, tmp_path / "weights.safetensors")


def test_an_architecture_beside_a_program_is_refused(
    tmp_path: Path, saving: Saving, model: nn.Module, inputs: Tensor
) -> None:
    program = saving["program"](tmp_path / "program.pt2", model, inputs)
    with pytest.raises(ValueError, match=r"arch: .*program.pt2' is a torch.export program.*; leave --arch out"):
        load(program, arch=ARCH)
    script = saving["script"](tmp_path / "script.pt", model)
    with pytest.raises(ValueError, match=r"is a TorchScript archive.*; leave --arch out"):
        load(script, arch=ARCH)


def test_something_else_than_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save({"epoch": 3}, path)
    refused(r"expected a state_dict, tensors by name, got 'epoch' that is no tensor", path, arch=ARCH)
    torch.save(torch.ones(3), path)
    refused("tensors by name, got Tensor; save model.state_dict", path, arch=ARCH)
    torch.save({}, path)
    refused("tensors by name, got nothing in it", path, arch=ARCH)


def test_weights_that_do_not_fit_the_architecture_are_refused_by_the_first_that_does_not(
    tmp_path: Path, model: nn.Module
) -> None:
    path, state = tmp_path / "weights.pt", model.state_dict()
    torch.save({name: value for name, value in state.items() if name != "layers.1.bias"}, path)
    refused(r"weights for 'layers.1.bias' \(1 of 4 are missing\), got a file that begins with 'layers.0.weight'", path,
            arch=ARCH)  # fmt: skip
    torch.save({**state, "extra.weight": torch.ones(1)}, path)
    refused(r"nothing beside the weights of mlp:12-16-5, got 'extra.weight' \(1 are unknown", path, arch=ARCH)
    torch.save(state, path)
    refused(r"'layers.0.weight' of shape \(20, 12\), as mlp:12-20-5 has it, got \(16, 12\)", path, arch="mlp:12-20-5")


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("mlp:12", "--arch: model 'mlp:12': expected inputs and classes"),
        ("no_such_module:make", "expected a module no_such_module, got none of that name"),
        ("storage.layout:nothing", "'nothing' in module storage.layout, got no such name"),
        ("builtins:print", "expected a callable that returns a torch.nn.Module, got NoneType"),
        ("operator:truediv", "expected a model that can be built, got TypeError"),
    ],
)
def test_an_architecture_that_can_not_be_built_is_refused(weights: Path, arch: str, message: str) -> None:
    refused(message, weights, arch=arch)


# Modes


def test_weights_are_put_into_eval_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: Tensor) -> None:
    module = Regularised()
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    making = type(sys)("making")
    making.__dict__["make"] = make_regularised
    monkeypatch.setitem(sys.modules, "making", making)
    teacher = load(tmp_path / "weights.pt", arch="making:make")
    torch.testing.assert_close(teacher(inputs), module.eval()(inputs).detach())


def test_a_module_that_stays_in_training_mode_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stubborn(nn.Dropout):
        def train(self, mode: bool = True) -> "Stubborn":
            del mode
            return self

    making = type(sys)("making")
    making.__dict__["make"] = lambda: nn.Sequential(nn.Linear(12, 5), Stubborn())
    monkeypatch.setitem(sys.modules, "making", making)
    torch.save(nn.Sequential(nn.Linear(12, 5)).state_dict(), tmp_path / "weights.pt")
    refused("expected every part in eval mode, got '1' still in training mode", tmp_path / "weights.pt",
            arch="making:make")  # fmt: skip


def test_a_program_exported_in_training_mode_is_refused(tmp_path: Path, saving: Saving, inputs: Tensor) -> None:
    for body, op in ((nn.Dropout(0.5), "dropout"), (nn.BatchNorm1d(12), "batch_norm")):
        module = nn.Sequential(body, nn.Linear(12, 5)).train()
        path = saving["program"](tmp_path / f"{op}.pt2", module, inputs)
        refused(f"exported in eval mode, got an active aten.{op}.default; call model.eval", path)
        load(saving["program"](tmp_path / f"{op}-eval.pt2", module.eval(), inputs))


def test_a_trace_made_in_training_mode_is_refused_on_the_first_samples(
    tmp_path: Path, saving: Saving, inputs: Tensor
) -> None:
    random = nn.Sequential(nn.Linear(12, 8), nn.Dropout(0.5), nn.Linear(8, 5)).train()
    teacher = load(saving["script"](tmp_path / "random.pt", random, inputs))
    with pytest.raises(TeacherError, match="expected the same logits for the same batch, got others; it draws random"):
        probe_teacher(teacher, inputs)
    mixing = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)).train()
    teacher = load(saving["script"](tmp_path / "mixing.pt", mixing, inputs))
    with pytest.raises(TeacherError, match="do not depend on the other samples of a batch"):
        probe_teacher(teacher, inputs)


def test_outputs_that_look_like_probabilities_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: Tensor
) -> None:
    (note,) = probe_teacher(odd(lambda x: x.softmax(1), tmp_path, monkeypatch), inputs).notes
    assert "look like probabilities, not logits" in note
    assert probe_teacher(odd(lambda x: x.log_softmax(1), tmp_path, monkeypatch), inputs).notes == ()


# Outputs and inputs


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda x: x[:, None, :5], r"expected logits \(N, C\), here \(6, C\), got shape \(6, 1, 5\)"),
        (lambda x: x.sum(1), r"got shape \(6,\)"),
        (lambda x: x[:3, :5], r"got shape \(3, 5\)"),
        (lambda x: x[:, :0], r"got shape \(6, 0\)"),
        (lambda x: (x, x), r"got a tuple; wrap the model so that it returns its logits"),
        (lambda _: "five", r"got a str"),
        (lambda x: x.argmax(1, keepdim=True), r"of floats, got torch.int64; return the logits, not the top class"),
    ],
)
def test_an_output_that_is_not_logits_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: Tensor, give: Callable[[Tensor], Any], message: str
) -> None:
    with pytest.raises(TeacherError, match=message):
        odd(give, tmp_path, monkeypatch)(inputs)


def test_inputs_that_a_model_does_not_take_are_refused_with_their_shape(weights: Path) -> None:
    with pytest.raises(
        TeacherError, match=r"takes inputs of shape \(2, 3, 8, 8\), got RuntimeError.*--image-size"
    ) as caught:
        load(weights, arch=ARCH)(torch.zeros(2, 3, 8, 8))
    assert "\n" not in str(caught.value)


def test_an_error_in_torchscript_is_the_line_that_says_what_is_wrong(tmp_path: Path, saving: Saving) -> None:
    teacher = load(saving["script"](tmp_path / "cnn.pt", build_model("cnn:3-4-5").eval()))
    message = (
        r"got RuntimeError: Given groups=1, weight of size .*; if the shape is wrong, say --image-size, --channels"
    )
    with pytest.raises(TeacherError, match=message):
        teacher(torch.zeros(2, 1, 16, 16))
    teacher = load(saving["script"](tmp_path / "mlp.pt", build_model(ARCH).eval()))
    with pytest.raises(TeacherError, match=r"shape is wrong, give other samples, or another --arch$"):
        teacher(torch.zeros(2, 7))


def test_a_program_says_what_samples_it_takes(tmp_path: Path, saving: Saving) -> None:
    image = torch.zeros(4, 3, 16, 16)
    teacher = load(saving["program"](tmp_path / "cnn.pt2", build_model("cnn:3-4-5").eval(), image))
    with pytest.raises(
        TeacherError, match=r"samples of shape \(3, 16, 16\), got \(3, 8, 8\); for images say --image-size 16x16"
    ):
        teacher(torch.zeros(2, 3, 8, 8))
    with pytest.raises(TeacherError, match=r"got \(1, 16, 16\); for images say --channels 3$"):
        teacher(torch.zeros(2, 1, 16, 16))
    with pytest.raises(
        TeacherError, match=r"got \(12,\); export the program for inputs of that shape, or give samples"
    ):
        teacher(torch.zeros(2, 12))


def test_a_program_of_two_inputs_is_refused(tmp_path: Path, inputs: Tensor) -> None:
    class Two(nn.Module):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return first + second

    torch.export.save(torch.export.export(Two(), (inputs, inputs)), tmp_path / "two.pt2")
    message = r"one batch \(N, ...\), or int64 token ids and position ids \(N, P\), got one of 2 inputs"
    refused(message, tmp_path / "two.pt2")


# Devices and precision


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "expected auto, cpu, cuda or cuda:N, got 'gpu'"), ("cpu:0", "got 'cpu:0'"), ("cuda:99", "CUDA devices")],
)
def test_a_device_that_is_not_there_is_refused(device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_device(device)


def test_fp16_on_a_cpu_is_refused(weights: Path) -> None:
    with pytest.raises(
        ValueError, match="precision: expected fp32 or bf16 on cpu, got fp16; use bf16, or --device cuda"
    ):
        load(weights, arch=ARCH, precision="fp16")


def test_compiling_torchscript_is_refused(tmp_path: Path, saving: Saving, model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"compile: expected a model that torch.compile takes, got TorchScript"):
        load(saving["script"](tmp_path / "script.pt", model), compile=True)
