"""The fusion of generalist and specialists: the minimum of a sum of divergences, held against its definition.

Legend: N rows, C classes, M specialists, K a specialist's classes.
"""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from storage.errors import StudentError
from studenttrain.specialists import fusion
from studenttrain.specialists.fusion import fuse
from studenttrain.specialists.fusion_groups import Said

TOLERANCE = 1e-9


def objective(logprobs_NC: Tensor, generalist_NC: Tensor, said: Sequence[Said], active_NM: Tensor) -> Tensor:
    """KL(p_g, q) + sum of KL(p_m, q_m) over the active ones, nats (N,), word for word as the paper has it."""
    total_N = divergence(generalist_NC, logprobs_NC)
    for number, (classes, said_NK) in enumerate(said):
        others = [label for label in range(logprobs_NC.shape[1]) if label not in classes]
        parts = [logprobs_NC[:, list(classes)], logprobs_NC[:, others].logsumexp(1, keepdim=True)]
        total_N = total_N + torch.where(active_NM[:, number], divergence(said_NK, torch.cat(parts, 1)), 0.0)
    return total_N


def divergence(log_p_NK: Tensor, log_q_NK: Tensor) -> Tensor:
    there_NK = log_p_NK > -torch.inf
    difference_NK = torch.where(there_NK, log_p_NK, 0.0) - torch.where(there_NK, log_q_NK, 0.0)
    return (log_p_NK.exp() * difference_NK).sum(1)


def gradient(logprobs_NC: Tensor, generalist_NC: Tensor, said: Sequence[Said], active_NM: Tensor) -> Tensor:
    """d objective / dz at q = softmax(z), by autograd."""
    logits_NC = logprobs_NC.clone().requires_grad_()
    objective(logits_NC.log_softmax(1), generalist_NC, said, active_NM).sum().backward()
    assert logits_NC.grad is not None
    return logits_NC.grad


def problem(
    num_rows: int, num_classes: int, num_specialists: int, k: int, scale: float = 3.0, *, active_top: int = 1
) -> tuple[Tensor, list[Said], Tensor]:
    """Random distributions, specialists that agree with the generalist more or less, and which are active."""
    generator = torch.Generator().manual_seed(num_classes + num_specialists + k)

    def random(*shape: int) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    said: list[Said] = []
    generalist_NC = random(num_rows, num_classes).log_softmax(1)
    top_NT = generalist_NC.topk(active_top, 1).indices
    active = []
    for _ in range(num_specialists):
        classes = sorted(torch.randperm(num_classes, generator=generator)[:k].tolist())
        others = [label for label in range(num_classes) if label not in classes]
        other_NC = generalist_NC + random(num_rows, num_classes)
        dustbin_N1 = other_NC[:, others].logsumexp(1, keepdim=True)
        said.append((classes, torch.cat([other_NC[:, classes], dustbin_N1], 1).log_softmax(1)))
        active.append(torch.isin(top_NT, torch.tensor(classes)).any(1))
    return generalist_NC, said, torch.stack(active, 1)


def collapsed(logprobs_NC: Tensor, classes: Sequence[int]) -> Tensor:
    """What a specialist says that agrees with a distribution."""
    others = [label for label in range(logprobs_NC.shape[1]) if label not in classes]
    return torch.cat([logprobs_NC[:, list(classes)], logprobs_NC[:, others].logsumexp(1, keepdim=True)], 1)


@pytest.mark.parametrize("scale", [0.3, 3.0, 20.0])
@pytest.mark.parametrize(
    ("num_classes", "num_specialists", "k", "active_top"),
    [(5, 2, 2, 1), (10, 4, 4, 1), (30, 12, 8, 2), (100, 30, 20, 1)],
)
def test_no_row_has_a_gradient_above_the_tolerance(
    num_classes: int, num_specialists: int, k: int, active_top: int, scale: float
) -> None:
    given = problem(60, num_classes, num_specialists, k, scale, active_top=active_top)
    result = fuse(*given, TOLERANCE)
    assert torch.allclose(result.logprobs_NC.exp().sum(1), torch.ones(60, dtype=torch.float64), rtol=0, atol=1e-12)
    found = float(gradient(result.logprobs_NC, *given).abs().max())
    assert found <= TOLERANCE * 1.01
    assert found <= result.residual + 1e-13 <= TOLERANCE + 1e-13


