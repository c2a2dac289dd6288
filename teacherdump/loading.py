"""Model files to modules: `torch.export` programs, TorchScript archives, weights, trusted pickles, transformers.

Legend: N batch, C classes or vocabulary entries, P positions.
"""

import contextlib
import io
import json
import logging
import pickle
import pickletools
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from storage.errors import StudentError, TeacherError
from studenttrain.gpt import GPT
from studenttrain.hf import HfCausalLM, load_hf
from studenttrain.models import build_model
from teacherdump.config import Precision
from teacherdump.model_file import HF_PREFIX, file_kind, hf_files

WRAPPERS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before each name


@dataclass(frozen=True)
class Member:
    """One model of a teacher, on its device, in eval mode.

    Attributes:
        where: how an error names it.
        module: inputs (N, ...) to logits (N, C); of a language model token ids (N, P), and position ids where it takes
            them, to logits (N, P, C).
        input_dtype: what it is fed; int64 of what is known to be a language model.
        input_shape: shape of one sample that it takes, None for a size that is free; None where it doesn't say.
        min_batch: rows that it takes at least; smaller batches are padded.
        max_batch: rows that it takes at most, or None.
        num_inputs: tensors that a program takes: 2 of one that takes position ids too.
        max_positions: positions of a sequence that a language model takes at most, or None where it doesn't say.
    """

    where: str
    module: nn.Module
    input_dtype: torch.dtype
    input_shape: tuple[int | None, ...] | None = None
    min_batch: int = 1
    max_batch: int | None = None
    num_inputs: int = 1
    max_positions: int | None = None

    @property
    def takes_tokens(self) -> bool:
        """Whether it is known to be a language model; what is code or TorchScript may be one all the same."""
        return self.input_dtype == torch.int64

    def check_positions(self, num_positions: int) -> None:
        """Refuse sequences of a length that it does not take.

        Raises:
            TeacherError: it takes shorter ones, or those of one other length.
        """
        fixed = None if self.input_shape is None or len(self.input_shape) != 1 else self.input_shape[0]
        if fixed is not None and fixed != num_positions:
            raise TeacherError(
                f"{self.where}: expected sequences of {fixed} positions, for which it was exported, got "
                f"{num_positions}; say --sequence-length {fixed}, or export it with a dynamic second dimension"
            )
        if self.max_positions is not None and num_positions > self.max_positions:
            raise TeacherError(
                f"{self.where}: expected sequences of at most {self.max_positions} positions, got {num_positions}; say "
                f"--sequence-length {self.max_positions} or less"
            )


def load_member(
    path: str | Path, arch: str | None, device: torch.device, trust_pickle: bool, precision: Precision = "fp32"
) -> Member:
    """A model file, or a folder of transformers, as a module on the device.

    Args:
        path: of the file, or `hf:DIR`.
        arch: what weights belong to.
        device: where it goes.
        trust_pickle: whether it may run code while it is loaded.
        precision: in which a folder of transformers is loaded; other models keep their own and are run under autocast.

    Raises:
        TeacherError: it is missing, damaged, pickled, no model, not in eval mode, or does not fit `arch`.
    """
    where, kind = f"teacher '{path}'", file_kind(path)
    if kind == "hf":
        return _load_hf(path, where, device, trust_pickle, precision)
    if kind == "program":
        return _load_program(path, where, device, trust_pickle)
    if kind == "torchscript":
        module = _load_torchscript(path, where, device)
    else:
        module = _load_weights_or_pickle(path, where, kind, arch, trust_pickle).to(device)
    module.eval()
    training = [name or type(module).__name__ for name, part in module.named_modules() if part.training]
    if training:
        raise TeacherError(
            f"{where}: expected every part in eval mode, got {training[0]!r} still in training mode after .eval(); "
            "mend its train() method"
        )
    if isinstance(module, (GPT, HfCausalLM)):
        return Member(where, module, torch.int64, max_positions=getattr(module, "max_positions", None))
    return Member(where, module, _floating_dtype(module))


