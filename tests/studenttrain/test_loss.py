"""The losses, against their formulas in float64, their gradients, and their limits."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from storage.arrays import STATUS_NOT_FINITE
from storage.encodings import Dense, Encoding, TopK
from storage.errors import MismatchError
from storage.manifest import Manifest
from studenttrain.loss import (
    LOSSES,
    TOPK_LOSSES,
    DenseTargets,
    SoftTargets,
    TopKTargets,
    build_targets,
    check_loss,
    default_loss,
    hard_loss,
    soft_loss,
    target_arrays,
    uses_temperature,
)

Array = NDArray[Any]
DENSE = ("kl", "reverse-kl", "jsd", "mse")
ENCODINGS = (Dense("float32"), Dense("float16"), Dense("uint8"), TopK(3, "float32"), TopK(3), TopK(3, "uint8"), TopK(7))


def manifest_of(encoding: Encoding, num_classes: int, temperatures: Sequence[float]) -> Manifest:
    """A manifest of a store of an encoding."""
    empty: dict[str, Any] = {}
    return Manifest(
        num_rows=100,
        num_classes=num_classes,
        shard_rows=10,
        chunk_rows=10,
        encoding=encoding,
        temperatures=tuple(temperatures),
        teacher=empty,
        corpus=empty,
        preprocess=empty,
        class_names=None,
        has_hard_targets=False,
        compressor="none",
        provenance=empty,
    )


def stored(encoding: Encoding, logits_NC: Array, temperature: float = 1.0) -> tuple[Manifest, dict[str, Array]]:
    """The arrays that a store keeps of logits."""
    arrays = encoding.encode(logits_NC.astype(np.float32), (temperature,))
    arrays["status"] = np.zeros(len(logits_NC), np.uint8)
    return manifest_of(encoding, logits_NC.shape[1], (temperature,)), arrays


def targets_of(encoding: Encoding, logits_NC: Array, temperature: float = 1.0) -> SoftTargets:
    """What a student gets of logits that were stored."""
    return build_targets(*stored(encoding, logits_NC, temperature), temperature)


def double_topk(teacher_NC: Tensor, k: int, temperature: float = 1.0) -> TopKTargets:
    """Exact float64 top-k targets, for gradients."""
    logprobs_NC = (teacher_NC / temperature).log_softmax(1)
    order = logprobs_NC.argsort(1, descending=True)
    rest = logprobs_NC.gather(1, order[:, k:])
    tail_N = rest.logsumexp(1) if rest.shape[1] else torch.full((len(rest),), -math.inf, dtype=rest.dtype)
    valid_N = torch.ones(len(teacher_NC), dtype=torch.bool)
    return TopKTargets(order[:, :k], logprobs_NC.gather(1, order[:, :k]), tail_N, valid_N, temperature)


def double_dense(teacher_NC: Tensor, temperature: float = 1.0) -> DenseTargets:
    """Exact float64 dense targets."""
    return DenseTargets(teacher_NC, torch.ones(len(teacher_NC), dtype=torch.bool), temperature)


def random_logits(num_rows: int = 6, num_classes: int = 7, seed: int = 0, scale: float = 3.0) -> Array:
    """Logits in float32, as float64."""
    values = np.random.default_rng(seed).normal(size=(num_rows, num_classes)) * scale
    return values.astype(np.float32).astype(np.float64)


def log_softmax(values: Array) -> Array:
    """Its textbook form, in float64."""
    shifted = values - values.max(1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


def kl(p: Array, q: Array) -> Array:
    """sum p log(p / q), with 0 log 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        result: Array = np.where(p > 0, p * np.log(p / q), 0.0).sum(1)
    return result


def reference(name: str, teacher: Array, student: Array, k: int, temperature: float) -> Array:
    """The formula of a loss, in float64, by probabilities; top-k ones over the k largest."""
    p, q = np.exp(log_softmax(teacher / temperature)), np.exp(log_softmax(student / temperature))
    if name == "mse":
        difference = student - teacher
        return np.asarray(((difference - difference.mean(1, keepdims=True)) ** 2).sum(1) / (2 * teacher.shape[1]))
    kept = np.argsort(-teacher, 1, kind="stable")[:, :k]
    p_k, q_k = np.take_along_axis(p, kept, 1), np.take_along_axis(q, kept, 1)
    rest = np.argsort(-teacher, 1, kind="stable")[:, k:]
    tails = [np.take_along_axis(values, rest, 1).sum(1, keepdims=True) for values in (p, q)]
    m, big_q = p_k.sum(1, keepdims=True), q_k.sum(1, keepdims=True)
    if name == "truncated":
        return temperature**2 * kl(p_k / m, q_k)
    if name == "renormalised":
        return temperature**2 * kl(p_k / m, q_k / big_q)
    p_b, q_b = np.concatenate([p_k, tails[0]], 1), np.concatenate([q_k, tails[1]], 1)
    if name in ("kl", "tail-bucket"):
        return temperature**2 * kl(p_b, q_b)
    if name == "reverse-kl":
        return temperature**2 * kl(q_b, p_b)
    assert name == "jsd"
    return temperature**2 * 0.5 * (kl(p_b, (p_b + q_b) / 2) + kl(q_b, (p_b + q_b) / 2))


def gradient(loss: Callable[[Tensor], Tensor], logits_NC: Tensor) -> Tensor:
    """Of the sum over the rows, with respect to the logits."""
    logits_NC = logits_NC.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(logits_NC).sum(), logits_NC)
    return grad