def test_the_gradient_of_the_module_is_that_of_the_objective_by_finite_differences() -> None:
    generalist_NC, said, active_NM = problem(1, 6, 3, 3)
    logits_NC, step = torch.randn(1, 6, dtype=torch.float64), 1e-6
    expected_NC = gradient(logits_NC.log_softmax(1), generalist_NC, said, active_NM)
    for label in range(6):
        moved = [logits_NC.clone() for _ in range(2)]
        moved[0][0, label] += step
        moved[1][0, label] -= step
        high, low = (objective(it.log_softmax(1), generalist_NC, said, active_NM) for it in moved)
        assert float((high - low) / (2 * step)) == pytest.approx(float(expected_NC[0, label]), abs=1e-8)


def test_the_paper_s_way_down_the_gradient_ends_at_the_same_distribution() -> None:
    given = problem(6, 6, 3, 3, 1.0)
    logits_NC = given[0].clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits_NC], max_iter=120, tolerance_grad=1e-12, tolerance_change=0, history_size=50)

    def closure() -> float:
        optimizer.zero_grad()
        total = objective(logits_NC.log_softmax(1), *given).sum()
        total.backward()
        return float(total.detach())

    optimizer.step(closure)
    found_NC = fuse(*given, 1e-11).logprobs_NC
    assert torch.allclose(found_NC.exp(), logits_NC.detach().softmax(1), rtol=0, atol=1e-6)


def test_plain_em_ends_at_the_same_distribution() -> None:
    generalist_NC, said, active_NM = problem(10, 8, 4, 3, 1.0)
    total_N1 = 1 + active_NM.sum(1, keepdim=True)
    probs_NC = generalist_NC.exp()
    for _ in range(1000):
        new_NC = generalist_NC.exp()
        for number, (classes, said_NK) in enumerate(said):
            others = [label for label in range(8) if label not in classes]
            part_NC = torch.zeros_like(new_NC)
            part_NC[:, list(classes)] = said_NK[:, :-1].exp()
            rest_N1 = probs_NC[:, others].sum(1, keepdim=True)
            part_NC[:, others] = said_NK[:, -1:].exp() * probs_NC[:, others] / rest_N1
            new_NC = new_NC + part_NC * active_NM[:, number, None]
        probs_NC = new_NC / total_N1
    found_NC = fuse(generalist_NC, said, active_NM, 1e-11).logprobs_NC
    assert torch.allclose(found_NC.exp(), probs_NC, rtol=0, atol=1e-8)


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_no_other_distribution_is_nearer_to_all_of_them(scale: float) -> None:
    given = problem(50, 9, 5, 4, scale)
    found_NC = fuse(*given, TOLERANCE).logprobs_NC
    least_N = objective(found_NC, *given)
    for size in (1e-3, 0.1, 1.0, 10.0):
        other_NC = (found_NC + size * torch.randn_like(found_NC)).log_softmax(1)
        assert bool((objective(other_NC, *given) >= least_N - 1e-9).all())
    for other_NC in (given[0], torch.full_like(found_NC, -math.log(9))):
        assert bool((objective(other_NC, *given) >= least_N - 1e-9).all())


def test_without_active_specialists_the_generalist_s_distribution_stays_as_it_is() -> None:
    generalist_NC, said, active_NM = problem(10, 6, 3, 2)
    result = fuse(generalist_NC, said, torch.zeros_like(active_NM))
    assert torch.equal(result.logprobs_NC, generalist_NC - generalist_NC.logsumexp(1, keepdim=True))
    assert (result.num_iterations, result.residual) == (0, 0.0)
    assert fuse(generalist_NC, [], torch.zeros(10, 0, dtype=torch.bool)).residual == 0


def test_specialists_that_agree_change_nothing() -> None:
    generalist_NC, said, active_NM = problem(40, 12, 6, 4)
    said = [(classes, collapsed(generalist_NC, classes)) for classes, _ in said]
    result = fuse(generalist_NC, said, active_NM, TOLERANCE)
    assert torch.allclose(result.logprobs_NC.exp(), generalist_NC.exp(), rtol=0, atol=1e-9)


def test_one_specialist_gives_means_of_what_both_say_of_its_classes_and_of_the_dustbin() -> None:
    generalist_NC, said, _ = problem(30, 7, 1, 3)
    classes, said_NK = said[0]
    result = fuse(generalist_NC, said, torch.ones(30, 1, dtype=torch.bool))
    assert result.num_iterations == 0
    probs_NC, before_NC = result.logprobs_NC.exp(), generalist_NC.exp()
    expected_NK = (before_NC[:, classes] + said_NK[:, :-1].exp()) / 2
    assert torch.allclose(probs_NC[:, classes], expected_NK, rtol=1e-12)
    others = [label for label in range(7) if label not in classes]
    shares_NK = before_NC[:, others] / before_NC[:, others].sum(1, keepdim=True)
    assert torch.allclose(probs_NC[:, others] / probs_NC[:, others].sum(1, keepdim=True), shares_NK, rtol=1e-10)


