"""Losses from hidden states, a chunk of rows at a time, against those of all logits at once, and their formulas."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from studenttrain.chunked import chunked_losses
from studenttrain.heads import Head
from studenttrain.loss import hard_loss, soft_loss
from studenttrain.targets import SoftTargets, TopKTargets
from tests.studenttrain.soft_targets import Case, all_valid, cases, double_dense, double_topk, random_logits

ROWS, CLASSES, WIDTH = 6, 7, 4
CHUNK_BYTES = 4 * 4 * CLASSES  # four rows: two chunks, the second a small one
HARD_R = torch.tensor([2, -1, 6, 0, -1, 3])
WEIGHTS = (0.3, 0.7)
HEADS: dict[str, Callable[[Tensor, Tensor], Head]] = {
    "plain": lambda weight, _: Head(weight),
    "bias": lambda weight, bias: Head(weight, bias),
    "all": lambda weight, bias: Head(weight, bias, 0.7, 3.0),
}
Parts = tuple[Tensor, Tensor, Tensor]


def parts(dtype: torch.dtype = torch.float64) -> Parts:
    """Hidden states, and the weight and the bias of a head."""
    shapes = ((ROWS, WIDTH), (CLASSES, WIDTH), (CLASSES, 1))
    found = [torch.from_numpy(random_logits(*shape, seed, 1.5)) for seed, shape in enumerate(shapes)]
    hidden, weight, bias = (value.to(dtype).requires_grad_() for value in (found[0], found[1], found[2][:, 0]))
    return hidden, weight, bias


def gradients(losses: tuple[Tensor, Tensor], leaves: Parts, weights: tuple[float, float] = WEIGHTS) -> list[Tensor]:
    """Of the weighted sum over the rows, times some factor."""
    total = 0.01 * (weights[0] * losses[0] + weights[1] * losses[1]).sum()
    return list(torch.autograd.grad(total, leaves, materialize_grads=True))


def plain_losses(
    head: Head, hidden_RW: Tensor, targets: SoftTargets | None, name: str, hard_R: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same of all logits at once."""
    logits_RC = head.logits(hidden_RW)
    zeros = logits_RC.new_zeros(len(logits_RC), dtype=torch.float64 if logits_RC.dtype == torch.float64 else None)
    soft_R = zeros if targets is None else soft_loss(name, logits_RC, targets)
    return soft_R, zeros if hard_R is None else hard_loss(logits_RC, hard_R)


@pytest.mark.parametrize("head_kind", HEADS)
@pytest.mark.parametrize("case", cases(ROWS, CLASSES), ids=str)
def test_chunks_give_the_formula_in_float64(case: Case, head_kind: str) -> None:
    leaves = parts()
    hidden, weight, bias = leaves
    head = HEADS[head_kind](weight, bias)
    expected = case.reference(head.logits(hidden)), hard_loss(head.logits(hidden), HARD_R)
    expected_grads = gradients(expected, leaves)
    for weights in (None, (6.0, 14.0)):
        found = chunked_losses(head, hidden, case.targets, case.name, HARD_R, weights=weights, chunk_bytes=CHUNK_BYTES)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradients(found, leaves), expected_grads, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", cases(ROWS, CLASSES), ids=str)
def test_chunks_give_what_all_logits_give_where_rows_are_masked(case: Case) -> None:
    leaves = parts()
    hidden, weight, bias = leaves
    head = Head(weight, bias)
    for valid in ([True, True, False, False, False, True], [False] * ROWS):
        targets = replace(case.targets, valid_N=torch.tensor(valid))
        for hard_R in (HARD_R, None):
            weights = WEIGHTS if hard_R is not None else (1.0, 0.0)
            expected = plain_losses(head, hidden, targets, case.name, hard_R)
            expected_grads = gradients(expected, leaves, weights)
            for given in (None, weights):
                found = chunked_losses(head, hidden, targets, case.name, hard_R, weights=given, chunk_bytes=CHUNK_BYTES)
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
                torch.testing.assert_close(gradients(found, leaves, weights), expected_grads, rtol=1e-10, atol=1e-10)


def test_hard_targets_alone_are_enough() -> None:
    leaves = parts()
    head = Head(leaves[1], leaves[2])
    expected = plain_losses(head, leaves[0], None, "", HARD_R)
    found = chunked_losses(head, leaves[0], None, None, HARD_R, weights=(0.0, 1.0), chunk_bytes=CHUNK_BYTES)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, leaves, (0.0, 1.0)), gradients(expected, leaves, (0.0, 1.0)))


