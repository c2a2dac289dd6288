"""What language models are called with, and whether they keep documents apart."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from storage.errors import StudentError
from studenttrain.gpt import GPT
from studenttrain.language import (
    NoLogitsError,
    check_documents,
    document_leak,
    keeps_documents_apart,
    sequence_logits,
    sequence_output,
    takes_position_ids,
)

CPU = torch.device("cpu")


class Model(nn.Module):
    """Gives back what it was given."""

    def __init__(self, output: Any = None) -> None:
        super().__init__()
        self.output = output


class Alone(Model):
    def forward(self, token_ids: Tensor, targets: Tensor | None = None) -> Any:
        return (token_ids, targets) if self.output is None else self.output


class Second(Model):
    def forward(self, token_ids: Tensor, where: Tensor) -> Any:
        return token_ids, where


class Third(Model):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Any = None) -> Any:
        return input_ids, attention_mask, position_ids


class ByName(Model):
    def forward(self, token_ids: Tensor, *, positions: Tensor | None = None, **options: Any) -> Any:
        return token_ids, positions, options


@pytest.mark.parametrize(("model", "takes"), [(Alone(), False), (Second(), True), (Third(), True), (ByName(), True)])
def test_positions_are_given_to_those_that_take_them(model: nn.Module, takes: bool) -> None:
    token_ids, position_ids = torch.zeros(2, 3), torch.arange(3).expand(2, -1)
    compiled: Any = torch.compile(model, backend="eager")
    assert takes_position_ids(model) == takes == takes_position_ids(compiled)
    given = sequence_output(model, token_ids, position_ids)
    assert given[0] is token_ids
    assert any(value is position_ids for value in given) == takes
    if not isinstance(model, Second):
        assert all(value is None or value == {} for value in sequence_output(model, token_ids)[1:])


def test_options_are_passed_on() -> None:
    assert sequence_output(ByName(), torch.zeros(1, 2), hidden_only=True)[2] == {"hidden_only": True}


def test_torchscript_and_programs_say_what_they_take() -> None:
    class Scripted(nn.Module):
        def forward(self, token_ids: Tensor, position_ids: Tensor) -> Tensor:
            return (token_ids + position_ids).float()[:, :, None]

    token_ids, position_ids = torch.zeros(2, 3, dtype=torch.int64), torch.arange(3).expand(2, -1).contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = [
            torch.jit.script(Scripted()),
            torch.export.export(Scripted(), (token_ids, position_ids)).module(),
        ]
    for module in modules:
        assert takes_position_ids(module)
        torch.testing.assert_close(sequence_logits(module, token_ids, position_ids)[0, :, 0], torch.arange(3.0))


def test_logits_are_taken_out_of_what_holds_them() -> None:
    logits, token_ids = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    for output in (logits, {"logits": logits}, type("Output", (), {"logits": logits}), (logits,)):
        assert sequence_logits(Alone(output), token_ids) is logits


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("text", "a str"),
        ((torch.zeros(2, 3, 4), torch.zeros(1)), "a tuple"),
        (torch.zeros(2, 4), r"shape \(2, 4\) of float32"),
        (torch.zeros(2, 4, 4), r"shape \(2, 4, 4\) of float32"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), r"shape \(2, 3, 4\) of int64"),
    ],
)
def test_what_is_no_logits_is_said(output: Any, message: str) -> None:
    with pytest.raises(NoLogitsError, match=message):
        sequence_logits(Alone(output), torch.zeros(2, 3, dtype=torch.int64))


def test_a_model_that_keeps_documents_apart_passes() -> None:
    torch.manual_seed(0)
    model = GPT(2, 16, 9).eval()
    check_documents(model, "student", 9)
    check_documents(model, "student", 9, num_positions=5)
    assert document_leak(model, 9, CPU) < 1e-5
    half = GPT(2, 16, 9).bfloat16()
    assert keeps_documents_apart(half, 9, CPU)


def test_a_model_that_sees_other_documents_is_refused() -> None:
    torch.manual_seed(0)
    model = GPT(2, 16, 9).eval()
    assert document_leak(lambda token_ids, _: model(token_ids), 9, CPU) > 0.01
    looks_ahead = nn.Conv1d(9, 9, 3, padding=1)

    def ahead(token_ids: Tensor, _: Tensor) -> Tensor:
        logits: Tensor = looks_ahead(nn.functional.one_hot(token_ids, 9).float().transpose(1, 2)).transpose(1, 2)
        return logits

    assert not keeps_documents_apart(ahead, 9, CPU)

    class Deaf(GPT):
        def forward(self, token_ids: Tensor, position_ids: Tensor | None = None, hidden_only: bool = False) -> Tensor:
            del position_ids
            return super().forward(token_ids, None, hidden_only)

    class Without(GPT):
        def forward(self, token_ids: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(token_ids)

    message = r"student: expected a model in which no document of a packed sequence sees another, by the position_ids"
    for deaf in (Deaf(1, 16, 9), Without(1, 16, 9)):
        with pytest.raises(StudentError, match=message):
            check_documents(deaf.eval(), "student", 9)