def test_a_specialist_of_all_classes_gives_the_arithmetic_mean() -> None:
    generalist_NC, said, _ = problem(30, 5, 1, 4)
    all_NK = torch.cat([torch.randn(30, 5, dtype=torch.float64).log_softmax(1), torch.full((30, 1), -torch.inf)], 1)
    found_NC = fuse(generalist_NC, [(range(5), all_NK)], torch.ones(30, 1, dtype=torch.bool)).logprobs_NC
    assert torch.allclose(found_NC.exp(), (generalist_NC.exp() + all_NK[:, :5].exp()) / 2, rtol=1e-12)
    with pytest.raises(StudentError, match="specialist 0: expected nothing in its dustbin, since it has all classes"):
        fuse(generalist_NC, [(range(5), torch.zeros(30, 6))], torch.ones(30, 1, dtype=torch.bool))
    assert len(said) == 1


def test_neither_the_order_of_classes_nor_of_specialists_nor_other_rows_matter() -> None:
    generalist_NC, said, active_NM = problem(40, 9, 5, 4)
    found_NC = fuse(generalist_NC, said, active_NM, TOLERANCE).logprobs_NC
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    moved = []
    for classes, said_NK in reversed(said):
        places = torch.tensor([int((order == label).nonzero()) for label in classes])
        by_place = places.argsort()
        moved.append((places[by_place].tolist(), torch.cat([said_NK[:, :-1][:, by_place], said_NK[:, -1:]], 1)))
    other_NC = fuse(generalist_NC[:, order], moved, active_NM.flip(1), TOLERANCE).logprobs_NC
    assert torch.allclose(other_NC.exp(), found_NC[:, order].exp(), rtol=0, atol=1e-8)
    rows = torch.tensor([3, 17, 31])
    part = [(classes, said_NK[rows]) for classes, said_NK in said]
    assert torch.allclose(
        fuse(generalist_NC[rows], part, active_NM[rows], TOLERANCE).logprobs_NC, found_NC[rows], atol=1e-6
    )


