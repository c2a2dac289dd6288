"""The losses, against their formulas in float64, their gradients, and their limits."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.arrays import STATUS_NOT_FINITE
from storage.encodings import Dense, Encoding, Hidden, Sample, TopK
from storage.errors import MismatchError
from studenttrain.heads import Head
from studenttrain.loss import (
    COMPARED_LOSSES,
    LOSSES,
    TOPK_LOSSES,
    DenseTargets,
    HiddenTargets,
    SampleTargets,
    TopKTargets,
    build_targets,
    check_loss,
    default_loss,
    hard_loss,
    kept_and_rest,
    lse_and_softmax,
    rows_at_once,
    soft_loss,
    uses_temperature,
)
from tests.studenttrain.soft_targets import (
    DENSE_LOSSES,
    ENCODINGS,
    NUM_DRAWS,
    Array,
    Case,
    all_valid,
    cases,
    double_dense,
    double_sample,
    double_topk,
    gradient,
    log_softmax,
    random_logits,
    reference,
    stored,
    targets_of,
)

DENSE = DENSE_LOSSES
CASES = [(Dense("float32"), name) for name in DENSE] + [(TopK(3, "float32"), name) for name in TOPK_LOSSES]


@pytest.mark.parametrize(("encoding", "name"), CASES, ids=lambda value: getattr(value, "name", value))
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_a_loss_is_its_formula(encoding: Encoding, name: str, temperature: float) -> None:
    teacher, student = random_logits(seed=1), random_logits(seed=2)
    k = 7 if encoding.name == "dense" else 3
    found = soft_loss(name, torch.from_numpy(student).float(), targets_of(encoding, teacher, temperature))
    assert found.dtype == torch.float32
    expected = reference(name, torch.from_numpy(teacher), torch.from_numpy(student), k, temperature).numpy()
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=1e-6 * max(1.0, temperature**2))


@pytest.mark.parametrize("name", ["kl", "tail-bucket", "truncated", "renormalised"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_gradient_is_that_of_the_table(name: str, temperature: float) -> None:
    teacher, student = (torch.from_numpy(random_logits(seed=seed)) for seed in (3, 4))
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(1, teacher.topk(3, 1).indices, True)
    m, big_q = (p * kept).sum(1, keepdim=True), (q * kept).sum(1, keepdim=True)
    targets = double_dense(teacher, temperature) if name == "kl" else double_topk(teacher, 3, temperature)
    found = gradient(lambda logits: soft_loss(name, logits, targets), student)
    inside, outside = {
        "kl": (q - p, q - p),
        "tail-bucket": (q - p, q - (1 - m) * q / (1 - big_q)),
        "truncated": (q - p / m, q),
        "renormalised": (q / big_q - p / m, 0 * q),
    }[name]
    expected = torch.where(kept, inside, outside)
    # at T the logits are divided by T and the loss is times T^2: one factor T is left
    assert torch.allclose(found, temperature * expected, atol=1e-12)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_values_and_gradients_are_those_of_the_formula_in_float64(case: Case) -> None:
    student = torch.from_numpy(random_logits(seed=6))
    student[1] *= 10  # far from the teacher
    torch.testing.assert_close(
        soft_loss(case.name, student, case.targets), case.reference(student), rtol=1e-10, atol=1e-10
    )
    found = gradient(lambda logits: soft_loss(case.name, logits, case.targets), student)
    torch.testing.assert_close(found, gradient(case.reference, student), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_rows_that_are_not_valid_count_nothing_and_change_nothing(case: Case) -> None:
    student = torch.from_numpy(random_logits(seed=6))
    valid_N = torch.tensor([True, False, True, True, False, False])
    masked = replace(case.targets, valid_N=valid_N)
    found = gradient(lambda logits: soft_loss(case.name, logits, masked), student)
    expected = gradient(lambda logits: soft_loss(case.name, logits, case.targets), student)
    assert torch.equal(found, torch.where(valid_N[:, None], expected, 0.0))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_gradient_of_draws_is_the_student_less_their_shares(temperature: float) -> None:
    teacher, student = (torch.from_numpy(random_logits(seed=seed)) for seed in (3, 4))
    targets = double_sample(teacher, temperature)
    shares = torch.zeros_like(teacher).scatter_add(1, targets.ids_ND, targets.probs_ND)
    assert (targets.probs_ND == 0).any()  # some places hold no draw
    found = gradient(lambda logits: soft_loss("sampled-ce", logits, targets), student)
    assert torch.allclose(found, temperature * ((student / temperature).softmax(1) - shares), atol=1e-12)


def test_draws_have_the_gradient_of_the_full_divergence_in_the_mean() -> None:
    # every u of a fine grid: systematic draws are unbiased, so that only the grid's error is left
    teacher, student = (torch.from_numpy(random_logits(1, 7, seed)) for seed in (20, 21))
    full = gradient(lambda logits: soft_loss("kl", logits, double_dense(teacher)), student)
    grid = (np.arange(2000) + 0.5) / 2000
    arrays = Sample(4).encode(teacher.expand(2000, 7).numpy().astype(np.float32), (1.0,), uniform_N=grid)
    targets = SampleTargets(
        torch.from_numpy(arrays["ids"]).long(), torch.from_numpy(arrays["counts"]) / 4.0, all_valid(2000), 1.0
    )
    found = gradient(lambda logits: soft_loss("sampled-ce", logits, targets), student.expand(2000, 7)).mean(0)
    assert torch.allclose(found, full[0], atol=1e-3)


@pytest.mark.parametrize(("encoding", "name"), CASES, ids=lambda value: getattr(value, "name", value))
def test_a_gradient_is_that_of_the_value(encoding: Encoding, name: str) -> None:
    teacher, student = (torch.from_numpy(random_logits(3, 5, seed)) for seed in (5, 6))
    targets = double_dense(teacher, 2.0) if encoding.name == "dense" else double_topk(teacher, 2, 2.0)
    assert torch.autograd.gradcheck(lambda logits: soft_loss(name, logits, targets), student.requires_grad_())


@pytest.mark.parametrize("temperature", [1.0, 8.0])
@pytest.mark.parametrize(("dense", "topk"), [("kl", "tail-bucket"), ("reverse-kl", "reverse-kl"), ("jsd", "jsd")])
def test_topk_of_all_classes_is_the_full_divergence(dense: str, topk: str, temperature: float) -> None:
    teacher, student = random_logits(seed=7), torch.from_numpy(random_logits(seed=8)).float()
    full = soft_loss(dense, student, targets_of(Dense("float32"), teacher, temperature))
    kept = targets_of(TopK(7, "float32"), teacher, temperature)
    assert torch.allclose(soft_loss(topk, student, kept), full, rtol=1e-5, atol=1e-5)
    grad = gradient(lambda logits: soft_loss(topk, logits, kept), student)
    expected = gradient(
        lambda logits: soft_loss(dense, logits, targets_of(Dense("float32"), teacher, temperature)), student
    )
    assert torch.allclose(grad, expected, atol=1e-5)


@pytest.mark.parametrize(("encoding", "name"), CASES, ids=lambda value: getattr(value, "name", value))
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_student_that_equals_the_teacher_has_nothing_to_learn(
    encoding: Encoding, name: str, temperature: float
) -> None:
    teacher = torch.from_numpy(random_logits(seed=9))
    targets = double_dense(teacher, temperature) if encoding.name == "dense" else double_topk(teacher, 3, temperature)
    student = teacher + 5.0  # the same distribution
    if name == "truncated":  # its minimum is elsewhere: that is why it is biased
        assert gradient(lambda logits: soft_loss(name, logits, targets), student).abs().max() > 0.01
        return
    assert soft_loss(name, student, targets).abs().max() < 1e-12
    assert gradient(lambda logits: soft_loss(name, logits, targets), student).abs().max() < 1e-12


def test_at_high_temperature_the_soft_loss_becomes_logit_matching() -> None:
    teacher, student = (torch.from_numpy(random_logits(seed=seed)) for seed in (10, 11))
    matched = soft_loss("mse", student, double_dense(teacher))
    errors = [
        (soft_loss("kl", student, double_dense(teacher, temperature)) / matched - 1).abs().max()
        for temperature in (10.0, 100.0, 1000.0)
    ]
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert errors[2] < 0.01


@pytest.mark.parametrize("name", ["kl", "reverse-kl", "jsd"])
def test_gradients_keep_their_size_while_the_temperature_grows(name: str) -> None:
    teacher, student = (torch.from_numpy(random_logits(seed=seed, scale=0.5)) for seed in (12, 13))
    sizes = [
        gradient(lambda logits, t=temperature: soft_loss(name, logits, double_dense(teacher, t)), student).norm()  # type: ignore[misc]
        for temperature in (10.0, 100.0)
    ]
    assert 0.8 < sizes[1] / sizes[0] < 1.25


def test_a_tail_far_below_float32_is_not_lost() -> None:
    # one minus the kept mass would be 0 here, and its logarithm -inf
    teacher, student = torch.tensor([[40.0, 0.0, 0.0, -1.0]]), torch.tensor([[50.0, 1.0, 0.0, 2.0]])
    targets = targets_of(TopK(1, "float32"), teacher.double().numpy())
    assert isinstance(targets, TopKTargets)
    exact = torch.tensor([0.0, 0.0, -1.0]).double().logsumexp(0) - 40.0
    assert abs(targets.log_tail_N.item() - exact.item()) < 1e-4
    found = gradient(lambda logits: soft_loss("reverse-kl", logits, targets), student)
    assert found.isfinite().all()
    assert found.abs().max() > 0


@pytest.mark.parametrize("name", TOPK_LOSSES)
@pytest.mark.parametrize("log_tail", [-math.inf, -1e30, -200.0, -1e-3])
def test_no_tail_however_small_gives_a_gradient_that_is_not_finite(name: str, log_tail: float) -> None:
    kept = math.log(-math.expm1(log_tail)) if log_tail > -50 else 0.0
    targets = TopKTargets(
        torch.tensor([[1]]), torch.tensor([[kept]]), torch.tensor([log_tail]), torch.tensor([True]), 2.0
    )
    for logits in ([[0.0, 1.0, 2.0]], [[0.0, 300.0, 0.0]], [[300.0, 0.0, 0.0]]):
        student = torch.tensor(logits)
        assert soft_loss(name, student, targets).isfinite().all()
        assert gradient(lambda values: soft_loss(name, values, targets), student).isfinite().all()


@pytest.mark.parametrize("values", ["float16", "float32"])
@pytest.mark.parametrize("name", DENSE)
def test_classes_that_the_teacher_rules_out_leave_everything_finite(name: str, values: Any) -> None:
    teacher = np.array([[1.0, 2.0, -np.inf, 0.0], [0.0, -np.inf, -np.inf, 3.0]])
    targets = targets_of(Dense(values), teacher)
    for student in (torch.randn(2, 4), torch.tensor([[0.0, 1.0, -math.inf, 3.0], [1.0, -math.inf, -math.inf, 0.0]])):
        assert soft_loss(name, student, targets).isfinite().all()
        assert gradient(lambda logits: soft_loss(name, logits, targets), student).isfinite().all()


def test_logit_matching_leaves_out_classes_that_are_ruled_out() -> None:
    targets = targets_of(Dense("float32"), np.array([[1.0, 2.0, -np.inf, 0.0]]))
    narrow = targets_of(Dense("float32"), np.array([[1.0, 2.0, 0.0]]))
    found = soft_loss("mse", torch.tensor([[0.5, 0.1, 9.0, 0.2]]), targets)
    assert torch.allclose(found, soft_loss("mse", torch.tensor([[0.5, 0.1, 0.2]]), narrow))


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_rows_without_targets_have_neither_loss_nor_gradient(encoding: Encoding) -> None:
    manifest, arrays = stored(encoding, random_logits())
    student = torch.from_numpy(random_logits(seed=14)).float()
    whole = build_targets(manifest, arrays, 1.0)
    for spec in manifest.arrays:
        if spec.name in arrays:
            arrays[spec.name][2] = spec.fill_value
    arrays["status"][2] = STATUS_NOT_FINITE
    targets = build_targets(manifest, arrays, 1.0)
    for name in encoding.losses:
        found, expected = soft_loss(name, student, targets), soft_loss(name, student, whole)
        assert found[2] == 0
        assert torch.equal(found[[0, 1, 3, 4, 5]], expected[[0, 1, 3, 4, 5]])
        grad = gradient(lambda logits, name=name: soft_loss(name, logits, targets), student)  # type: ignore[misc]
        assert grad.isfinite().all()
        assert (grad[2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("encoding", [Dense("float32"), TopK(3, "float32"), Sample(NUM_DRAWS)], ids=lambda it: it.name)
def test_logits_of_few_bits_are_reduced_in_float32(dtype: torch.dtype, encoding: Encoding) -> None:
    student = torch.from_numpy(random_logits(seed=15)).to(dtype)
    targets = targets_of(encoding, random_logits(seed=16))
    for name in encoding.losses:
        with torch.autocast("cpu", torch.bfloat16):
            found = soft_loss(name, student, targets)
        assert found.dtype == torch.float32
        assert torch.equal(found, soft_loss(name, student.float(), targets))
    assert gradient(lambda logits: soft_loss(default_loss(encoding), logits, targets), student).dtype == dtype


# torch's own tracing of an autograd function makes an object of it, which torch itself warns of
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("encoding", [Dense("float16"), TopK(3, "uint8"), Sample(NUM_DRAWS)], ids=lambda it: it.name)
def test_losses_compile_without_a_break_in_the_graph(encoding: Encoding) -> None:
    targets = targets_of(encoding, random_logits(seed=17), 4.0)
    student = torch.from_numpy(random_logits(seed=18)).float()
    for name in encoding.losses:
        torch.compiler.reset()
        compiled = torch.compile(soft_loss, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(name, student, targets), soft_loss(name, student, targets), atol=1e-6)
        found = gradient(partial(compiled, name, targets=targets), student)
        assert torch.allclose(found, gradient(partial(soft_loss, name, targets=targets), student), atol=1e-6)


def test_the_hard_loss_is_the_cross_entropy_of_known_classes() -> None:
    logits = torch.from_numpy(random_logits(3, 4, 19)).float().requires_grad_()
    found = hard_loss(logits, torch.tensor([2, -1, 0], dtype=torch.int32))
    expected = -log_softmax(logits.detach().double().numpy())[[0, 2], [2, 0]]
    np.testing.assert_allclose(found.detach().numpy()[[0, 2]], expected, rtol=1e-6)
    assert found[1] == 0
    (grad,) = torch.autograd.grad(found.sum(), logits)
    assert (grad[1] == 0).all()
    assert grad.isfinite().all()


def test_each_encoding_has_its_losses_and_a_reason_against_the_others() -> None:
    defaults: dict[Encoding, str] = {Dense(): "kl", TopK(3): "tail-bucket", Sample(9): "sampled-ce", Hidden(4): "kl"}
    for encoding, name in defaults.items():
        assert default_loss(encoding) == name
        assert encoding.losses <= set(LOSSES)
        assert name in encoding.losses
        for allowed in encoding.losses:
            check_loss(encoding, allowed)
    assert set(COMPARED_LOSSES) < TopK(3).losses
    with pytest.raises(
        MismatchError, match=r"a topk store allows \(.*\), got kl; it needs the teacher's logits of all"
    ):
        check_loss(TopK(3), "kl")
    for name in ("kl", "reverse-kl", "jsd", "tail-bucket", "truncated", "renormalised"):
        with pytest.raises(
            MismatchError, match=rf"a sample store allows \(sampled-ce\), got {name}; it is biased on draws"
        ):
            check_loss(Sample(9), name)
    for without_mse in (TopK(3), Sample(9)):
        with pytest.raises(MismatchError, match="got mse; it needs the teacher's logits of all classes"):
            check_loss(without_mse, "mse")
    for whole in (Dense(), Hidden(4)):
        with pytest.raises(MismatchError, match="got tail-bucket; it is made for kept entries and a tail"):
            check_loss(whole, "tail-bucket")
    for exact in (Dense(), Hidden(4), TopK(3)):
        with pytest.raises(MismatchError, match="got sampled-ce; it is made for draws, and here the teacher's own"):
            check_loss(exact, "sampled-ce")
    with pytest.raises(ValueError, match=r"loss: expected one of kl, .*, got 'l2'"):
        check_loss(Dense(), "l2")
    assert [name for name in LOSSES if not uses_temperature(name)] == ["mse"]


def test_a_loss_of_hidden_states_is_that_of_their_logits_and_runs_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    head = Head(torch.randn(7, 4), torch.randn(7), 0.8, 6.0)
    targets = HiddenTargets(torch.randn(6, 4).half(), head, torch.tensor([True] * 5 + [False]), 2.0)
    dense = DenseTargets(head.logits(targets.hidden_NW.float()), targets.valid_N, 2.0)
    student = torch.randn(6, 7)
    seen: list[int] = []
    logits = Head.logits

    def watched(self: Head, hidden_RW: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden_RW))
        return logits(self, hidden_RW)

    monkeypatch.setattr(Head, "logits", watched)
    monkeypatch.setattr("studenttrain.loss.CHUNK_BYTES", {"cpu": 4 * 7 * 4})
    for name in DENSE:
        with torch.autocast("cpu", torch.bfloat16):  # the teacher is not run with fewer bits
            found = soft_loss(name, student, targets)
        torch.testing.assert_close(found, soft_loss(name, student, dense), rtol=1e-5, atol=1e-5)
        grad = gradient(partial(soft_loss, name, targets=targets), student)
        expected = gradient(partial(soft_loss, name, targets=dense), student)
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)
    assert max(seen) == 4
    assert soft_loss(
        "kl", student[:0], replace(targets, hidden_NW=targets.hidden_NW[:0], valid_N=all_valid(0))
    ).shape == (0,)


def test_a_chunk_has_as_many_rows_as_fit() -> None:
    cpu = torch.device("cpu")
    assert rows_at_once(1000, cpu, 40_000) == 10
    assert rows_at_once(1000, cpu, 39_999) == 9
    assert rows_at_once(1000, cpu, 1) == 1
    assert 32 << 20 <= 4 * 151_936 * rows_at_once(151_936, cpu) <= 64 << 20


def test_the_logsumexp_of_the_others_does_not_cancel_and_may_be_none() -> None:
    logits = torch.tensor([[300.0, 1.0, 0.0, 2.0], [300.0, -math.inf, -math.inf, -math.inf]])
    kept, rest = kept_and_rest(logits, torch.tensor([[0], [0]]), 1.0)
    assert kept.tolist() == [[300.0], [300.0]]
    torch.testing.assert_close(rest, torch.tensor([torch.tensor([1.0, 0.0, 2.0]).logsumexp(0), -math.inf]))
    assert torch.equal(logits[1], torch.tensor([300.0, -math.inf, -math.inf, -math.inf]))  # the caller's are left
    lse, softmax = lse_and_softmax(logits.clone(), torch.empty(2, 4))
    torch.testing.assert_close(lse, logits.logsumexp(1))
    torch.testing.assert_close(softmax, logits.softmax(1))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss: expected one of kl, .* on DenseTargets, got 'tail-bucket'"):
        soft_loss("tail-bucket", torch.zeros(6, 7), targets_of(Dense(), random_logits()))
    with pytest.raises(ValueError, match=r"loss: expected one of sampled-ce on SampleTargets, got 'kl'"):
        soft_loss("kl", torch.zeros(6, 7), targets_of(Sample(9), random_logits()))
    manifest, arrays = stored(TopK(3), random_logits(), 4.0)
    with pytest.raises(MismatchError, match=r"temperature: expected one that the store declares \(4\), got 2;"):
        build_targets(manifest, arrays, 2.0)
    with pytest.raises(ValueError, match="temperature: expected a number above 0, got 0"):
        build_targets(manifest, arrays, 0)


finite = st.floats(-30, 30, width=32)


@st.composite
def logit_pairs(draw: st.DrawFn) -> tuple[Array, Array, int]:
    """A teacher's and a student's logits, and a k."""
    num_classes = draw(st.integers(2, 8))
    rows = st.lists(finite, min_size=num_classes, max_size=num_classes)
    return np.array([draw(rows)]), np.array([draw(rows)]), draw(st.integers(1, num_classes))


@settings(deadline=None, max_examples=60)
@given(logit_pairs(), st.sampled_from([0.5, 1.0, 6.0]))
def test_divergences_are_never_negative_and_never_beyond_the_full_one(
    pair: tuple[Array, Array, int], temperature: float
) -> None:
    teacher, student = (torch.from_numpy(values) for values in pair[:2])
    full = {name: soft_loss(name, student, double_dense(teacher, temperature)) for name in DENSE[:3]}
    kept = double_topk(teacher, pair[2], temperature)
    for topk, dense in (("tail-bucket", "kl"), ("reverse-kl", "reverse-kl"), ("jsd", "jsd")):
        found = soft_loss(topk, student, kept)
        assert (found >= -1e-9).all()
        assert (found <= full[dense] * (1 + 1e-9) + 1e-9).all()  # merging classes can't add divergence
    assert (full["jsd"] <= temperature**2 * math.log(2) + 1e-9).all()


@settings(deadline=None, max_examples=60)
@given(logit_pairs(), st.floats(-50, 50))
def test_a_constant_added_to_the_logits_changes_nothing(pair: tuple[Array, Array, int], constant: float) -> None:
    teacher, student = (torch.from_numpy(values) for values in pair[:2])
    for name in DENSE:
        targets = double_dense(teacher, 2.0)
        assert torch.allclose(
            soft_loss(name, student + constant, targets), soft_loss(name, student, targets), atol=1e-9
        )
    for name in TOPK_LOSSES:
        kept = double_topk(teacher, pair[2], 2.0)
        assert torch.allclose(soft_loss(name, student + constant, kept), soft_loss(name, student, kept), atol=1e-9)