def _load_hf(path: str | Path, where: str, device: torch.device, trust_pickle: bool, precision: Precision) -> Member:
    files = hf_files(path)
    if files.is_pickled and not trust_pickle:
        raise _pickled(where, f"pickled weights, '{files.weights[0].name}'", "the model with save_pretrained")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    try:
        module = load_hf(files.folder, where, needs_weights=True, dtype=dtype, device=device, trust_pickle=trust_pickle)
    except StudentError as error:
        raise TeacherError(str(error)) from error
    return Member(where, module, torch.int64, max_positions=module.max_positions)


def _floating_dtype(module: nn.Module) -> torch.dtype:
    return next((value.dtype for value in module.parameters() if value.dtype.is_floating_point), torch.float32)


def _load_torchscript(path: str | Path, where: str, device: torch.device) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit as a whole is; the archives live on
            module: nn.Module = torch.jit.load(str(path), map_location=device)
    except Exception as error:
        raise _damaged(where, "a TorchScript archive", error) from error
    return module


def _load_program(path: str | Path, where: str, device: torch.device, trust_pickle: bool) -> Member:
    if not trust_pickle:
        _refuse_pickles_inside(path, where)
    try:
        with _quiet_export():
            program = torch.export.load(str(path))
            devices = {str(value.device) for value in program.state_dict.values()} or {"cpu"}
            if devices != {str(device)}:
                program = move_to_device_pass(program, device)
            module = program.module()
    except Exception as error:
        raise _damaged(where, "a torch.export program", error) from error
    _check_program_evaluates(program, where)
    inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    values = [node.meta.get("val") for node in inputs]
    _check_program_inputs(program, values, where)
    shape = values[0].shape
    is_sequence = values[0].dtype == torch.int64 and len(shape) == 2
    least, most = _bounds(program, shape[0])
    return Member(
        where,
        module,
        values[0].dtype,
        tuple(size if isinstance(size, int) else None for size in shape[1:]),
        max(1, least or 1),
        most,
        len(values),
        _bounds(program, shape[1])[1] if is_sequence else None,
    )


def _check_program_inputs(program: torch.export.ExportedProgram, values: Sequence[Any], where: str) -> None:
    """Refuse what does not take a batch by place, or token ids and position ids."""
    is_batch = len(values) == 1 and isinstance(values[0], Tensor) and values[0].ndim >= 2
    is_tokens = len(values) == 2 and all(
        isinstance(value, Tensor) and value.ndim == 2 and value.dtype == torch.int64 for value in values
    )
    if not is_batch and not is_tokens:
        raise TeacherError(
            f"{where}: expected a program that takes one batch (N, ...), or int64 token ids and position ids (N, P), "
            f"got one of {len(values)} inputs; wrap the model so that it takes these alone, and export it again"
        )
    if program.call_spec.in_spec.children()[1].num_children:
        raise TeacherError(
            f"{where}: expected a program that takes its inputs by place, got one exported with names for them; export "
            "it with args=(...) and no kwargs"
        )


def _bounds(program: torch.export.ExportedProgram, size: Any) -> tuple[int | None, int | None]:
    """Smallest and largest size of a dimension, None where there is no bound."""
    if isinstance(size, int):
        return size, size
    interval = program.range_constraints.get(size.node.expr)
    return (None, None) if interval is None else (_finite(interval.lower), _finite(interval.upper))


def _finite(bound: Any) -> int | None:
    """A bound of a dynamic dimension, which sympy keeps; None where there is none."""
    return int(bound) if getattr(bound, "is_Integer", isinstance(bound, int)) else None


def _check_program_evaluates(program: torch.export.ExportedProgram, where: str) -> None:
    """A program has no eval mode: what its graph says was fixed when it was exported."""
    for graph_module in program.graph_module.modules():
        for node in graph_module.graph.nodes if isinstance(graph_module, torch.fx.GraphModule) else ():
            name = str(node.target)
            if node.op != "call_function" or not _is_active(name, node.args):
                continue
            raise TeacherError(
                f"{where}: expected a program that was exported in eval mode, got an active {name}; "
                "call model.eval() before torch.export.export"
            )