def test_some_rows_at_a_time_give_what_all_at_once_give(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(50, 9, 5, 4)
    whole = fuse(*given, TOLERANCE)
    monkeypatch.setattr(fusion, "CHUNK_VALUES", 63)
    parts = fuse(*given, TOLERANCE)
    assert torch.allclose(parts.logprobs_NC.exp(), whole.logprobs_NC.exp(), rtol=0, atol=TOLERANCE)
    assert parts.residual <= TOLERANCE


def test_rows_for_which_a_specialist_is_not_active_may_hold_anything() -> None:
    generalist_NC, said, active_NM = problem(30, 8, 3, 3)
    expected_NC = fuse(generalist_NC, said, active_NM, TOLERANCE).logprobs_NC
    for number, (classes, said_NK) in enumerate(said):
        said[number] = (classes, torch.where(active_NM[:, number, None], said_NK, torch.nan))
    assert torch.equal(fuse(generalist_NC, said, active_NM, TOLERANCE).logprobs_NC, expected_NC)


def test_float32_and_rounding_of_the_input_are_made_good() -> None:
    generalist_NC, said, active_NM = problem(30, 8, 3, 3)
    found_NC = fuse(generalist_NC.float(), [(it, values.float() + 1e-3) for it, values in said], active_NM).logprobs_NC
    assert found_NC.dtype == torch.float64
    assert torch.allclose(found_NC.exp(), fuse(generalist_NC, said, active_NM).logprobs_NC.exp(), rtol=0, atol=1e-6)


def test_probabilities_too_small_for_float64_keep_their_logs() -> None:
    generalist_NC = torch.tensor([[0.0, -2.0, -900.0, -905.0, -3.0]], dtype=torch.float64).log_softmax(1)
    said = [([0, 1], collapsed(generalist_NC, [0, 1]) + torch.tensor([[0.3, -0.2, 0.1]])), ([0, 4], torch.zeros(1, 3))]
    said = [(classes, values.double().log_softmax(1)) for classes, values in said]
    active_NM = torch.ones(1, 2, dtype=torch.bool)
    result = fuse(generalist_NC, said, active_NM, TOLERANCE)
    assert result.logprobs_NC.isfinite().all()
    assert float(gradient(result.logprobs_NC, generalist_NC, said, active_NM).abs().max()) <= TOLERANCE
    assert float(result.logprobs_NC[0, 2] - result.logprobs_NC[0, 3]) == pytest.approx(5.0, abs=1e-9)


def test_a_generalist_that_is_sure_of_a_wrong_class_is_moved_by_a_likely_dustbin() -> None:
    """All that EM is slow at: nothing outside by the generalist, nearly all in the dustbins."""
    generalist_NC = torch.tensor([[0.0, -40.0, -41.0, -60.0, -300.0]], dtype=torch.float64).log_softmax(1)
    said = [([0, 1], torch.tensor([[-30.0, -30.0, 0.0]])), ([0, 2], torch.tensor([[-30.0, -30.0, 0.0]]))]
    said = [(classes, values.double().log_softmax(1)) for classes, values in said]
    active_NM = torch.ones(1, 2, dtype=torch.bool)
    result = fuse(generalist_NC, said, active_NM, TOLERANCE)
    assert float(gradient(result.logprobs_NC, generalist_NC, said, active_NM).abs().max()) <= TOLERANCE
    probs_C = result.logprobs_NC.exp()[0]
    assert float(probs_C[0]) == pytest.approx(1 / 3, abs=1e-6)
    assert float(probs_C[3]) == pytest.approx(2 / 3, abs=1e-6)  # outside both: it serves either dustbin


def test_a_class_that_nobody_believes_in_gets_nothing_unless_a_dustbin_has_nowhere_else_to_go() -> None:
    generalist_NC = torch.tensor([[0.7, 0.3, 0.0, 0.0]], dtype=torch.float64).log()
    given = ([([0], torch.tensor([[0.5, 0.5]], dtype=torch.float64).log())], torch.ones(1, 1, dtype=torch.bool))
    assert fuse(generalist_NC, *given).logprobs_NC.exp()[0].tolist() == pytest.approx([0.6, 0.4, 0.0, 0.0])
    given = ([([0, 1], torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log())], torch.ones(1, 1, dtype=torch.bool))
    assert fuse(generalist_NC, *given).logprobs_NC.exp()[0].tolist() == pytest.approx([0.6, 0.3, 0.05, 0.05])


def test_what_does_not_fit_is_refused() -> None:
    generalist_NC, said, active_NM = problem(4, 6, 2, 2)
    with pytest.raises(ValueError, match="logprobs_NC: expected rows of classes, got the shape"):
        fuse(generalist_NC[0], said, active_NM)
    with pytest.raises(ValueError, match=r"active_NM: expected bool \(4, 2\), got torch.int64"):
        fuse(generalist_NC, said, active_NM.long())
    with pytest.raises(ValueError, match="tolerance: expected a number above 0, got 0"):
        fuse(generalist_NC, said, active_NM, 0)
    for classes in ((), (3, 1), (2, 2), (1, 6), (-1, 2)):
        with pytest.raises(ValueError, match="specialist 1: expected ascending classes below 6"):
            fuse(generalist_NC, [said[0], (classes, said[1][1])], active_NM)
    with pytest.raises(
        ValueError, match=r"specialist 1: expected log-probabilities \(4, 3\), its classes and the dustbin"
    ):
        fuse(generalist_NC, [said[0], (said[1][0], said[1][1][:, :2])], active_NM)


def test_what_is_no_distribution_is_refused_with_its_row() -> None:
    generalist_NC, said, _ = problem(4, 6, 2, 2)
    active_NM = torch.ones(4, 2, dtype=torch.bool)
    wrong_NC = generalist_NC.clone()
    wrong_NC[2, 1] = torch.nan
    with pytest.raises(StudentError, match="generalist: expected a distribution in row 2, got something else"):
        fuse(wrong_NC, said, active_NM)
    wrong_NK = said[1][1].clone()
    wrong_NK[3] = -torch.inf
    with pytest.raises(StudentError, match="specialist 1: expected a distribution in row 3, got something else"):
        fuse(generalist_NC, [said[0], (said[1][0], wrong_NK)], active_NM)


def test_a_row_that_does_not_come_to_the_tolerance_is_never_let_pass() -> None:
    given = problem(30, 9, 5, 4)
    with pytest.raises(
        StudentError, match=r"fusion: expected a gradient of at most 1e-09 after 1 iterations, got .* in row"
    ):
        fuse(*given, TOLERANCE, max_iterations=1)
    with pytest.raises(StudentError, match="give a larger --tolerance"):
        fuse(*given, 1e-30)