def test_a_row_without_soft_targets_still_learns_from_its_hard_one() -> None:
    leaves = parts()
    head = Head(leaves[1])
    targets = double_topk(torch.from_numpy(random_logits(ROWS, CLASSES, 3)), 3)
    # as an unwritten row of a store reads: one id all along
    ids_NK = torch.where(torch.arange(ROWS)[:, None] == 3, 0, targets.ids_NK)
    targets = replace(targets, ids_NK=ids_NK, valid_N=torch.arange(ROWS) != 3)
    expected = plain_losses(head, leaves[0], targets, "tail-bucket", HARD_R)
    found = chunked_losses(head, leaves[0], targets, "tail-bucket", HARD_R, weights=WEIGHTS)
    assert expected[1][3] > 0
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, leaves), gradients(expected, leaves))


def test_rows_without_any_target_are_not_multiplied_with_the_head() -> None:
    hidden, weight, _ = parts()
    with torch.no_grad():
        hidden[1] = math.nan  # would spread over the gradient of the head
    targets = replace(double_dense(torch.zeros(ROWS, CLASSES).double()), valid_N=torch.arange(ROWS) != 1)
    soft_R, hard_R = chunked_losses(Head(weight), hidden, targets, "kl", HARD_R)
    grads = torch.autograd.grad((soft_R + hard_R).sum(), (hidden, weight))
    assert soft_R[1] == hard_R[1] == 0
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][1] == 0).all()


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("case", [case for case in cases(ROWS, CLASSES) if case.targets.temperature == 1][::3], ids=str)
def test_under_autocast_products_are_bfloat16_and_losses_float32(
    case: Case, weights: tuple[float, float] | None
) -> None:
    leaves = parts(torch.float32)
    head = Head(leaves[1], leaves[2])
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain_losses(head, leaves[0], case.targets, case.name, HARD_R)
        found = chunked_losses(
            head, leaves[0], case.targets, case.name, HARD_R, weights=weights, chunk_bytes=CHUNK_BYTES
        )
    assert found[0].dtype == found[1].dtype == torch.float32
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0], expected[0].float(), rtol=1e-4, atol=1e-4)
    for mine, plain in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        assert mine.dtype == torch.float32
        assert (mine - plain).norm() < 0.02 * plain.norm()


def test_weights_of_few_bits_get_gradients_of_their_own_type() -> None:
    leaves = parts(torch.bfloat16)
    hidden, weight, bias = leaves
    found = chunked_losses(Head(weight, bias), hidden, None, None, HARD_R, weights=(0, 1), chunk_bytes=CHUNK_BYTES)
    exact = parts()
    expected = plain_losses(Head(exact[1], exact[2]), exact[0], None, "", HARD_R)
    for mine, plain in zip(gradients(found, leaves, (0, 1)), gradients(expected, exact, (0, 1)), strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - plain).norm() < 0.05 * plain.norm()


def test_a_head_or_a_body_that_is_frozen_gets_no_gradient() -> None:
    for frozen in range(2):
        leaves = parts()
        leaves[frozen].requires_grad_(False)
        for weights in (None, (0.0, 1.0)):
            found = chunked_losses(Head(leaves[1]), leaves[0], None, None, HARD_R, weights=weights)
            (grad,) = torch.autograd.grad(found[1].sum(), leaves[1 - frozen])
            assert grad.abs().max() > 0
    leaves = parts()
    with torch.no_grad():
        assert not chunked_losses(Head(leaves[1]), leaves[0], None, None, HARD_R, weights=(0, 1))[1].requires_grad


def test_no_rows_at_all_leave_gradients_of_zero() -> None:
    hidden, weight, bias = parts()
    for rows, hard_R in ((slice(0, 0), HARD_R[:0]), (slice(None), torch.full((ROWS,), -1))):
        for weights in (None, (0.0, 1.0)):
            found = chunked_losses(Head(weight, bias), hidden[rows], None, None, hard_R, weights=weights)[1]
            assert found.tolist() == [0.0] * len(hard_R)
            assert all((grad == 0).all() for grad in torch.autograd.grad(found.sum(), (hidden, weight, bias)))


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("name", ["tail-bucket", "kl"])
def test_cuda_gives_what_the_cpu_gives(name: str, weights: tuple[float, float] | None) -> None:
    teacher = torch.from_numpy(random_logits(ROWS, CLASSES, 3))
    targets: SoftTargets = double_topk(teacher, 3) if name == "tail-bucket" else double_dense(teacher)
    moved: dict[str, Any] = {key: value.cuda() for key, value in vars(targets).items() if isinstance(value, Tensor)}
    there = replace(targets, **moved)
    leaves = parts()
    hidden, weight, bias = (value.detach().cuda().requires_grad_() for value in leaves)
    expected = plain_losses(Head(leaves[1], leaves[2]), leaves[0], targets, name, HARD_R)
    found = chunked_losses(
        Head(weight, bias), hidden, there, name, HARD_R.cuda(), weights=weights, chunk_bytes=CHUNK_BYTES
    )
    grads = gradients(found, (hidden, weight, bias))
    torch.testing.assert_close([loss.cpu() for loss in found], list(expected))
    torch.testing.assert_close([grad.cpu() for grad in grads], gradients(expected, leaves))


