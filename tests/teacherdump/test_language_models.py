"""Language models as teachers: folders of transformers, weights of a GPT, programs of token ids."""

import hashlib
import importlib
import logging
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from storage.errors import TeacherError
from studenttrain.export import save_weights
from studenttrain.gpt import GPT
from studenttrain.heads import find_head
from studenttrain.hf import load_hf
from studenttrain.language import sequence_logits
from studenttrain.models import build_model
from teacherdump.loading import Member, load_member
from teacherdump.model_file import file_digest, file_kind, teacher_identity

CPU = torch.device("cpu")
VOCABULARY = 9
ARCH = "gpt:1x16"


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(1, 16, VOCABULARY).eval()


@pytest.fixture
def token_ids() -> Tensor:
    return torch.randint(VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(1))


POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]).repeat(3, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with tied weights."""
    pytest.importorskip("transformers")
    transformers: Any = importlib.import_module("transformers")
    path = tmp_path_factory.mktemp("hf") / "llama"
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.LlamaForCausalLM(config).save_pretrained(path)
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()
    return path


def load(path: Path | str, arch: str | None = None, **options: Any) -> Member:
    return load_member(path, arch, CPU, **{"trust_pickle": False, **options})


def refused(message: str, path: Path | str, arch: str | None = None, **options: Any) -> None:
    with pytest.raises(TeacherError, match=message) as caught:
        load(path, arch, **options)
    assert "\n" not in str(caught.value)


# Weights of a GPT


def test_weights_of_a_gpt_say_their_vocabulary(tmp_path: Path, model: GPT, token_ids: Tensor) -> None:
    torch.save(model.state_dict(), tmp_path / "gpt.pt")
    save_weights(tmp_path / "gpt.safetensors", model)
    for name, arch in (("gpt.pt", ARCH), ("gpt.safetensors", ARCH), ("gpt.pt", f"{ARCH},vocab=9,dropout=0.1")):
        member = load(tmp_path / name, arch)
        assert member.takes_tokens
        assert find_head(member.module) is not None
        found = sequence_logits(member.module, token_ids, POSITIONS)
        torch.testing.assert_close(found, model(token_ids, POSITIONS))
        member.check_positions(10_000)


def test_weights_of_another_gpt_are_refused(tmp_path: Path, model: GPT) -> None:
    path = tmp_path / "gpt.pt"
    torch.save(model.state_dict(), path)
    refused("--arch: model 'gpt:1x16,vocab=8': expected at least 9 vocabulary entries, got 8", path, f"{ARCH},vocab=8")
    refused(r"'embedding.weight' of shape \(10, 16\), as gpt:1x16,vocab=10 has it, got \(9, 16\)", path,
            f"{ARCH},vocab=10")  # fmt: skip
    refused(r"expected weights for 'blocks.1.\S+' \(4 of 10 are missing\)", path, "gpt:2x16")
    torch.save({"first": torch.ones(1)}, path)
    refused(r"expected weights for 'embedding.weight' \(6 of 6 are missing\), got a file that begins with", path, ARCH)


# Programs


def export(path: Path, module: nn.Module, inputs: tuple[Tensor, ...], *sizes: Any, **kwargs: Any) -> Path:
    """A program with dynamic sizes of its first dimensions."""
    shapes = tuple(dict(enumerate(sizes)) for _ in inputs)
    named = {name: dict(enumerate(sizes)) for name in kwargs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dynamic: Any = shapes if not named else {"token_ids": shapes[0], **named}
        torch.export.save(torch.export.export(module, inputs, kwargs, dynamic_shapes=dynamic), path)
    return path


BATCH = torch.export.Dim("batch", min=1)


def test_a_program_of_token_ids_and_positions_loads(tmp_path: Path, model: GPT, token_ids: Tensor) -> None:
    member = load(export(tmp_path / "two.pt2", model, (token_ids, POSITIONS), BATCH))
    assert (member.input_dtype, member.num_inputs, member.input_shape) == (torch.int64, 2, (8,))
    assert (member.takes_tokens, member.min_batch, member.max_batch) == (True, 1, None)
    found = sequence_logits(member.module, token_ids[:2], POSITIONS[:2])
    torch.testing.assert_close(found, model(token_ids[:2], POSITIONS[:2]))
    assert find_head(member.module) is None


def test_a_program_of_token_ids_alone_loads(tmp_path: Path, model: GPT, token_ids: Tensor) -> None:
    member = load(export(tmp_path / "one.pt2", model, (token_ids,), BATCH))
    assert (member.input_dtype, member.num_inputs) == (torch.int64, 1)
    torch.testing.assert_close(sequence_logits(member.module, token_ids, POSITIONS), model(token_ids))


def test_a_program_says_how_long_its_sequences_are(tmp_path: Path, model: GPT, token_ids: Tensor) -> None:
    fixed = load(export(tmp_path / "fixed.pt2", model, (token_ids,), BATCH))
    fixed.check_positions(8)
    message = "expected sequences of 8 positions, for which it was exported, got 9; say --sequence-length 8, or export"
    with pytest.raises(TeacherError, match=message):
        fixed.check_positions(9)
    length = torch.export.Dim("length", min=2, max=64)
    bounded = load(export(tmp_path / "bounded.pt2", model, (token_ids, POSITIONS), BATCH, length))
    assert (bounded.input_shape, bounded.max_positions) == ((None,), 64)
    bounded.check_positions(64)
    with pytest.raises(
        TeacherError, match="expected sequences of at most 64 positions, got 65; say --sequence-length 64"
    ):
        bounded.check_positions(65)


def test_programs_of_other_inputs_are_refused(tmp_path: Path, model: GPT, token_ids: Tensor) -> None:
    class Sum(nn.Module):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return first + second

    message = r"one batch \(N, ...\), or int64 token ids and position ids \(N, P\), got one of 2 inputs; wrap the model"
    for index, inputs in enumerate(((token_ids, token_ids.int()), (token_ids, token_ids[0]))):
        refused(message, export(tmp_path / f"{index}.pt2", Sum(), inputs))
    refused(
        "expected a program that takes its inputs by place, got one exported with names for them",
        export(tmp_path / "named.pt2", model, (token_ids,), BATCH, position_ids=POSITIONS),
    )


# Folders of transformers


def test_a_folder_of_transformers_is_a_teacher(folder: Path, token_ids: Tensor) -> None:
    expected = load_hf(folder, "here", needs_weights=True)
    assert file_kind(f"hf:{folder}") == "hf"
    member = load(f"hf:{folder}")
    assert (member.takes_tokens, member.max_positions) == (True, 32)
    assert find_head(member.module) is not None
    torch.testing.assert_close(sequence_logits(member.module, token_ids, POSITIONS), expected(token_ids, POSITIONS))
    with pytest.raises(TeacherError, match="expected sequences of at most 32 positions, got 33"):
        member.check_positions(33)
    half = load(f"hf:{folder}", precision="bf16")
    assert next(half.module.parameters()).dtype == torch.bfloat16


def test_its_digest_says_its_files_and_not_where_they_lie(folder: Path, tmp_path: Path) -> None:
    names = ("config.json", "model.safetensors")
    lines = "".join(f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n" for name in names)
    identity = teacher_identity([f"hf:{folder}"], None, None, "fp32")
    assert identity["digest"] == hashlib.sha256(lines.encode()).hexdigest()
    assert (identity["kind"], identity["arch"], identity["members"]) == ("hf", "hf", [])
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    (copy / "README.md").write_text("no part of it")
    assert teacher_identity([f"hf:{copy}"], None, None, "fp32") == identity
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert teacher_identity([f"hf:{copy}"], None, None, "fp32")["digest"] != identity["digest"]
    both = teacher_identity([f"hf:{folder}", f"hf:{copy}"], None, None, "fp32")
    assert (both["kind"], both["arch"], both["combine"]) == ("ensemble", "hf", "mean-probs")
    assert both["members"][0] == {"digest": identity["digest"], "kind": "hf"}
    assert str(tmp_path) not in str(both)


def test_weights_beside_the_folder_that_they_belong_to_load(folder: Path, tmp_path: Path, token_ids: Tensor) -> None:
    torch.manual_seed(3)
    student: Any = build_model(f"hf:{folder}").eval()
    for parameter in student.parameters():
        nn.init.normal_(parameter)
    save_weights(tmp_path / "student.safetensors", student)  # one name of two that are tied
    torch.save(student.model.state_dict(), tmp_path / "own.pt")  # as transformers names them
    for name in ("student.safetensors", "own.pt"):
        member = load(tmp_path / name, f"hf:{folder}")
        torch.testing.assert_close(sequence_logits(member.module, token_ids), student(token_ids))
    identity = teacher_identity([tmp_path / "own.pt"], f"hf:{folder}", None, "fp32")
    assert identity["kind"] == "weights"
    assert identity["arch"] == f"hf:{file_digest(folder / 'config.json')[:12]}"
    torch.save({"other": torch.ones(1)}, tmp_path / "other.pt")
    refused(r"expected weights for 'model.model.embed_tokens.weight' \(\d+ of \d+ are missing\)", tmp_path / "other.pt",
            f"hf:{folder}")  # fmt: skip


def test_folders_that_are_no_teacher_are_refused(folder: Path, tmp_path: Path) -> None:
    refused(r"teacher 'hf:no/such': expected a folder with a config.json, .*, got nothing there", "hf:no/such")
    shutil.copy(folder / "config.json", tmp_path)
    refused("expected weights beside config.json, got none; copy model.safetensors into the folder", f"hf:{tmp_path}")
    refused(f"expected a model file, got a folder of transformers; say --model hf:{tmp_path}", tmp_path)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    refused("got pickled weights, 'pytorch_model.bin', which may run any code .*; save the model with save_pretrained, "
            "or say --trust-pickle", f"hf:{tmp_path}")  # fmt: skip
    assert load(f"hf:{tmp_path}", trust_pickle=True).takes_tokens
    (tmp_path / "config.json").write_text("{}")
    refused("expected a causal language model that transformers loads, got ", f"hf:{tmp_path}", trust_pickle=True)


def test_an_architecture_beside_a_folder_or_without_one_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"arch: .*hf:.*' is a folder of transformers that says itself .*; leave --arch"
    ):
        teacher_identity([f"hf:{folder}"], ARCH, None, "fp32")
    torch.save({"weight": torch.ones(1)}, tmp_path / "weights.pt")
    with pytest.raises(TeacherError, match=r"--arch hf:\S+: expected a folder with a config.json, got none"):
        teacher_identity([tmp_path / "weights.pt"], f"hf:{tmp_path}", None, "fp32")


CODE = """
from torch import nn

def make(num_classes=50):
    return nn.Sequential(nn.Embedding(num_classes, 4), nn.Linear(4, num_classes))
"""


def test_code_that_is_a_language_model_takes_its_vocabulary_from_the_weights(
    tmp_path: Path, token_ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bigrams.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    bigrams = nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY))
    torch.save(bigrams.state_dict(), tmp_path / "bigrams.pt")
    member = load(tmp_path / "bigrams.pt", "bigrams:make")
    torch.testing.assert_close(sequence_logits(member.module, token_ids, POSITIONS), bigrams(token_ids))
    assert not member.takes_tokens  # its code does not say it
