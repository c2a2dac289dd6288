"""Built-in architectures and the one-line specs that name them.

Legend: N batch, C classes, H height, W width.

A spec is one of

    mlp:INPUTS-UNITS-...-CLASSES[,dropout=P][,input_dropout=P]   mlp:784-800-800-10, mlp:784-1200-1200-10,dropout=0.5
    cnn:CHANNELS-FILTERS-...-CLASSES                             cnn:3-32-64-128-10
    gpt:LAYERSxWIDTH[,heads=H][,vocab=V][,dropout=P]             gpt:4x128, gpt:6x384,heads=6,dropout=0.1
    hf:DIR                                                       hf:models/gpt2, a folder of transformers
    timm:NAME                                                    timm:resnet18, where timm is installed
    package.module:callable                                      found from the current folder too

with at least one width of filters for `cnn`, any number of hidden layers for `mlp`, and P in [0, 1). `gpt` and `hf` are
language models: token ids in, logits of the next token out. `gpt` has as many heads of 64 as fit, and the vocabulary of
what it learns from, unless it is told others; `hf` starts from the folder's weights, or from random ones where it has
none. `timm` models start from random weights. `callable` returns an `nn.Module`; it is given `num_classes` if it takes
an argument of that name, and nothing else. `teacherdump --arch` reads the same specs.
"""

import contextlib
import difflib
import importlib
import inspect
import itertools
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from storage.errors import StudentError
from studenttrain.gpt import GPT
from studenttrain.heads import Head, find_head, head_difference, trying
from studenttrain.hf import check_context, load_hf
from studenttrain.language import NoLogitsError, sequence_logits

GRAMMAR = "mlp:784-800-800-10, cnn:3-32-64-128-10, gpt:4x128, hf:DIR, timm:NAME or package.module:callable"
KINDS_OF_SAMPLES = ("mlp", "cnn", "timm")
KINDS_OF_SEQUENCES = ("gpt", "hf")
MAX_HEAD_DIFFERENCE = 1e-3  # of what a model's head gives to what the model gives, over the largest logit


class MLP(nn.Module):
    """A fully connected ReLU network on flattened input.

    Its weights are named `layers.0.weight`, `layers.0.bias`, `layers.1.weight`, ...

    Args:
        sizes: units of every layer, input first and classes last.
        dropout: probability of dropping a hidden unit while training, in [0, 1).
        input_dropout: probability of dropping an input while training, in [0, 1).

    Source: the architecture of Hinton, Vinyals and Dean 2015, section 3.
    """

    def __init__(self, sizes: Sequence[int], dropout: float = 0.0, input_dropout: float = 0.0) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.dropout = dropout
        self.input_dropout = input_dropout
        self.layers = nn.ModuleList(nn.Linear(num_in, num_out) for num_in, num_out in itertools.pairwise(sizes))

    def forward(self, inputs: Tensor, hidden_only: bool = False) -> Tensor:
        """Logits (N, C) of inputs (N, ...), flattened to (N, sizes[0]); or the hidden states (N, W) before them."""
        hidden = self.hidden(inputs)
        if hidden_only:
            return hidden
        logits: Tensor = self.layers[-1](hidden)
        return logits

    def hidden(self, inputs: Tensor) -> Tensor:
        """What the last layer is given, (N, W)."""
        hidden = inputs.flatten(1)
        hidden = F.dropout(hidden, self.input_dropout, self.training)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):  # a slice of the layers would not go through torch.jit.script
            if index != last:
                hidden = F.dropout(F.relu(layer(hidden)), self.dropout, self.training)
        return hidden

    def output_head(self) -> Head:
        """The last layer."""
        return _head_of(self.layers[-1])


class ConvBlock(nn.Module):
    """A 3x3 convolution, batch normalisation and ReLU; height and width stay."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_in, num_out, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(num_out)

    def forward(self, inputs: Tensor) -> Tensor:
        """Activations (N, num_out, H, W)."""
        return F.relu(self.norm(self.conv(inputs)))


class CNN(nn.Module):
    """A plain convnet: a block for each width, the image halved between two blocks, the mean over it, a linear layer.

    Its weights are named `blocks.0.conv.weight`, `blocks.0.norm.weight`, ..., `head.weight` and `head.bias`.

    Args:
        sizes: input channels first, then the filters of each block, classes last; at least one block.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        *widths, num_classes = self.sizes
        self.blocks = nn.ModuleList(ConvBlock(num_in, num_out) for num_in, num_out in itertools.pairwise(widths))
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, inputs: Tensor, hidden_only: bool = False) -> Tensor:
        """Logits (N, C) of images (N, sizes[0], H, W) of any size; or the hidden states (N, W) before them."""
        hidden = self.hidden(inputs)
        if hidden_only:
            return hidden
        logits: Tensor = self.head(hidden)
        return logits

    def hidden(self, inputs: Tensor) -> Tensor:
        """The mean over the image behind the last block, (N, W)."""
        hidden = inputs
        for index, block in enumerate(self.blocks):
            if index:
                hidden = F.max_pool2d(hidden, 2, ceil_mode=True)
            hidden = block(hidden)
        return hidden.mean((2, 3))

    def output_head(self) -> Head:
        """The last layer."""
        return _head_of(self.head)


