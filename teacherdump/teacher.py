"""The teacher: one model, or an ensemble that speaks as one. Inputs to float32 logits.

Legend: N batch, P positions, Q = P + 1 tokens, R rows (N, or N * P), C classes or vocabulary entries, W width of a
hidden state, M members.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storage.errors import TeacherError
from studenttrain.heads import HasHead, Head, find_head
from studenttrain.language import NoLogitsError, sequence_logits, sequence_output
from teacherdump.config import Combine, Precision
from teacherdump.loading import Member, last_line, load_member
from teacherdump.model_file import teacher_identity

# An answer that changes by more than this share of the largest logit, when nothing but chance or its neighbours in the
# batch changed, is that of a model in training mode; rounding stays far below it.
MAX_CHANGE = 1e-2

# Logits of a language model that are in memory together, where its head can be run apart from the rest of it.
CHUNK_VALUES = {"cpu": 1 << 23, "cuda": 1 << 28}


class TeacherMemoryError(TeacherError):
    """The batch does not fit the device: give a smaller one."""


@dataclass(frozen=True)
class Said:
    """What a teacher says of some rows, in their order.

    Attributes:
        logits_RC: float32.
        hidden_RW: the hidden states that they were made from, where they were asked for.
    """

    logits_RC: Tensor  # noqa: N815
    hidden_RW: Tensor | None  # noqa: N815


@dataclass(frozen=True)
class Teacher:
    """A teacher on its device.

    Attributes:
        members: its models, one or more.
        identity: who it is, as the manifest keeps it.
        device: where it runs.
    """

    members: tuple[Member, ...]
    identity: Mapping[str, Any]
    device: torch.device

    @property
    def digest(self) -> str:
        """sha256 of its file, or of its members' digests and how they are combined."""
        return str(self.identity["digest"])

    @property
    def kind(self) -> str:
        """`program`, `torchscript`, `weights`, `module` or `ensemble`."""
        return str(self.identity["kind"])

    @property
    def arch(self) -> str | None:
        """What its weights belong to, or None where the file says it itself."""
        arch: str | None = self.identity["arch"]
        return arch

    @property
    def max_batch(self) -> int | None:
        """Rows that every member takes in one pass, or None for any number."""
        return min((member.max_batch for member in self.members if member.max_batch is not None), default=None)

    def describe(self) -> dict[str, Any]:
        """Who it is, as the manifest keeps it."""
        return dict(self.identity)

    def __call__(self, inputs_N: Tensor) -> Tensor:
        """Float32 logits (N, C) of inputs (N, ...) on the teacher's device.

        Raises:
            TeacherError: a member does not take the inputs, or does not give logits.
            TeacherMemoryError: the batch does not fit the device.
        """
        with torch.inference_mode(), _arithmetic(self.identity["precision"], self.device):
            logits = [_logits_of(member, inputs_N) for member in self.members]
        with torch.inference_mode():
            return self._combine(logits)

    def speak(self, inputs: Tensor, keeps_hidden: bool = False) -> Iterator[Said]:
        """What it says of samples (N, ...), in parts whose rows are those of the batch, in order.

        Args:
            inputs: on the teacher's device.
            keeps_hidden: whether the hidden states are wanted; only of a teacher that has a head.

        Raises:
            TeacherError: a member does not take the inputs, or does not give logits.
            TeacherMemoryError: the batch does not fit the device.
        """
        if keeps_hidden:
            head, hidden_NW = self.head(), self._hidden(self.members[0], inputs, None)
            yield Said(self._head_logits(head, hidden_NW), hidden_NW)
        else:
            yield Said(self(inputs), None)

    def speak_tokens(
        self,
        samples_N2Q: Tensor,
        num_classes: int | None = None,
        keeps_hidden: bool = False,
        is_one_document: bool = False,
    ) -> Iterator[Said]:
        """What it says of each position of sequences; where every member has a head, a chunk of positions at a time.

        Args:
            samples_N2Q: token ids and position ids (N, 2, P + 1), int64, on the teacher's device.
            num_classes: entries of the vocabulary; what the teacher's output has behind them is cut off. None keeps
                all.
            keeps_hidden: whether the hidden states are wanted; only of a teacher that has a head.
            is_one_document: whether it is known that no document begins inside a sequence, which is quicker.

        Raises:
            TeacherError: a member does not take the inputs, or does not give logits.
            TeacherMemoryError: the batch does not fit the device.
        """
        token_ids_NP = samples_N2Q[:, 0, :-1]
        position_ids_NP = None if is_one_document else samples_N2Q[:, 1, :-1]
        models = [find_head(member.module) for member in self.members]
        if not all(model is not None for model in models):
            logits = [self._token_logits(member, token_ids_NP, position_ids_NP) for member in self.members]
            with torch.inference_mode():
                yield Said(self._combine([_cut(logits_RC, num_classes) for logits_RC in logits]), None)
            return
        heads = [model.output_head() for model in models if model is not None]
        heads = [head.cut(min(num_classes or head.num_classes, head.num_classes)) for head in heads]
        hidden = [self._hidden(member, token_ids_NP, position_ids_NP).flatten(0, 1) for member in self.members]
        most = CHUNK_VALUES.get(self.device.type, CHUNK_VALUES["cpu"])
        step = max(1, most // (heads[0].num_classes * len(heads)))
        for start in range(0, len(hidden[0]), step):
            parts = [hidden_RW[start : start + step] for hidden_RW in hidden]
            logits = [self._head_logits(head, part) for head, part in zip(heads, parts, strict=True)]
            with torch.inference_mode():
                combined_RC = self._combine(logits)
            yield Said(combined_RC, parts[0] if keeps_hidden else None)

    def head(self) -> Head:
        """The head of its one model.

        Raises:
            TeacherError: it is an ensemble, or has no head that can be run apart from the rest of it.
        """
        model: HasHead | None = find_head(self.members[0].module)
        if len(self.members) > 1 or model is None:
            got = "an ensemble" if len(self.members) > 1 else "one whose last layer can't be told from the rest"
            raise TeacherError(
                f"{self.members[0].where}: expected a teacher with hidden states and a head for --encoding hidden, got "
                f"{got}; use another encoding, or give the model the methods hidden() and output_head()"
            )
        return model.output_head()

    def _hidden(self, member: Member, inputs: Tensor, position_ids_NP: Tensor | None) -> Tensor:
        """A member's hidden states, of samples or of token ids."""
        if inputs.dtype.is_floating_point:
            inputs = inputs.to(member.input_dtype)
        with (
            torch.inference_mode(),
            _arithmetic(self.identity["precision"], self.device),
            _errors_of(member.where, tuple(inputs.shape), self.device),
        ):
            if inputs.dtype.is_floating_point:
                hidden: Tensor = member.module(inputs, hidden_only=True)
            else:
                hidden = sequence_output(member.module, inputs, position_ids_NP, hidden_only=True)
            return hidden

    def _head_logits(self, head: Head, hidden_RW: Tensor) -> Tensor:
        with torch.inference_mode(), _arithmetic(self.identity["precision"], self.device):
            return head.logits(hidden_RW).float()

    def _token_logits(self, member: Member, token_ids_NP: Tensor, position_ids_NP: Tensor | None) -> Tensor:
        """A member's logits of every position, float32 (R, C); batches that are too small are padded with zeros."""
        num_rows, num_positions = token_ids_NP.shape
        missing = max(0, member.min_batch - num_rows)
        if missing:
            token_ids_NP = torch.cat([token_ids_NP, token_ids_NP.new_zeros(missing, num_positions)])
            if position_ids_NP is not None:
                ahead_P = torch.arange(num_positions, device=token_ids_NP.device)
                position_ids_NP = torch.cat([position_ids_NP, ahead_P.expand(missing, -1)])
        with (
            torch.inference_mode(),
            _arithmetic(self.identity["precision"], self.device),
            _errors_of(member.where, tuple(token_ids_NP.shape), self.device),
        ):
            logits_NPC = sequence_logits(member.module, token_ids_NP, position_ids_NP)
        return logits_NPC[:num_rows].flatten(0, 1).float()

    def _combine(self, logits: Sequence[Tensor]) -> Tensor:
        if len(logits) == 1:
            return logits[0]
        counts = [value.shape[1] for value in logits]
        if len(set(counts)) > 1:
            other = next(index for index, count in enumerate(counts) if count != counts[0])
            raise TeacherError(
                f"{self.members[other].where}: expected {counts[0]} classes, as the first model gives, got "
                f"{counts[other]}; an ensemble's models must share their classes"
            )
        stacked_MNC = torch.stack(list(logits))
        if self.identity["combine"] == "mean-logits":
            return stacked_MNC.mean(0)
        return stacked_MNC.log_softmax(2).logsumexp(0) - math.log(len(logits))


def load_teacher(
    paths: Sequence[str | Path],
    arch: str | None = None,
    combine: Combine | None = None,
    device: str = "auto",
    precision: Precision = "fp32",
    compile: bool = False,  # noqa: A002 - the name of the option
    trust_pickle: bool = False,
) -> Teacher:
    """A teacher of model files, each a `torch.export` program, a TorchScript archive or weights.

    Args:
        paths: model files; more than one is an ensemble.
        arch: spec of what weights belong to; for weights only.
        combine: `mean-probs` (the default): the log of the arithmetic mean of the members' softmax at T = 1;
            `mean-logits`: the mean of their logits. For an ensemble only.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        precision: of matrix products and convolutions; fp16 on CUDA only. `fp32` is float32 throughout, without TF32.
        compile: whether the models go through `torch.compile`.
        trust_pickle: whether a file may run code while it is loaded.

    Raises:
        TeacherError: a file can't be used; the message says what to do.
        ValueError: an option is out of range, or would be ignored.
    """
    identity = teacher_identity(paths, arch, combine, precision)
    where = find_device(device)
    if precision == "fp16" and where.type != "cuda":
        raise ValueError(f"precision: expected fp32 or bf16 on {where.type}, got fp16; use bf16, or --device cuda")
    members = tuple(load_member(path, arch, where, trust_pickle, precision) for path in paths)
    if compile:
        members = tuple(_compiled(member) for member in members)
    return Teacher(members, identity, where)


def find_device(device: str) -> torch.device:
    """The device of its name; `auto` is CUDA where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    num_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda" if num_cuda else "cpu")
    name, _, index = device.partition(":")
    if name not in ("cpu", "cuda") or (index and (name == "cpu" or not index.isdigit())):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {device!r}")
    if name == "cuda" and int(index or 0) >= num_cuda:
        raise ValueError(
            f"device: expected one of {num_cuda} CUDA devices of this machine, got {device}; use --device cpu or auto"
        )
    return torch.device(device)


def _compiled(member: Member) -> Member:
    if isinstance(member.module, torch.jit.ScriptModule):
        raise ValueError(  # noqa: TRY004 - an option that does not fit the file
            f"compile: expected a model that torch.compile takes, got TorchScript, {member.where}; leave it out"
        )
    module: Any = torch.compile(member.module)
    return replace(member, module=module)


@contextlib.contextmanager
def _arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Autocast to the precision; for fp32 on CUDA, convolutions without TF32, which are torch's own default there."""
    if precision != "fp32":
        with torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16):
            yield
    elif device.type == "cuda":
        cudnn = torch.backends.cudnn
        with cudnn.flags(cudnn.enabled, cudnn.benchmark, cudnn.deterministic, allow_tf32=False):
            yield
    else:
        yield


