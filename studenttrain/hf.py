"""Causal language models of transformers, from a folder on this machine: `hf:DIR`.

Legend: N batch, P positions, C vocabulary entries, W hidden width.

Nothing is downloaded, no code of the folder is run, and what the model is said to do is tried when it is loaded: that
its last layer makes its logits, with the scale and the soft cap of its configuration, and how documents in one
sequence are kept apart. transformers is imported when a model is loaded, not before.
"""

import contextlib
import inspect
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from storage.errors import StudentError
from studenttrain.heads import Head, relative_difference, trying
from studenttrain.hf_files import HfFiles, find_hf_files
from studenttrain.language import keeps_documents_apart, say_documents_leak

SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")  # some multiply, some divide
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len")
HEAD_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
HALF_HEAD_TOLERANCE = 2e-2
PROBED_LOGIT = 40.0  # to which logits are raised, so that a soft cap shows
Packing = Literal["positions", "mask"]
"""How documents are kept apart: transformers makes a mask of the positions itself, or it is given one."""


class HfCausalLM(nn.Module):
    """A causal language model of transformers, called as all language models here are.

    Args:
        model: a `PreTrainedModel` with logits.
        where: how an error names it.

    Attributes:
        num_classes: entries of its vocabulary, those included that only pad it.
        max_positions: positions that its configuration allows, or None where that does not say.
        has_head: whether its logits are what its last layer makes of its hidden states, to rounding.
        packing: how documents are kept apart, or None where the model can't.
    """

    def __init__(self, model: Any, where: str) -> None:
        super().__init__()
        self.model: Any = model
        self.where = where
        config = model.config.get_text_config()
        self.max_positions: int | None = next(
            (value for name in CONTEXTS if isinstance(value := getattr(config, name, None), int) and value > 0), None
        )
        self._taken, self._taken_below = _arguments(model), _arguments(model.base_model)
        self.packing: Packing | None = None
        with _quiet(where), trying(self):
            tokens = torch.randint(config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
            tokens = tokens.to(next(self.parameters()).device)
            self.num_classes: int = self(tokens).shape[2]
            self._head_values = self._find_head_values(tokens)
            self.packing = self._find_packing()
        self.has_head = self._head_values is not None

    def forward(self, token_ids: Tensor, position_ids: Tensor | None = None, hidden_only: bool = False) -> Tensor:
        """Logits (N, P, C) of the next token, or the hidden states (N, P, W) that the head makes them of.

        Args:
            token_ids: int64 (N, P).
            position_ids: int64 (N, P); a 0 begins a document, which sees nothing before it. None: every row is one.
            hidden_only: whether the hidden states are returned.

        Raises:
            StudentError: a row holds several documents, and the model can't keep them apart.
        """
        if hidden_only:
            return self.hidden(token_ids, position_ids)
        logits: Tensor = self._call(self.model, token_ids, position_ids).logits
        return logits

    def hidden(self, token_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Hidden states (N, P, W) as they reach the last layer; arguments and errors as in `forward`."""
        states: Tensor = self._call(self.model.base_model, token_ids, position_ids).last_hidden_state
        return states

    def output_head(self) -> Head:
        """The last layer with the scale and the soft cap of the configuration.

        Raises:
            StudentError: the model's logits are made in some other way.
        """
        if self._head_values is None:
            raise StudentError(
                f"{self.where}: expected logits that its last layer makes of its last hidden state, got others; "
                "use its logits: leave out what needs the head, such as --encoding hidden"
            )
        last = self.model.get_output_embeddings()
        return Head(last.weight, last.bias, *self._head_values)

    def _call(self, model: nn.Module, token_ids: Tensor, position_ids: Tensor | None) -> Any:
        """Run the model, or what lies below its last layer, with what it takes."""
        options: dict[str, Any] = {"use_cache": False}
        if position_ids is not None:
            options["position_ids"] = position_ids
            if self.packing == "mask":
                options["attention_mask"] = _additive_mask(position_ids, self.model.dtype)
            elif self.packing is None and bool((position_ids[:, 1:] == 0).any()):
                raise StudentError(say_documents_leak(self.where))
        taken = self._taken if model is self.model else self._taken_below
        return model(input_ids=token_ids, **{name: value for name, value in options.items() if name in taken})

    def _find_head_values(self, tokens: Tensor) -> tuple[float, float | None] | None:
        """Scale and soft cap with which the last layer makes the logits; None where none of the configuration's do.

        Logits of a fresh model are small, and small ones look the same with and without a cap; so the last layer is
        made louder while it is tried.
        """
        last = self.model.get_output_embeddings()
        if not isinstance(last, nn.Linear) or self.model.base_model is self.model:
            return None
        tolerance = HEAD_TOLERANCE.get(last.weight.dtype, HALF_HEAD_TOLERANCE)
        try:
            hidden = self.hidden(tokens)
            raw = F.linear(hidden, last.weight, last.bias)
            gain = PROBED_LOGIT / float(raw.abs().max().clamp(min=1e-6))
            handle = last.register_forward_hook(lambda _module, _inputs, output: output * gain)
            try:
                loud = self(tokens)
            finally:
                handle.remove()
            plain = self(tokens)
        except Exception:  # noqa: BLE001 - a model of any shape may lie behind it: without a head it is used all the same
            return None
        for scale, soft_cap in _head_values_of(self.model.config.get_text_config()):
            head = Head(last.weight, last.bias, scale, soft_cap)
            louder = Head(last.weight, last.bias, scale * gain, soft_cap)
            if max(_difference(head, hidden, plain), _difference(louder, hidden, loud)) <= tolerance:
                return scale, soft_cap
        return None

    def _find_packing(self) -> Packing | None:
        """The first way in which two documents in one row do not see each other.

        A mask that is given replaces the model's own, and so its sliding window: such models must make theirs.
        """
        config = self.model.config.get_text_config()
        has_window = any("window" in name and type(value) is int for name, value in config.to_dict().items())
        device = next(self.parameters()).device
        ways: tuple[Packing, ...] = ("positions",) if has_window else ("positions", "mask")
        for way in ways:
            self.packing = way
            with contextlib.suppress(Exception):  # a model that does not take a mask may fail in any way
                if keeps_documents_apart(self, config.vocab_size, device):
                    return way
        return None


def _difference(head: Head, hidden: Tensor, expected: Tensor) -> float:
    found = head.logits(hidden)
    return float("inf") if found.shape != expected.shape else relative_difference(found, expected)


def _head_values_of(config: Any) -> Iterator[tuple[float, float | None]]:
    """Scales and soft caps that a configuration may mean."""

    def numbers(names: tuple[str, ...]) -> list[float]:
        values = [getattr(config, name, None) for name in names]
        return [float(value) for value in values if isinstance(value, (int, float)) and value > 0]

    scales = [value for number in numbers(SCALES) for value in (number, 1 / number)]
    return itertools.product([*scales, 1.0], [*numbers(SOFT_CAPS), None])


def _additive_mask(position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """What transformers adds to the scores of attention, (N, 1, P, P): 0 for what is seen."""
    from studenttrain.gpt import document_mask

    seen = document_mask(position_ids)
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def _arguments(model: nn.Module) -> frozenset[str]:
    """Names that a model's forward takes."""
    return frozenset(inspect.signature(model.forward).parameters)


def check_context(model: HfCausalLM, num_positions: int | None) -> None:
    """Refuse sequences that are longer than a model's configuration allows.

    Raises:
        StudentError: they are.
    """
    if num_positions is not None and model.max_positions is not None and num_positions > model.max_positions:
        raise StudentError(
            f"{model.where}: expected sequences of at most {model.max_positions} positions, as its configuration says, "
            f"got {num_positions}; give a smaller --sequence-length, or another model"
        )


def load_hf(
    folder: str | Path,
    where: str,
    *,
    needs_weights: bool,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust_pickle: bool = False,
) -> HfCausalLM:
    """A causal language model of a folder, in evaluation mode.

    Args:
        folder: as `save_pretrained` wrote it.
        where: how an error names it.
        needs_weights: whether a folder without weights is refused; otherwise the model begins with random ones.
        dtype: of its weights.
        device: where it goes.
        trust_pickle: whether weights that may run code while they are loaded are.

    Raises:
        StudentError: it can't be loaded; the message says what to do.
    """
    files = find_hf_files(folder, where)
    if files.is_pickled and not trust_pickle:
        raise StudentError(
            f"{where}: expected weights in .safetensors files, got pickled ones, {files.weights[0].name}, which may "
            "run any code when they are loaded; save the model again with save_pretrained, which writes safetensors"
        )
    if needs_weights and not files.weights:
        raise StudentError(
            f"{where}: expected weights beside config.json, got none; copy model.safetensors into the folder"
        )
    try:
        with _quiet(where):
            model = _load(files, where, dtype)
            return HfCausalLM(model.to(device).eval(), where).eval()
    except StudentError:
        raise
    except Exception as error:  # transformers may raise anything
        raise StudentError(
            f"{where}: expected a causal language model that transformers loads, got {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}; mend the folder, or give another"
        ) from error


def _load(files: HfFiles, where: str, dtype: torch.dtype) -> Any:
    """The model itself: attention by torch's own kernels where it can be."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    config = AutoConfig.from_pretrained(str(files.folder), **options)
    auto: Any = AutoModelForCausalLM
    implementations = ("sdpa", "eager")
    for implementation in implementations:
        try:
            if not files.weights:
                return auto.from_config(
                    config, attn_implementation=implementation, dtype=dtype, trust_remote_code=False
                )
            model, found = auto.from_pretrained(
                str(files.folder),
                **options,
                attn_implementation=implementation,
                dtype=dtype,
                use_safetensors=not files.is_pickled,
                output_loading_info=True,
            )
        except (ValueError, ImportError) as error:
            if implementation == implementations[-1] or "scaled_dot_product_attention" not in str(error):
                raise
            continue
        missing = sorted(found["missing_keys"])
        if missing:
            raise StudentError(
                f"{where}: expected weights for '{missing[0]}' ({len(missing)} are missing), got files without; take "
                "another copy of the folder, or save the whole model"
            )
        return model
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _quiet(where: str) -> Iterator[None]:
    """Keep transformers from showing bars, logging and warning: what matters is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging = _import_transformers(where)
        level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if has_bars:
                logging.enable_progress_bar()


def _import_transformers(where: str) -> Any:
    """Its logging."""
    try:
        from transformers.utils import logging
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        raise StudentError(
            f"{where}: expected transformers installed, got none that imports ({reason}); run: "
            "pip install 'logitstore[text]'"
        ) from error
    return logging
