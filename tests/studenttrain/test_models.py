"""Specs of models: what each builds, and what is refused."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from storage.errors import StudentError
from studenttrain.gpt import GPT
from studenttrain.language import is_language_model_spec
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

class Bigram(nn.Embedding):
    def __init__(self, num_classes=9):
        super().__init__(num_classes, num_classes)

class InAnObject(Bigram):
    def forward(self, token_ids, attention_mask=None, position_ids=None):
        assert attention_mask is None and position_ids.shape == token_ids.shape
        return type("Output", (), {"logits": super().forward(token_ids)})

class OfTheLast(Bigram):
    def forward(self, token_ids, positions):
        assert positions.dtype == torch.int64
        return super().forward(token_ids)[:, -1]

class WrongHead(nn.Linear):
    def __init__(self):
        super().__init__(6, 4)

    def hidden(self, inputs):
        return inputs

    def output_head(self):
        from studenttrain.heads import Head
        return Head(self.weight)
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
        ("gpt:2", 9, None, "expected LAYERSxWIDTH, as in gpt:4x128, got '2'; write both as numbers above 0"),
        ("gpt:0x8", 9, None, "expected LAYERSxWIDTH, as in gpt:4x128, got '0x8'"),
        ("gpt:1x8,depth=2", 9, None, "expected each of the options heads, vocab, dropout at most once, got 'depth=2'"),
        ("gpt:1x8,heads=2,heads=2", 9, None, "at most once, got 'heads=2'"),
        ("gpt:1x8,heads=x", 9, None, "expected heads above 0, got 'x'; write a number, such as heads=2"),
        ("gpt:1x8,heads=3", 9, None, "heads: expected a number that divides width 8 into even parts, got 3"),
        ("gpt:1x8,vocab=0", 9, None, "expected vocab above 0, got '0'"),
        ("gpt:1x8,dropout=1", 9, None, "expected dropout from 0 to below 1, got '1'"),
        ("gpt:1x8", None, None, "expected a number of vocabulary entries, got none; add it: gpt:1x8,vocab=256"),
        ("gpt:1x8,vocab=8", 9, None, "expected at least 9 vocabulary entries, got 8; use vocab=9"),
        ("gpt:1x8", 9, (1, 4, 4), "expected a model of inputs of shape 1x4x4, got one of token ids; use mlp:16-"),
        ("hf:no/such/folder", 9, None, "expected a folder with a config.json, .*, got nothing there"),
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


# Language models


def test_a_gpt_has_the_size_of_its_spec() -> None:
    model = build_model("gpt:2x32,heads=4,dropout=0.1", 9, num_positions=6)
    assert isinstance(model, GPT)
    assert (len(model.blocks), model.width, model.num_heads, model.dropout) == (2, 32, 4, 0.1)
    assert model(torch.zeros(3, 6, dtype=torch.int64)).shape == (3, 6, 9)
    for spec, num_classes in (("gpt:1x8,vocab=12", None), ("gpt:1x8,vocab=12", 9)):  # what is more only pads it
        padded = build_model(spec, num_classes, (2, 7), num_positions=6)
        assert padded(torch.zeros(3, 6, dtype=torch.int64)).shape == (3, 6, 12)


def test_which_specs_say_that_they_are_language_models() -> None:
    assert [is_language_model_spec(spec) for spec in ("gpt:4x128", "hf:folder", "mlp:4-2", "own:gpt", "timm:hf")] == [
        True,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize("spec", ["mlp:12-9", "cnn:1-4-9", "timm:resnet18"])
def test_a_model_of_images_is_refused_for_tokens(spec: str) -> None:
    message = "expected a language model, for token ids, got one of other inputs; use gpt:4x128, hf:DIR or your own"
    with pytest.raises(StudentError, match=message):
        build_model(spec, 9, num_positions=6)


@pytest.mark.parametrize("spec", ["own_models:Bigram", "own_models:InAnObject"])
def test_a_language_model_of_the_current_folder_gives_logits_of_every_position(spec: str, here: Path) -> None:
    assert isinstance(build_model(spec, 9, num_positions=6), nn.Module)
    assert isinstance(build_model(spec, 9, (2, 7), 6), nn.Module)
    assert isinstance(build_model(spec, num_positions=6), nn.Module)


@pytest.mark.parametrize(
    ("spec", "num_classes", "message"),
    [
        (
            "own_models:OfTheLast",
            9,
            r"logits of shape \(N, 6, 9\) for int64 token ids \(N, 6\), got shape \(1, 9\) of f",
        ),
        ("own_models:Pair", 9, r"for int64 token ids \(N, 6\), got a tuple; return the logits of every position"),
        ("own_models:fixed", 4, r"expected a model that takes int64 token ids of shape \(N, 6\), got RuntimeError"),
        (
            "own_package.nets:wide",
            9,
            r"logits of shape \(N, 6, 9\) .*, got shape \(N, 6, 8\); give it 9 vocabulary entri",
        ),
    ],
)
def test_what_is_no_language_model_is_refused(spec: str, num_classes: int, message: str, here: Path) -> None:
    (here / "own_package" / "nets.py").write_text(CODE + "\nwide = lambda: Bigram(8)\n")
    with pytest.raises(StudentError, match=message) as caught:
        build_model(spec, num_classes, num_positions=6)
    assert "\n" not in str(caught.value)


def test_a_head_that_does_not_make_the_logits_is_refused(here: Path) -> None:
    message = r"expected output_head\(\).logits\(hidden\(...\)\) to equal its logits, got others, by \S+ of the largest"
    with pytest.raises(StudentError, match=message):
        build_model("own_models:WrongHead", 4, (6,))