def _head_of(layer: nn.Module) -> Head:
    assert isinstance(layer, nn.Linear)
    return Head(layer.weight, layer.bias)


def build_model(
    spec: str,
    num_classes: int | None = None,
    input_shape: Sequence[int] | None = None,
    num_positions: int | None = None,
) -> nn.Module:
    """The model that a spec names, on the CPU, with random weights from torch's generator; `hf` with those it has.

    Args:
        spec: as described at the top of this file.
        num_classes: classes that its logits must have, or None where the spec alone decides. A language model may have
            more: what pads its vocabulary.
        input_shape: shape of one input without its batch, such as (1, 28, 28), or None where it is not known, or where
            `num_positions` says it.
        num_positions: positions of a sequence, where token ids are what it is given; None where they are not.

    Raises:
        StudentError: the spec names no model, or one that does not fit the classes or the input; for the built-in ones
            the message gives the spec that would fit.
    """
    kind, colon, name = spec.partition(":")
    if not colon or not kind or not name:
        raise _error(spec, f"a spec such as {GRAMMAR}", "none of them", "check its spelling")
    _check_kind(spec, kind, input_shape, num_positions)
    if kind in ("mlp", "cnn"):
        return _build_sized(spec, kind, name, num_classes, input_shape)
    if kind == "gpt":
        return _build_gpt(spec, name, num_classes)
    if kind == "hf":
        return _build_hf(spec, name, num_classes, num_positions)
    model = _build_timm(spec, name, num_classes, input_shape) if kind == "timm" else _import(spec, num_classes)
    if num_positions is not None:
        _check_sequence_output(spec, model, num_classes, num_positions)
    elif input_shape is not None:
        _check_output(spec, model, num_classes, input_shape)
    return model


def _check_kind(spec: str, kind: str, input_shape: Sequence[int] | None, num_positions: int | None) -> None:
    """Refuse a model of images for token ids, and a language model for anything else."""
    if num_positions is not None and kind in KINDS_OF_SAMPLES:
        raise _error(
            spec, "a language model, for token ids", "one of other inputs", "use gpt:4x128, hf:DIR or your own"
        )
    if num_positions is None and input_shape is not None and kind in KINDS_OF_SEQUENCES:
        shape = "x".join(map(str, input_shape))
        raise _error(
            spec, f"a model of inputs of shape {shape}", "one of token ids", f"use mlp:{math.prod(input_shape)}-..."
        )


def _build_sized(
    spec: str, kind: str, name: str, num_classes: int | None, input_shape: Sequence[int] | None
) -> nn.Module:
    """An MLP or a CNN, held against the classes and the input."""
    sizes_text, *options_text = name.split(",")
    numbers = sizes_text.split("-")
    example = "mlp:784-800-800-10" if kind == "mlp" else "cnn:3-32-64-128-10"
    if not all(_is_count(number) for number in numbers):
        raise _error(
            spec, f"sizes above 0 joined by '-', as in {example}", repr(sizes_text), "write all sizes as numbers"
        )
    sizes = [int(number) for number in numbers]
    least = 2 if kind == "mlp" else 3
    if len(sizes) < least:
        what = "inputs and classes" if kind == "mlp" else "input channels, at least one width, and classes"
        raise _error(spec, f"{what}, as in {example}", f"{len(sizes)} sizes", "write all of them")
    fitting = [_input_size(spec, kind, input_shape) or sizes[0], *sizes[1:-1], num_classes or sizes[-1]]
    if fitting != sizes:
        wrong = []
        if fitting[0] != sizes[0]:
            shape = "x".join(map(str, input_shape or ()))
            wrong.append((f"{fitting[0]} {'inputs' if kind == 'mlp' else 'channels'} (input {shape})", str(sizes[0])))
        if fitting[-1] != sizes[-1]:
            wrong.append((f"{fitting[-1]} classes", str(sizes[-1])))
        fit = ",".join([f"{kind}:{'-'.join(map(str, fitting))}", *options_text])
        expected, got = (" and ".join(parts) for parts in zip(*wrong, strict=True))
        raise _error(spec, expected, got, f"use {fit}")
    options = _parse_options(spec, kind, options_text)
    return MLP(sizes, **options) if kind == "mlp" else CNN(sizes)