def _is_active(name: str, args: Sequence[Any]) -> bool:
    """Whether an operation behaves as in training: random dropout, or statistics of the batch."""
    if re.fullmatch(r"aten\.(\w*dropout_?)\.default", name):
        return len(args) > 2 and args[2] is not False
    if name == "aten.batch_norm.default":
        return len(args) > 5 and args[5] is True
    return name.startswith(("aten._native_batch_norm_legit.default", "aten._native_batch_norm_legit_functional"))


def _refuse_pickles_inside(path: str | Path, where: str) -> None:
    """Refuse a program with objects in it that torch.export.load would unpickle, and so run.

    Tensors and plain containers, which load with `weights_only`, are no such objects.
    """
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            inner = name if name.startswith("serialized_") else name.partition("/")[2]
            if inner.startswith("data/aotinductor/") or re.match(r"data/constants/(custom|opaque)_obj", inner):
                raise _pickled(where, f"'{inner}'")
            is_config = inner.endswith("_config.json")
            payloads = _pickled_payloads(archive, name) if is_config else [name] if inner.endswith(".pt") else []
            for payload in payloads:
                data = archive.read(payload)
                try:
                    if data:
                        torch.load(io.BytesIO(data), weights_only=True)
                except Exception as error:
                    raise _pickled(where, f"'{payload.partition('/')[2]}'") from error


def _pickled_payloads(archive: zipfile.ZipFile, name: str) -> list[str]:
    folder = name.rpartition("/")[0]
    config = json.loads(archive.read(name)).get("config", {})
    return [f"{folder}/{value['path_name']}" for value in config.values() if value.get("use_pickle")]


@contextlib.contextmanager
def _quiet_export() -> Iterator[None]:
    """Keep torch.export from logging tracebacks of what is raised, and said in one line, anyway."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _load_weights_or_pickle(path: str | Path, where: str, kind: str, arch: str | None, trust_pickle: bool) -> nn.Module:
    """Weights in their architecture, or a trusted pickled module."""
    loaded = _load_safetensors(path, where) if kind == "safetensors" else _load_pickle(path, where, trust_pickle)
    if isinstance(loaded, nn.Module):
        if arch is not None:
            raise TeacherError(f"{where}: expected weights for {arch}, got a whole pickled module; leave --arch out")
        return loaded
    state = _state_dict(loaded, where)
    if arch is None:
        raise TeacherError(
            f"{where}: expected --arch beside a file that holds weights only, got none; say what they belong to, such "
            "as --arch mlp:784-1200-1200-10 or --arch package.module:callable"
        )
    return _fill(arch, state, where)


def _load_safetensors(path: str | Path, where: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(where, "a safetensors file", error) from error


def _load_pickle(path: str | Path, where: str, trust_pickle: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols that it may not know: it says so again when it fails
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not zipfile.is_zipfile(path) and not _is_pickle(path):
            raise _damaged(where, "weights that torch.save wrote", error) from error
        if not trust_pickle:
            named = re.search(r"GLOBAL (\S+)", str(error))
            raise _pickled(where, "a pickled " + (named[1] if named else "object")) from error
    except Exception as error:
        raise _damaged(where, "weights that torch.save wrote", error) from error
    folder = str(Path.cwd())
    sys.path.insert(0, folder)  # where the classes that it names may lie
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise _damaged(where, "a pickled module whose classes can be imported from here", error) from error
    finally:
        sys.path.remove(folder)


def _is_pickle(path: str | Path) -> bool:
    """Whether a file begins with a whole pickle, seen without running it."""
    try:
        with Path(path).open("rb") as file:
            for _ in pickletools.genops(file):
                pass
    except Exception:  # noqa: BLE001 - it may fail in any way on bytes that are no pickle
        return False
    return True


def _state_dict(loaded: Any, where: str) -> dict[str, Tensor]:
    """The tensors by name: `loaded` itself, or what it holds under one of the usual names."""
    for _ in range(2):
        inner = [loaded[name] for name in WRAPPERS if isinstance(loaded, Mapping) and name in loaded]
        loaded = next((value for value in inner if isinstance(value, Mapping)), loaded)
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        got = f"{type(loaded).__name__}"
        if isinstance(loaded, Mapping):
            other = next((str(name) for name, value in loaded.items() if not isinstance(value, Tensor)), None)
            got = "nothing in it" if other is None else f"{other!r} that is no tensor"
        raise TeacherError(f"{where}: expected a state_dict, tensors by name, got {got}; save model.state_dict()")
    state = {str(name): value for name, value in loaded.items()}
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _fill(arch: str, state: Mapping[str, Tensor], where: str) -> nn.Module:
    """The architecture with the weights in it."""
    vocabulary = state["embedding.weight"].shape[:1] if "embedding.weight" in state else ()
    module = _build(arch, next(iter(vocabulary), 1) if arch.startswith("gpt:") else None, where)
    num_classes = _other_head(module.state_dict(), state)
    if num_classes is not None and not arch.startswith(("mlp:", "cnn:", "gpt:", HF_PREFIX)):
        with contextlib.suppress(TeacherError):
            module = _build(arch, num_classes, where)
    expected = module.state_dict()
    if isinstance(module, HfCausalLM):
        state = _named_as_in(module, state)
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    advice = "give the --arch that the file belongs to"
    if missing:
        raise TeacherError(
            f"{where}: expected weights for {missing[0]!r} ({len(missing)} of {len(expected)} are missing), got a file "
            f"that begins with {next(iter(state))!r}; {advice}, not {arch}"
        )
    if unexpected:
        raise TeacherError(
            f"{where}: expected nothing beside the weights of {arch}, got {unexpected[0]!r} ({len(unexpected)} are "
            f"unknown to it); {advice}"
        )
    for name, value in expected.items():
        if value.shape != state[name].shape:
            raise TeacherError(
                f"{where}: expected {name!r} of shape {tuple(value.shape)}, as {arch} has it, got "
                f"{tuple(state[name].shape)}; {advice}"
            )
    module.load_state_dict(state)
    return module


def _named_as_in(module: HfCausalLM, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a model of transformers under the names of the module around it, tied ones under all of them."""
    prefix = "model."
    expected = module.state_dict()
    if not any(name in expected for name in state) or all(f"{prefix}{name}" in expected for name in state):
        state = {f"{prefix}{name}": value for name, value in state.items()}
    names = {value.data_ptr(): name for name, value in expected.items() if name in state}
    tied = {
        name: state[names[value.data_ptr()]]
        for name, value in expected.items()
        if name not in state and value.data_ptr() in names
    }
    return {**state, **tied}


