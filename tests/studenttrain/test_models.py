"""Specs of models: what each builds, and what is refused."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from storage.errors import StudentError
from studenttrain.models import CNN, MLP, build_model

CODE = """
import torch
from torch import nn

NUMBER = 3

class Linear(nn.Linear):
    def __init__(self, num_classes=4):
        super().__init__(6, num_classes)

def fixed():
    return nn.Linear(6, 4)

def needs(num_classes):
    return nn.Linear(6, num_classes)

def text():
    return "no module"

def fails():
    raise KeyError("weights\\nof the moon")

class Pair(nn.Module):
    def forward(self, inputs):
        return inputs, inputs

class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.norm.eval()
        self.drop = nn.Dropout(0.5)

    def forward(self, inputs):
        torch.rand(3)
        return self.drop(self.norm(inputs))[:, :4]

class outer:
    inner = staticmethod(fixed)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder that holds a module of models."""
    (tmp_path / "own_models.py").write_text(CODE)
    (tmp_path / "broken_models.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("")
    (tmp_path / "own_package" / "nets.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in ("own_models", "own_package", "broken_models")]:
        del sys.modules[name]


def test_an_mlp_has_the_sizes_and_names_of_its_spec() -> None:
    model = build_model("mlp:784-800-30-10", 10, (1, 28, 28))
    assert isinstance(model, MLP)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes == {
        "layers.0.weight": (800, 784),
        "layers.0.bias": (800,),
        "layers.1.weight": (30, 800),
        "layers.1.bias": (30,),
        "layers.2.weight": (10, 30),
        "layers.2.bias": (10,),
    }
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_an_mlp_without_hidden_layers_is_a_linear_map() -> None:
    assert len(list(build_model("mlp:5-3").parameters())) == 2


def test_dropout_is_part_of_the_spec() -> None:
    model = build_model("mlp:8-4-2,dropout=0.5,input_dropout=0.2")
    assert isinstance(model, MLP)
    assert (model.dropout, model.input_dropout) == (0.5, 0.2)
    assert list(model.state_dict()) == list(build_model("mlp:8-4-2").state_dict())


def test_a_cnn_has_the_widths_and_names_of_its_spec() -> None:
    model = build_model("cnn:3-8-16-5", 5, (3, 32, 32))
    assert isinstance(model, CNN)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert shapes == {
        "blocks.0.conv.weight": (8, 3, 3, 3),
        "blocks.0.norm.weight": (8,),
        "blocks.0.norm.bias": (8,),
        "blocks.1.conv.weight": (16, 8, 3, 3),
        "blocks.1.norm.weight": (16,),
        "blocks.1.norm.bias": (16,),
        "head.weight": (5, 16),
        "head.bias": (5,),
    }


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (8, 8), (33, 20)])
def test_a_cnn_takes_images_of_any_size(size: tuple[int, int]) -> None:
    model = build_model("cnn:1-4-4-4-4-6").train()
    assert model(torch.randn(2, 1, *size)).shape == (2, 6)


@pytest.mark.parametrize("spec", ["mlp:48-6-4", "cnn:3-4-8-4"])
def test_built_in_models_can_be_exported_and_scripted(spec: str) -> None:
    model, inputs = build_model(spec).eval(), torch.randn(2, 3, 4, 4)
    program = torch.export.export(model, (inputs,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    assert torch.allclose(program.module()(inputs[:1]), model(inputs[:1]), atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "num_classes", "shape", "message"),
    [
        ("mlp:784-8-10", 100, None, "expected 100 classes, got 10; use mlp:784-8-100$"),
        ("mlp:784-8-10", 10, (1, 8, 8), r"expected 64 inputs \(input 1x8x8\), got 784; use mlp:64-8-10$"),
        (
            "mlp:7-8-9,dropout=0.5",
            10,
            (8,),
            r"8 inputs \(input 8\) and 10 classes, got 7 and 9; use mlp:8-8-10,dropout=0.5",
        ),
        ("cnn:3-8-10", 10, (1, 28, 28), r"expected 1 channels \(input 1x28x28\), got 3; use cnn:1-8-10$"),
        (
            "cnn:3-8-10",
            10,
            (64,),
            r"expected images \(channels x height x width\), got inputs of shape 64; use mlp:64-",
        ),
        ("mlp", None, None, "expected a spec such as mlp:784-800-800-10, .*, got none of them"),
        ("mlp:", None, None, "expected a spec such as"),
        ("mlp:7", None, None, "expected inputs and classes, as in mlp:784-800-800-10, got 1 sizes"),
        ("cnn:3-10", None, None, "expected input channels, at least one width, and classes, .*, got 2 sizes"),
        ("mlp:a-b", None, None, "expected sizes above 0 joined by '-', .*, got 'a-b'"),
        ("mlp:7-0-3", None, None, "sizes above 0"),
        ("mlp:7-²-3", None, None, "sizes above 0"),
        ("mlp:5-5,dropout=1", None, None, "expected dropout from 0 to below 1, got '1'"),
        ("mlp:5-5,dropout=x", None, None, "expected dropout from 0 to below 1, got 'x'"),
        ("mlp:5-5,dropout=0.1,dropout=0.1", None, None, "at most once, got 'dropout=0.1'"),
        (
            "mlp:5-5,depth=3",
            None,
            None,
            "expected each of the options dropout, input_dropout at most once, got 'depth=3'",
        ),
        ("cnn:3-4-5,dropout=0.1", None, None, "expected no options, got 'dropout=0.1'"),
        ("no such:thing", None, None, "expected a spec such as"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused_with_what_would(
    spec: str, num_classes: int | None, shape: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(StudentError, match=message) as caught:
        build_model(spec, num_classes, shape)
    assert str(caught.value).startswith(f"model '{spec}': ")


@pytest.mark.parametrize(
    "spec",
    ["own_models:Linear", "own_models:fixed", "own_models:needs", "own_models:outer.inner", "own_package.nets:fixed"],
)
def test_a_callable_is_found_in_the_current_folder(spec: str, here: Path) -> None:
    assert build_model(spec, 4, (6,))(torch.zeros(2, 6)).shape == (2, 4)


def test_a_callable_is_given_the_classes_if_it_takes_them(here: Path) -> None:
    assert build_model("own_models:Linear", 7, (6,))(torch.zeros(1, 6)).shape == (1, 7)
    assert build_model("own_models:Linear")(torch.zeros(1, 6)).shape == (1, 4)


def test_the_current_folder_shadows_nothing_afterwards(here: Path) -> None:
    before = sys.path.copy()
    build_model("own_models:fixed")
    assert sys.path == [*before, str(here)]


def test_trying_a_model_leaves_its_modes_and_the_random_numbers_alone(here: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    model = build_model("own_models:Noisy", 4, (6,))
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == [True, False, True]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("own_models:fixe", "expected 'fixe' in module own_models, got no such name; did you mean fixed?"),
        ("own_models:zzz", "expected 'zzz' in module own_models, got no such name; check its spelling"),
        ("own_models:NUMBER", "expected a callable that returns a torch.nn.Module, got int"),
        ("own_models:text", "expected a callable that returns a torch.nn.Module, got str"),
        ("own_models:fails", "got KeyError at own_models.py, line 21: 'weights.*moon'; mend the model"),
        ("own_models:Pair", r"expected logits of shape \(N, 4\) for inputs of shape \(N, 6\), got tuple"),
        ("broken_models:x", "got ModuleNotFoundError at broken_models.py, line 1: No module named 'a_module_that"),
        ("not_there:x", "expected a module not_there, got none of that name"),
        ("own_package.not_there:x", "expected a module own_package.not_there, got none of that name"),
        ("torch.nn:Identity", r"expected logits of shape \(N, 4\) .*, got shape \(N, 6\); give it 4 classes"),
        ("torch.nn:Linear", "expected a model that can be built, got TypeError: "),
    ],
)
def test_a_callable_that_does_not_fit_is_refused_in_one_line(spec: str, message: str, here: Path) -> None:
    with pytest.raises(StudentError, match=message) as caught:
        build_model(spec, 4, (6,))
    assert "\n" not in str(caught.value)


def test_a_callable_that_needs_classes_is_refused_without_them(here: Path) -> None:
    with pytest.raises(StudentError, match="expected a number of classes for it, got none"):
        build_model("own_models:needs")


def test_an_input_that_a_model_does_not_take_is_named(here: Path) -> None:
    with pytest.raises(StudentError, match=r"expected a model that takes an input of shape \(5,\), got RuntimeError"):
        build_model("own_models:fixed", 4, (5,))


def test_timm_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(StudentError, match=r"expected timm installed, .*; run: pip install 'logitstore\[vision\]'"):
        build_model("timm:resnet18", 10, (3, 32, 32))


def test_timm_models_get_the_classes_and_the_channels() -> None:
    pytest.importorskip("timm")
    model = build_model("timm:resnet18", 7, (1, 32, 32))
    assert isinstance(model, nn.Module)
    assert model.eval()(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    with pytest.raises(StudentError, match="expected a model that timm knows, got 'resnet_18'; did you mean "):
        build_model("timm:resnet_18")