def _logits_of(member: Member, inputs_N: Tensor) -> Tensor:
    """A member's logits, float32 (N, C); batches that are too small for it are padded with zeros."""
    num_rows, shape = len(inputs_N), tuple(inputs_N.shape[1:])
    _check_input_shape(member, shape)
    if num_rows < member.min_batch:
        inputs_N = torch.cat([inputs_N, inputs_N.new_zeros(member.min_batch - num_rows, *shape)])
    fed = tuple(inputs_N.shape)
    with _errors_of(member.where, fed, inputs_N.device):
        output: Any = member.module(inputs_N.to(member.input_dtype))
    return _checked_logits(member.where, output, fed[0])[:num_rows].float()


@contextlib.contextmanager
def _errors_of(where: str, shape: tuple[int, ...], device: torch.device) -> Iterator[None]:
    """Say in one line what a model's own code made of inputs of a shape."""
    try:
        yield
    except TeacherError:
        raise
    except NoLogitsError as error:
        raise TeacherError(
            f"{where}: expected logits (N, P, C) of token ids (N, P), here ({shape[0]}, {shape[1]}, C), got {error}; "
            "wrap the model so that it returns one row of logits a position"
        ) from error
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise TeacherMemoryError(
                f"{where}: expected a batch of {shape[0]} to fit the memory of {device}, got none left; "
                "give a smaller --batch-size"
            ) from error
        raise TeacherError(
            f"{where}: expected a model that takes inputs of shape {shape}, got {last_line(error)}; if the "
            f"shape is wrong, {_shape_advice(shape[1:])}"
        ) from error


