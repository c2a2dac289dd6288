"""Causal models of transformers from a folder: the same logits, the head apart, documents apart, nothing said aloud."""

import importlib
import json
import logging
import shutil
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from storage.errors import StudentError
from studenttrain.heads import find_head, head_difference
from studenttrain.hf import HfCausalLM, check_context, load_hf
from studenttrain.hf_files import find_hf_files
from studenttrain.language import check_documents, sequence_logits
from studenttrain.models import build_model

pytest.importorskip("transformers")

VOCABULARY = 40
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "llama": SMALL,
    "qwen2": {**SMALL, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "gemma2": {**SMALL, "head_dim": 8, "sliding_window": 3, "final_logit_softcapping": 30.0},
    "cohere": {**SMALL, "logit_scale": 0.0625},
    "granite": {**SMALL, "logits_scaling": 8.0},
    "mpt": {"vocab_size": VOCABULARY, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 32},
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    "bert": {**SMALL, "is_decoder": True},
}
Making = Callable[..., Path]


@pytest.fixture(scope="module")
def making(tmp_path_factory: pytest.TempPathFactory) -> Making:
    """Folders with a small random model of a kind, made once; weights are made louder, so that all of it shows."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            transformers: Any = importlib.import_module("transformers")
            transformers.logging.set_verbosity(logging.CRITICAL)
            transformers.logging.disable_progress_bar()
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
                model = transformers.AutoModelForCausalLM.from_config(config)
                for parameter in model.parameters():
                    parameter.data.mul_(3)
                made[kind] = tmp_path_factory.mktemp(kind) / kind
                model.save_pretrained(made[kind])
            transformers.logging.set_verbosity_warning()
            transformers.logging.enable_progress_bar()
        return made[kind]

    return make


def load(folder: Path, **options: Any) -> HfCausalLM:
    return load_hf(folder, f"model 'hf:{folder.name}'", needs_weights=True, **options)


@pytest.fixture
def token_ids() -> Tensor:
    return torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0]])


# What it says


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "gemma2"])
def test_a_packed_sequence_gives_the_logits_that_each_document_gives_alone(
    kind: str, making: Making, token_ids: Tensor
) -> None:
    model = load(making(kind))
    with torch.no_grad():
        found = model(token_ids, PACKED)
        plain = model(token_ids)
        assert not torch.allclose(found[0, 5:], plain[0, 5:], rtol=1e-2)
        for row, begin, end in ((0, 0, 5), (0, 5, 12), (1, 0, 1), (1, 1, 9), (1, 9, 10), (1, 11, 12)):
            alone = model(token_ids[row : row + 1, begin:end])
            torch.testing.assert_close(found[row : row + 1, begin:end], alone, rtol=1e-4, atol=1e-5)
        head = model.output_head().logits(model(token_ids, PACKED, hidden_only=True))
    torch.testing.assert_close(head, found, rtol=1e-4, atol=1e-5)
    check_documents(model, model.where, VOCABULARY)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_the_logits_are_those_of_the_model_itself(kind: str, making: Making, token_ids: Tensor) -> None:
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    own = auto.from_pretrained(making(kind), attn_implementation="eager").eval()
    model = load(making(kind))
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids), own(token_ids).logits, rtol=1e-4, atol=1e-5)
    assert model.num_classes == VOCABULARY
    assert model.max_positions == 32
    assert not model.training


@pytest.mark.parametrize(
    ("kind", "scale", "soft_cap"),
    [("llama", 1, None), ("gemma2", 1, 30), ("cohere", 0.0625, None), ("granite", 1 / 8, None)],
)
def test_the_head_has_the_scale_and_the_soft_cap_of_the_configuration(
    kind: str, scale: float, soft_cap: float | None, making: Making, token_ids: Tensor
) -> None:
    model = load(making(kind))
    assert find_head(model) is model
    head = model.output_head()
    assert (head.scale, head.soft_cap) == (scale, soft_cap)
    assert head_difference(model, token_ids) < 1e-4


def test_a_soft_cap_shows_though_the_logits_are_small(making: Making, tmp_path: Path) -> None:
    folder = changed(making("gemma2"), tmp_path, final_logit_softcapping=3000.0)
    assert load(folder).output_head().soft_cap == 3000
    folder = changed(making("gemma2"), tmp_path, final_logit_softcapping=None)
    assert load(folder).output_head().soft_cap is None


def test_a_model_whose_last_layer_is_not_all_of_its_head_has_none(making: Making) -> None:
    model = load(making("bert"))
    assert find_head(model) is None
    with pytest.raises(
        StudentError, match="expected logits that its last layer makes of its last hidden state, got oth"
    ):
        model.output_head()
    assert model(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, VOCABULARY)


def test_a_model_that_makes_no_mask_of_positions_is_given_one(making: Making, token_ids: Tensor) -> None:
    model = load(making("mpt"))
    assert model.packing == "mask"
    with torch.no_grad():
        found = model(token_ids, PACKED)
        torch.testing.assert_close(found[:1, 5:], model(token_ids[:1, 5:]), rtol=1e-4, atol=1e-5)


def test_a_model_that_can_not_keep_documents_apart_refuses_several(making: Making, token_ids: Tensor) -> None:
    model = load(making("mamba"))
    assert model.packing is None
    one = torch.arange(12).expand(2, -1)
    torch.testing.assert_close(model(token_ids, one), model(token_ids))
    with pytest.raises(StudentError, match="expected a model in which no document of a packed sequence sees another"):
        model(token_ids, PACKED)


def test_half_weights_keep_their_head_and_their_packing(making: Making, token_ids: Tensor) -> None:
    model = load(making("llama"), dtype=torch.bfloat16)
    assert model.output_head().weight_CW.dtype == torch.bfloat16
    assert (model.packing, model.has_head) == ("positions", True)
    torch.testing.assert_close(model(token_ids).float(), load(making("llama"))(token_ids), atol=0.1, rtol=0.1)


def test_a_model_that_is_not_loaded_here_is_given_positions_by_name_and_tried(
    making: Making, token_ids: Tensor
) -> None:
    model = load(making("llama"))
    own = model.model
    with pytest.raises(
        StudentError, match="own: expected a model in which no document of a packed sequence sees another"
    ):
        check_documents(own, "own", VOCABULARY)  # a cache of keys keeps it from making a mask
    own.config.use_cache = False
    check_documents(own, "own", VOCABULARY)
    with torch.no_grad():
        torch.testing.assert_close(sequence_logits(own, token_ids, PACKED), model(token_ids, PACKED))


# As a student


def test_a_student_begins_with_the_weights_of_the_folder(making: Making, token_ids: Tensor) -> None:
    model = build_model(f"hf:{making('gpt2')}", VOCABULARY, num_positions=12)
    assert model.training
    torch.testing.assert_close(model.eval()(token_ids), load(making("gpt2"))(token_ids))
    assert isinstance(build_model(f"hf:{making('gpt2')}", VOCABULARY - 3), HfCausalLM)  # the last three only pad it


def test_a_student_without_weights_begins_with_random_ones(making: Making, tmp_path: Path, token_ids: Tensor) -> None:
    shutil.copy(making("llama") / "config.json", tmp_path)
    torch.manual_seed(5)
    model = build_model(f"hf:{tmp_path}", VOCABULARY).eval()
    torch.manual_seed(5)
    torch.testing.assert_close(model(token_ids), build_model(f"hf:{tmp_path}", VOCABULARY).eval()(token_ids))
    assert not torch.allclose(model(token_ids), load(making("llama"))(token_ids))
    assert next(model.parameters()).dtype == torch.float32
    model(token_ids, PACKED).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_smaller_vocabulary_is_refused_and_not_resized(making: Making) -> None:
    message = "expected at least 41 vocabulary entries, got 40; give the model of the tokenizer"
    with pytest.raises(StudentError, match=message):
        build_model(f"hf:{making('llama')}", VOCABULARY + 1)


def test_sequences_beyond_the_context_are_refused(making: Making) -> None:
    message = "expected sequences of at most 32 positions, as its configuration says, got 33; give a smaller --sequence"
    with pytest.raises(StudentError, match=message):
        build_model(f"hf:{making('llama')}", VOCABULARY, num_positions=33)
    check_context(load(making("mamba")), 10_000)


# Quietly, and from this machine alone


def test_nothing_is_said_and_no_connection_is_opened(
    making: Making,
    token_ids: Tensor,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folders = [making(kind) for kind in ("gpt2", "gemma2")]
    capfd.readouterr()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("expected no connection, got one")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    from transformers.utils import logging as hf_logging

    before = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    with caplog.at_level(logging.WARNING):
        for folder in folders:
            load(folder).train()(token_ids, PACKED)
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


# Folders that are refused


def changed(folder: Path, tmp_path: Path, **values: Any) -> Path:
    """A copy of a folder with other values in its configuration."""
    copy = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **values}))
    return copy


def refused(folder: Path, message: str, **options: Any) -> None:
    with pytest.raises(StudentError, match=message) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"model 'hf:{folder.name}': ")


def test_what_is_no_folder_of_a_model_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "gpt2", r"expected a folder with a config.json, .*, got nothing there; .* nothing is downloaded")
    refused(tmp_path, "expected a folder with a config.json, as save_pretrained writes it, got none in it")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "expected a folder with a config.json, .*, got a file")


def test_a_folder_without_weights_is_no_teacher(making: Making, tmp_path: Path) -> None:
    shutil.copy(making("llama") / "config.json", tmp_path)
    refused(tmp_path, "expected weights beside config.json, got none; copy model.safetensors into the folder")


def test_pickled_weights_are_refused_unless_trusted(making: Making, tmp_path: Path, token_ids: Tensor) -> None:
    expected = load(making("gpt2"))
    torch.save(expected.model.state_dict(), tmp_path / "pytorch_model.bin")
    shutil.copy(making("gpt2") / "config.json", tmp_path)
    refused(tmp_path, r"weights in .safetensors files, got pickled ones, pytorch_model.bin, .* save_pretrained")
    with pytest.raises(StudentError, match="got pickled ones"):
        build_model(f"hf:{tmp_path}")
    torch.testing.assert_close(load(tmp_path, trust_pickle=True)(token_ids), expected(token_ids))


def test_missing_weights_are_not_made_up(making: Making, tmp_path: Path) -> None:
    folder = changed(making("llama"), tmp_path, num_hidden_layers=3)
    refused(folder, r"expected weights for 'model.layers.2.\S+' \(\d+ are missing\), got files without")


def test_a_damaged_file_or_an_unknown_kind_is_refused(making: Making, tmp_path: Path) -> None:
    folder = changed(making("llama"), tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    refused(folder, r"expected a causal language model that transformers loads, got \w+: .*; mend the folder")
    refused(changed(making("llama"), tmp_path, model_type="no_such_model"), "model that transformers loads, got ValueE")


def test_code_in_a_folder_is_not_run(making: Making, tmp_path: Path) -> None:
    names = {"AutoConfig": "trap.TrapConfig", "AutoModelForCausalLM": "trap.Trap"}
    folder = changed(making("llama"), tmp_path, model_type="trap", auto_map=names)
    (folder / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    refused(folder, "expected a causal language model that transformers loads, got ValueError: .*; mend the folder")
    assert not (tmp_path / "sprung").exists()


def test_parts_that_an_index_names_must_be_there(making: Making, tmp_path: Path, token_ids: Tensor) -> None:
    folder = tmp_path / "parts"
    load(making("llama")).model.save_pretrained(folder, max_shard_size="8KB")
    files = find_hf_files(folder, "model")
    assert len(files.weights) > 2
    assert [path.name for path in files.all] == sorted(path.name for path in files.all)
    torch.testing.assert_close(load(folder)(token_ids), load(making("llama"))(token_ids))
    files.weights[0].unlink()
    name = files.weights[0].name
    refused(folder, rf"expected the \d files of weights that model.safetensors.index.json names, got none .* '{name}'")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    refused(folder, "got none called 'elsewhere.safetensors' beside it")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "expected the index of its weights in model.safetensors.index.json, got a damaged file")


def test_without_transformers_it_says_how_to_install_it(making: Making, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = making("llama")
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    refused(folder, r"expected transformers installed, got none that imports .*; run: pip install 'logitstore\[text\]'")


def test_a_module_of_the_model_is_trained_as_any_other(making: Making) -> None:
    model = load(making("llama"))
    assert isinstance(model.model, nn.Module)
    assert {name.partition(".")[0] for name, _ in model.named_parameters()} == {"model"}