class Model(nn.Module):
    """An embedding, a layer, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor, hidden_only: bool = False) -> Tensor:
        hidden = torch.tanh(self.layer(self.embedding(tokens)))
        return hidden if hidden_only else self.output_head().logits(hidden)

    def output_head(self) -> Head:
        return Head(self.embedding.weight)


def compiled(model: nn.Module, folder: Path) -> Any:
    return torch.compile(model, backend="aot_eager")


def wrapped(model: nn.Module, folder: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    return DistributedDataParallel(model)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("weights", [None, (1.0, 0.0)])
@pytest.mark.parametrize("outside", [compiled, wrapped])
def test_gradients_reach_the_weights_of_a_model_that_is_wrapped(
    outside: Callable[[nn.Module, Path], Any], weights: tuple[float, float] | None, tmp_path: Path
) -> None:
    tokens = torch.arange(ROWS)
    targets = double_topk(torch.from_numpy(random_logits(ROWS, CLASSES, 3)), 3)
    model, plain = Model(), Model()
    try:
        outer = outside(model, tmp_path)
        for _ in range(2):  # gradients are reduced in each step, and added up
            hidden = outer(tokens, hidden_only=True)
            chunked_losses(model.output_head(), hidden, targets, "tail-bucket", weights=weights)[0].mean().backward()
            soft_loss("tail-bucket", plain(tokens), targets).mean().backward()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weights", [None, (1.0, 0.0)])
def test_memory_is_that_of_a_few_chunks(weights: tuple[float, float] | None) -> None:
    num_rows, num_classes, chunk_rows = 256, 500, 16
    hidden = torch.randn(num_rows, WIDTH, requires_grad=True)
    weight = torch.randn(num_classes, WIDTH, requires_grad=True)
    ids = torch.arange(3).expand(num_rows, 3).contiguous()
    logprobs = torch.full((num_rows, 3), math.log(0.25))
    targets = TopKTargets(ids, logprobs, logprobs[:, 0], all_valid(num_rows), 1.0)
    logits_bytes = 4 * num_rows * num_classes
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        soft_R, _ = chunked_losses(
            Head(weight), hidden, targets, "tail-bucket", weights=weights, chunk_bytes=4 * chunk_rows * num_classes
        )
        soft_R.mean().backward()
    taken = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert taken < logits_bytes  # all that was ever allocated, freed or not


def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, _ = parts()
    head, targets = Head(weight), double_dense(torch.zeros(ROWS, CLASSES).double())
    with pytest.raises(ValueError, match="targets: expected soft ones, hard ones or both, got neither; give some"):
        chunked_losses(head, hidden, None, None)
    for weights in ((0.0, 0.0), (-1.0, 1.0), (math.inf, 1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match=r"weights: expected two numbers, none below 0 and one above, got \("):
            chunked_losses(head, hidden, targets, "kl", weights=weights)
    with pytest.raises(ValueError, match=r"loss: expected one of kl, .* on DenseTargets, got 'tail-bucket'"):
        chunked_losses(head, hidden, targets, "tail-bucket")


def test_another_sum_than_was_said_is_refused() -> None:
    hidden, weight, _ = parts()
    head, targets = Head(weight), double_dense(torch.zeros(ROWS, CLASSES).double())
    sums: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda soft, _: soft.sum(),
        lambda soft, hard: soft.sum() + hard.sum(),
        lambda soft, hard: 3 * soft[0] + 7 * hard[0],
    ]
    for sum_of in sums:
        losses = chunked_losses(head, hidden, targets, "kl", HARD_R, weights=(3.0, 7.0))
        with pytest.raises(
            ValueError, match=r"weights: expected 0.428571 of each soft and 1 of each hard loss, as giv"
        ):
            sum_of(*losses).backward()
    soft_R, hard_R = chunked_losses(head, hidden, targets, "kl", HARD_R, weights=(3.0, 7.0))
    total = (3 * soft_R + 7 * hard_R).mean() * 1e-3
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="chunked losses: expected one backward pass, got a second one; leave out"):
        total.backward()