def _cut(logits_RC: Tensor, num_classes: int | None) -> Tensor:
    return logits_RC if num_classes is None else logits_RC[:, :num_classes]


def _check_input_shape(member: Member, shape: tuple[int, ...]) -> None:
    wanted = member.input_shape
    if wanted is None:
        return
    if len(wanted) != len(shape) or any(mine not in (None, size) for mine, size in zip(wanted, shape, strict=True)):
        text = _shape_text(wanted)
        advice = "export the program for inputs of that shape, or give samples of it"
        if len(wanted) == len(shape) == 3:
            options = []
            if wanted[1] and wanted[2] and wanted[1:] != shape[1:]:
                options.append(f"--image-size {wanted[1]}x{wanted[2]}")
            if wanted[0] in (1, 3) and wanted[0] != shape[0]:
                options.append(f"--channels {wanted[0]}")
            if options and shape[0] in (1, 3):
                advice = f"for images say {' '.join(options)}"
        raise TeacherError(f"{member.where}: expected samples of shape {text}, got {shape}; {advice}")


def _shape_text(shape: tuple[int | None, ...]) -> str:
    """A shape as Python writes it, with `any` where a size is not fixed."""
    sizes = ["any" if size is None else str(size) for size in shape]
    return f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"


def _shape_advice(shape: tuple[int, ...]) -> str:
    """What may be wrong about samples of a shape: only images have a size and channels to choose."""
    is_image = len(shape) == 3 and shape[0] in (1, 3)
    return "say --image-size, --channels or another --arch" if is_image else "give other samples, or another --arch"