def _input_size(spec: str, kind: str, input_shape: Sequence[int] | None) -> int | None:
    """Inputs of an MLP, or channels of a CNN, that an input shape asks for."""
    if input_shape is None:
        return None
    if kind == "mlp":
        return math.prod(input_shape)
    if len(input_shape) != 3:
        shape = "x".join(map(str, input_shape))
        raise _error(
            spec,
            "images (channels x height x width)",
            f"inputs of shape {shape}",
            f"use mlp:{math.prod(input_shape)}-...",
        )
    return input_shape[0]


def _parse_options(spec: str, kind: str, texts: Sequence[str]) -> dict[str, float]:
    """The `name=value` options behind the sizes."""
    known = ("dropout", "input_dropout") if kind == "mlp" else ()
    options: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in known or name in options:
            expected = f"each of the options {', '.join(known)} at most once" if known else "no options"
            raise _error(spec, expected, repr(text), "leave it out")
        options[name] = _parse_dropout(spec, name, value)
    return options


def _parse_dropout(spec: str, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise _error(spec, f"{name} from 0 to below 1", repr(text), f"write {name}=0.5")
    return value


def _build_gpt(spec: str, name: str, num_classes: int | None) -> GPT:
    """A small decoder, its vocabulary as given or as asked for."""
    size_text, *options_text = name.split(",")
    layers_text, _, width_text = size_text.partition("x")
    if not _is_count(layers_text) or not _is_count(width_text):
        raise _error(spec, "LAYERSxWIDTH, as in gpt:4x128", repr(size_text), "write both as numbers above 0")
    options: dict[str, str] = {}
    for text in options_text:
        option, _, value = text.partition("=")
        if option not in ("heads", "vocab", "dropout") or option in options:
            raise _error(spec, "each of the options heads, vocab, dropout at most once", repr(text), "leave it out")
        options[option] = value
        if option != "dropout" and not _is_count(value):
            raise _error(spec, f"{option} above 0", repr(value), f"write a number, such as {option}=2")
    vocab = int(options.get("vocab") or num_classes or 0)
    if not vocab:
        raise _error(spec, "a number of vocabulary entries", "none", f"add it: {spec},vocab=256")
    if num_classes is not None and vocab < num_classes:
        raise _error(spec, f"at least {num_classes} vocabulary entries", str(vocab), f"use vocab={num_classes}")
    dropout = _parse_dropout(spec, "dropout", options.get("dropout", "0"))
    num_heads = int(options["heads"]) if "heads" in options else None
    try:
        return GPT(int(layers_text), int(width_text), vocab, num_heads, dropout)
    except ValueError as error:
        raise StudentError(f"model '{spec}': {error}") from error


def _build_hf(spec: str, folder: str, num_classes: int | None, num_positions: int | None) -> nn.Module:
    """A model of transformers, whose vocabulary and context hold what they are asked for; neither is changed."""
    model = load_hf(folder, f"model '{spec}'", needs_weights=False)
    if num_classes is not None and model.num_classes < num_classes:
        raise _error(
            spec,
            f"at least {num_classes} vocabulary entries",
            str(model.num_classes),
            "give the model of the tokenizer",
        )
    check_context(model, num_positions)
    return model.train()


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) > 0


def _build_timm(spec: str, name: str, num_classes: int | None, input_shape: Sequence[int] | None) -> nn.Module:
    """A model of timm with random weights, with the input's channels and the classes."""
    try:
        import timm
    except ImportError as error:
        raise _error(
            spec,
            "timm installed",
            f"no timm that imports ({_one_line(error)})",
            "run: pip install 'logitstore[vision]'",
        ) from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        advice = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()"
        raise _error(spec, "a model that timm knows", repr(name), advice)
    options: dict[str, Any] = {}
    if num_classes is not None:
        options["num_classes"] = num_classes
    if input_shape is not None and len(input_shape) == 3:
        options["in_chans"] = input_shape[0]
    with _errors_of(spec):
        model: nn.Module = timm.create_model(name, pretrained=False, **options)
    return model


def _import(spec: str, num_classes: int | None) -> nn.Module:
    """The module that an imported callable returns."""
    module_name, _, attribute = spec.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise _error(spec, f"a spec such as {GRAMMAR}", "none of them", "check its spelling")
    build = _find(spec, module_name, attribute)
    options: dict[str, int] = {}
    try:
        parameter = inspect.signature(build).parameters.get("num_classes")
    except (ValueError, TypeError):
        parameter = None
    if parameter is not None and num_classes is not None:
        options["num_classes"] = num_classes
    elif parameter is not None and parameter.default is inspect.Parameter.empty:
        raise _error(spec, "a number of classes for it", "none", "give the argument num_classes a default")
    with _errors_of(spec):
        model = build(**options)
    if not isinstance(model, nn.Module):
        raise _error(
            spec, "a callable that returns a torch.nn.Module", type(model).__name__, "return the module itself"
        )
    return model