CASES = [(Dense("float32"), name) for name in DENSE] + [(TopK(3, "float32"), name) for name in TOPK_LOSSES]


@pytest.mark.parametrize(("encoding", "name"), CASES, ids=lambda value: getattr(value, "name", value))
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_a_loss_is_its_formula(encoding: Encoding, name: str, temperature: float) -> None:
    teacher, student = random_logits(seed=1), random_logits(seed=2)
    k = 7 if encoding.name == "dense" else 3
    found = soft_loss(name, torch.from_numpy(student).float(), targets_of(encoding, teacher, temperature))
    assert found.dtype == torch.float32
    expected = reference(name, teacher, student, k, temperature)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=1e-6 * max(1.0, temperature**2))


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_targets_are_what_the_encoding_decodes_to(encoding: Encoding, temperature: float) -> None:
    manifest, arrays = stored(encoding, random_logits(), temperature)
    targets = build_targets(manifest, arrays, temperature)
    expected = encoding.logprobs(arrays, temperature, (temperature,))
    if isinstance(targets, DenseTargets):
        found = (targets.values_NC / temperature).log_softmax(1)
    else:
        found = torch.cat([targets.logprobs_NK, targets.log_tail_N[:, None]], 1)
        assert targets.ids_NK.dtype == torch.int64
        assert np.array_equal(targets.ids_NK.numpy(), arrays["ids"])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(found.exp().sum(1), torch.ones(len(found)), atol=1e-6)


def test_the_arrays_that_are_needed_are_named() -> None:
    named = {str(encoding): target_arrays(manifest_of(encoding, 9, (1.0,))) for encoding in ENCODINGS}
    assert named[str(Dense("float16"))] == ("status", "values")
    assert named[str(Dense("uint8"))] == ("status", "value_range", "values")
    assert named[str(TopK(3))] == ("ids", "log_tail", "lse", "status", "values")
    assert named[str(TopK(3, "uint8"))] == ("ids", "log_tail", "lse", "status", "value_range", "values")


def test_a_live_teacher_gives_the_bits_of_a_float32_store() -> None:
    logits = random_logits().astype(np.float32)
    live = DenseTargets.of_logits(torch.from_numpy(logits), 4.0)
    kept = targets_of(Dense("float32"), logits, 4.0)
    assert isinstance(kept, DenseTargets)
    assert torch.equal(live.values_NC, kept.values_NC)
    assert torch.equal(live.valid_N, kept.valid_N)


def test_the_founding_example_softens_as_printed() -> None:
    printed = {
        1: [0.00032, 0.04741, 0.95227],
        5: [0.11532, 0.31348, 0.57120],
        10: [0.20516, 0.33825, 0.45659],
        20: [0.26484, 0.34006, 0.39510],
    }
    for temperature, probs in printed.items():
        targets = targets_of(Dense("float16"), np.array([[2.0, 7.0, 10.0]]), float(temperature))
        assert isinstance(targets, DenseTargets)
        found = (targets.values_NC / temperature).softmax(1)[0].numpy()
        np.testing.assert_allclose(found, probs, atol=6e-6)


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
@pytest.mark.parametrize("encoding", [Dense("float32"), TopK(3, "float32")], ids=["dense", "topk"])
def test_logits_of_few_bits_are_reduced_in_float32(dtype: torch.dtype, encoding: Encoding) -> None:
    student = torch.from_numpy(random_logits(seed=15)).to(dtype)
    targets = targets_of(encoding, random_logits(seed=16))
    for name in encoding.losses:
        with torch.autocast("cpu", torch.bfloat16):
            found = soft_loss(name, student, targets)
        assert found.dtype == torch.float32
        assert torch.equal(found, soft_loss(name, student.float(), targets))
    assert gradient(lambda logits: soft_loss(default_loss(encoding), logits, targets), student).dtype == dtype


@pytest.mark.parametrize("encoding", [Dense("float16"), TopK(3, "uint8")], ids=["dense", "topk"])
def test_losses_compile_without_a_break_in_the_graph(encoding: Encoding) -> None:
    targets = targets_of(encoding, random_logits(seed=17), 4.0)
    student = torch.from_numpy(random_logits(seed=18)).float()
    for name in encoding.losses:
        torch.compiler.reset()
        compiled = torch.compile(soft_loss, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(name, student, targets), soft_loss(name, student, targets), atol=1e-6)


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
    assert default_loss(Dense()) == "kl"
    assert default_loss(TopK(3)) == "tail-bucket"
    for encoding in (Dense(), TopK(3)):
        assert encoding.losses <= set(LOSSES)
        for name in encoding.losses:
            check_loss(encoding, name)
    with pytest.raises(
        MismatchError, match=r"a topk store allows \(.*\), got kl; it needs the teacher's logits of all"
    ):
        check_loss(TopK(3), "kl")
    with pytest.raises(MismatchError, match="got mse; it needs the teacher's logits of all classes"):
        check_loss(TopK(3), "mse")
    with pytest.raises(MismatchError, match="got tail-bucket; it is made for kept entries and a tail"):
        check_loss(Dense(), "tail-bucket")
    with pytest.raises(ValueError, match=r"loss: expected one of kl, .*, got 'l2'"):
        check_loss(Dense(), "l2")
    assert [name for name in LOSSES if not uses_temperature(name)] == ["mse"]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss: expected one of kl, .* on DenseTargets, got 'tail-bucket'"):
        soft_loss("tail-bucket", torch.zeros(6, 7), targets_of(Dense(), random_logits()))
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