def _checked_logits(where: str, output: Any, num_rows: int) -> Tensor:
    """The logits of a model's output: a tensor (N, C), or what it has under `logits`, as transformers' models do."""
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        output = output.logits
    if isinstance(output, (tuple, list)) and len(output) == 1:
        output = output[0]
    expected = f"logits (N, C), here ({num_rows}, C)"
    if not isinstance(output, Tensor):
        raise TeacherError(
            f"{where}: expected {expected}, got a {type(output).__name__}; wrap the model so that it returns its logits"
        )
    if output.ndim != 2 or len(output) != num_rows or output.shape[1] < 1:
        raise TeacherError(
            f"{where}: expected {expected}, got shape {tuple(output.shape)}; wrap the model so that it returns one row "
            "of logits a sample"
        )
    if not output.dtype.is_floating_point:
        raise TeacherError(
            f"{where}: expected {expected} of floats, got {output.dtype}; return the logits, not the top class"
        )
    return output


@dataclass(frozen=True)
class Probe:
    """What a first batch told of a teacher.

    Attributes:
        num_classes: classes of its logits.
        notes: what a person should look at, a line each.
    """

    num_classes: int
    notes: tuple[str, ...]


def probe_teacher(teacher: Teacher, inputs_N: Tensor) -> Probe:
    """Run a teacher on a few samples, and see whether it is in eval mode: the same answer twice, and in any company.

    Raises:
        TeacherError: it does not give logits, is random, or mixes the rows of a batch.
    """
    where = teacher.members[0].where
    if any(member.takes_tokens for member in teacher.members):
        raise TeacherError(
            f"{where}: expected a model of samples, got a language model; give token ids or text as --data, with "
            "--sequence-length"
        )
    logits_NC = teacher(inputs_N)
    if _change(logits_NC, teacher(inputs_N)) > MAX_CHANGE:
        raise TeacherError(
            f"{where}: expected the same logits for the same batch, got others; it draws random numbers, as dropout in "
            "training mode does: call model.eval() before it is traced or exported"
        )
    alone_NC = teacher(inputs_N[:1].expand_as(inputs_N))
    if _change(logits_NC[:1], alone_NC[:1]) > MAX_CHANGE:
        raise TeacherError(
            f"{where}: expected logits that do not depend on the other samples of a batch, got others in other "
            "company; batch normalisation is in training mode: call model.eval() before it is traced or exported"
        )
    notes = []
    is_sum_one = ((logits_NC.sum(1) - 1).abs() < 1e-3).all() and (logits_NC >= 0).all()
    if is_sum_one and logits_NC.shape[1] > 1:
        notes.append("the teacher's outputs look like probabilities, not logits: every row is positive and sums to one")
    return Probe(logits_NC.shape[1], tuple(notes))