def _find(spec: str, module_name: str, attribute: str) -> Callable[..., Any]:
    """A callable by its module and name; the current folder is looked in first."""
    folder = str(Path.cwd())
    importlib.invalidate_caches()
    sys.path.insert(0, folder)
    try:
        with _errors_of(spec):
            found: Any = importlib.import_module(module_name)
    except StudentError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{module_name}.".startswith(f"{cause.name}."):
            advice = "check its spelling, or run in the folder that it lies in"
            raise _error(spec, f"a module {cause.name}", "none of that name", advice) from cause
        raise
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)  # for what the module imports later; behind all others, so that it shadows none
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [name for name, value in vars(found).items() if callable(value) and not name.startswith("_")]
            near = difflib.get_close_matches(part, names, n=1)
            advice = f"did you mean {near[0]}?" if near else "check its spelling"
            raise _error(spec, f"{part!r} in module {module_name}", "no such name", advice)
        found = getattr(found, part)
    if not callable(found):
        raise _error(
            spec, "a callable that returns a torch.nn.Module", type(found).__name__, "name a function or class"
        )
    build: Callable[..., Any] = found
    return build


def _check_output(spec: str, model: nn.Module, num_classes: int | None, input_shape: Sequence[int]) -> None:
    """Try the model on one input of zeros: its output must be logits (1, C)."""
    with trying(model), _errors_of(spec, f"an input of shape {tuple(input_shape)}"):
        inputs = torch.zeros(1, *input_shape, device=_device_of(model))
        logits = model(inputs)
    wanted = f"logits of shape (N, {'C' if num_classes is None else num_classes}) for inputs of shape (N, "
    wanted += f"{', '.join(map(str, input_shape))})"
    if not isinstance(logits, Tensor):
        raise _error(spec, wanted, type(logits).__name__, "return the logits alone")
    if logits.ndim != 2 or len(logits) != 1 or num_classes not in (None, logits.shape[1]):
        got = f"({', '.join(['N', *map(str, logits.shape[1:])])})"
        raise _error(spec, wanted, f"shape {got}", f"give it {num_classes or 'C'} classes")
    _check_head(spec, model, inputs)


def _check_sequence_output(spec: str, model: nn.Module, num_classes: int | None, num_positions: int) -> None:
    """Try the model on one sequence of token 0: its output must be logits (1, P, V), with V the classes or more."""
    wanted = f"logits of shape (N, {num_positions}, {num_classes or 'C'}) for int64 token ids (N, {num_positions})"
    with trying(model), _errors_of(spec, f"int64 token ids of shape (N, {num_positions})"):
        token_ids = torch.zeros(1, num_positions, dtype=torch.int64, device=_device_of(model))
        try:
            logits = sequence_logits(model, token_ids, torch.arange(num_positions, device=token_ids.device)[None])
        except NoLogitsError as error:
            raise _error(spec, wanted, str(error), "return the logits of every position") from error
    if num_classes is not None and logits.shape[2] < num_classes:
        got = f"shape (N, {', '.join(map(str, logits.shape[1:]))})"
        raise _error(spec, wanted, got, f"give it {num_classes} vocabulary entries, or more")
    _check_head(spec, model, token_ids)


def _check_head(spec: str, model: nn.Module, inputs: Tensor) -> None:
    """Refuse a model whose head on its hidden states does not say what the model does."""
    with trying(model), _errors_of(spec, "what hidden() and output_head() need"):
        found = find_head(model)
        difference = 0.0 if found is None else head_difference(found, inputs)
    if difference > MAX_HEAD_DIFFERENCE:
        raise _error(
            spec,
            "output_head().logits(hidden(...)) to equal its logits",
            f"others, by {difference:.2g} of the largest",
            "mend them, or name them otherwise",
        )


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def _errors_of(spec: str, given: str | None = None) -> Iterator[None]:
    """Say in one line what went wrong in code behind a spec, and where in it."""
    try:
        yield
    except StudentError:
        raise
    except Exception as error:  # code that is not ours may raise anything
        frame = traceback.extract_tb(error.__traceback__)[-1]
        ours = frame.filename == __file__ or frame.filename.startswith("<")
        place = "" if ours else f" at {Path(frame.filename).name}, line {frame.lineno}"
        expected = "a model that can be built" if given is None else f"a model that takes {given}"
        reason = f"{type(error).__name__}{place}: {_one_line(error)}"
        raise _error(spec, expected, reason, "mend the model or give another") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _error(spec: str, expected: str, got: str, advice: str) -> StudentError:
    return StudentError(f"model '{spec}': expected {expected}, got {got}; {advice}")