def _build(arch: str, num_classes: int | None, where: str) -> nn.Module:
    try:
        return build_model(arch, num_classes)
    except StudentError as error:
        raise TeacherError(f"{where}: --arch: {error}") from error


def _other_head(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> int | None:
    """Classes of the file, where its tensors differ from the model's in nothing but one number of classes."""
    if set(expected) != set(state):
        return None
    pairs = [
        (expected[name].shape, state[name].shape) for name in expected if expected[name].shape != state[name].shape
    ]
    if any(mine[1:] != theirs[1:] or len(theirs) == 0 for mine, theirs in pairs):
        return None
    counts = {theirs[0] for _, theirs in pairs}
    return counts.pop() if len(counts) == 1 else None


def _pickled(where: str, got: str, saved: str = "model.state_dict() or a torch.export program instead") -> TeacherError:
    return TeacherError(
        f"{where}: expected weights or a program, got {got}, which may run any code when it is loaded; save {saved}, "
        "or say --trust-pickle if you made it"
    )


def _damaged(where: str, expected: str, error: BaseException) -> TeacherError:
    return TeacherError(
        f"{where}: expected {expected}, got one that can't be read ({one_line(error)}); it is damaged, or of another "
        "torch release: take another copy, or save it again"
    )


def one_line(error: BaseException) -> str:
    """What an exception says, in one line of at most 200 characters."""
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def last_line(error: BaseException) -> str:
    """Like `one_line`; of an error in TorchScript, whose text is a traceback, only what is wrong."""
    text = str(error)
    if "Traceback of TorchScript" not in text and "TorchScript interpreter" not in text:
        return one_line(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception): ", line)]
    return (said or lines)[-1][:200]