def probe_tokens(teacher: Teacher, samples_N2Q: Tensor, has_several_documents: bool) -> Probe:
    """Run a language model on a few sequences: the same answer twice, in any company, and none from what comes later.

    Args:
        teacher: on its device.
        samples_N2Q: token ids and position ids, int64, on the same device.
        has_several_documents: whether a sequence of the corpus may hold more than one.

    Raises:
        TeacherError: it does not give logits of every position, is random, mixes the rows of a batch, looks ahead, or
            looks from one document into another.
    """
    where = teacher.members[0].where
    for member in teacher.members:
        member.check_positions(samples_N2Q.shape[2] - 1)

    def said(samples: Tensor) -> Tensor:
        logits_RC = torch.cat([part.logits_RC for part in teacher.speak_tokens(samples)])
        return logits_RC.view(len(samples), samples.shape[2] - 1, -1)

    logits_NPC = said(samples_N2Q)
    if _change(logits_NPC, said(samples_N2Q)) > MAX_CHANGE:
        raise TeacherError(
            f"{where}: expected the same logits for the same batch, got others; it draws random numbers, as dropout in "
            "training mode does: call model.eval() before it is exported"
        )
    if _change(logits_NPC[:1], said(samples_N2Q[:1])) > MAX_CHANGE:
        raise TeacherError(
            f"{where}: expected logits that do not depend on the other sequences of a batch, got others in other "
            "company; call model.eval() before it is exported"
        )
    half = samples_N2Q.shape[2] // 2
    changed_N2Q = samples_N2Q.clone()
    changed_N2Q[:, 0, half:] = samples_N2Q[:, 0, half:].flip(1)
    if half and _change(logits_NPC[:, :half], said(changed_N2Q)[:, :half]) > MAX_CHANGE:
        raise TeacherError(
            f"{where}: expected logits of a position that depend on the tokens up to it, got others when a later token "
            "changed; give a causal language model"
        )
    if has_several_documents and half:
        _probe_documents(teacher, samples_N2Q, half, said)
    return Probe(logits_NPC.shape[2], ())


def _probe_documents(teacher: Teacher, samples_N2Q: Tensor, half: int, said: Callable[[Tensor], Tensor]) -> None:
    """Refuse a model that sees one document from another: other tokens in the first must leave the second alone."""
    two_N2Q = samples_N2Q.clone()
    ahead = torch.arange(samples_N2Q.shape[2], device=samples_N2Q.device)
    two_N2Q[:, 1] = torch.where(ahead < half, ahead, ahead - half)
    other_N2Q = two_N2Q.clone()
    other_N2Q[:, 0, :half] = two_N2Q[:, 0, half - 1 : half]
    if _change(said(two_N2Q)[:, half:], said(other_N2Q)[:, half:]) > MAX_CHANGE:
        raise TeacherError(
            f"{teacher.members[0].where}: expected a model that sees each document of a packed sequence alone, as its "
            "position_ids say, got one that looks across; give a model that takes position_ids, or a corpus without "
            "document boundaries"
        )


def _change(first: Tensor, second: Tensor) -> float:
    """Largest difference of finite values, relative to the largest of them."""
    finite = first.isfinite() & second.isfinite()
    if not finite.any():
        return 0.0
    first, second = first[finite], second[finite]
    return float((first - second).abs().max() / first.abs().max().clamp(min=1e-6))
