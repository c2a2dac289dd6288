"""What a student gets of stored arrays: every encoding, flat rows and sequences."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from storage.arrays import STATUS_NOT_FINITE
from storage.encodings import Dense, Encoding, HeadArrays, Hidden, Sample, TopK
from storage.manifest import Manifest
from storage.sequences import Sequences
from studenttrain.heads import Head
from studenttrain.loss import default_loss, soft_loss
from studenttrain.targets import (
    DenseTargets,
    HiddenTargets,
    SampleTargets,
    SoftTargets,
    TopKTargets,
    build_targets,
    take_rows,
    target_arrays,
    target_head,
)
from tests.studenttrain.soft_targets import (
    ENCODINGS,
    NUM_DRAWS,
    Array,
    gradient,
    manifest_of,
    random_logits,
    stored,
    stored_hidden,
    targets_of,
)

HEAD = Head(torch.from_numpy(random_logits(7, 4, seed=1)).float(), torch.arange(7.0), 0.5, 5.0)


def tensors(targets: SoftTargets) -> dict[str, torch.Tensor]:
    """The fields that have a row for each row."""
    return {name: value for name, value in vars(targets).items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_targets_are_what_the_encoding_decodes_to(encoding: Encoding, temperature: float) -> None:
    manifest, arrays = stored(encoding, random_logits(), temperature)
    targets = build_targets(manifest, arrays, temperature)
    expected = encoding.logprobs(arrays, temperature, (temperature,))
    if isinstance(targets, DenseTargets):
        found = (targets.values_NC / temperature).log_softmax(1)
    elif isinstance(targets, SampleTargets):
        found = targets.probs_ND.log()
        assert np.array_equal(targets.ids_ND.numpy(), arrays["ids"])
    else:
        assert isinstance(targets, TopKTargets)
        found = torch.cat([targets.logprobs_NK, targets.log_tail_N[:, None]], 1)
        assert targets.ids_NK.dtype == torch.int64
        assert np.array_equal(targets.ids_NK.numpy(), arrays["ids"])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(found.exp().sum(1), torch.ones(len(found)), atol=1e-6)


def test_the_arrays_that_are_needed_are_named() -> None:
    named = {str(encoding): target_arrays(manifest_of(encoding, 9, (1.0,))) for encoding in (*ENCODINGS, Hidden(4))}
    assert named[str(Dense("float16"))] == ("status", "values")
    assert named[str(Dense("uint8"))] == ("status", "value_range", "values")
    assert named[str(TopK(3))] == ("ids", "log_tail", "lse", "status", "values")
    assert named[str(TopK(3, "uint8"))] == ("ids", "log_tail", "lse", "status", "value_range", "values")
    assert named[str(Sample(NUM_DRAWS, 1))] == ("counts", "ids", "status")
    assert named[str(Hidden(4))] == ("hidden", "status")
    for has_tokens in (True, False):
        sequences = Sequences(5, has_tokens, None, 0)
        names = target_arrays(manifest_of(Dense(), 9, (1.0,), sequences=sequences))
        assert names == (("position_ids", "status", "values") if has_tokens else ("status", "values"))


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


def test_hidden_states_give_the_logits_that_a_dense_store_of_that_teacher_has() -> None:
    manifest, arrays = stored_hidden(random_logits(6, 4, seed=2).astype(np.float32), HEAD)
    targets = build_targets(manifest, arrays, 3.0, head=HEAD)
    assert isinstance(targets, HiddenTargets)
    assert targets.head is HEAD
    logits = HEAD.logits(targets.hidden_NW)
    dense = targets_of(Dense("float32"), logits.numpy(), 3.0)
    assert isinstance(dense, DenseTargets)
    torch.testing.assert_close(targets.dense().values_NC, dense.values_NC)
    assert targets.dense().temperature == 3.0


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_head_of_a_store_is_float32_with_its_scale_and_its_cap(has_bias: bool) -> None:
    weight, bias = np.ones((3, 2), np.float16), np.full(3, 0.5, np.float16) if has_bias else None
    head = target_head(Hidden(2, "float16", 2.0, 7.0, has_bias), HeadArrays(weight, bias))
    assert head.weight_CW.dtype == torch.float32
    assert (head.scale, head.soft_cap) == (2.0, 7.0)
    expected = 7 * math.tanh(2.0 * (3 + (0.5 if has_bias else 0)) / 7)
    torch.testing.assert_close(head.logits(torch.tensor([[1.0, 2.0]])), torch.full((1, 3), expected))


def test_rows_are_taken_of_all_that_has_rows() -> None:
    for encoding in ENCODINGS:
        targets = targets_of(encoding, random_logits())
        for rows in (slice(1, 3), torch.tensor([5, 0])):
            taken = take_rows(targets, rows)
            assert type(taken) is type(targets)
            assert taken.temperature == targets.temperature
            for name, values in tensors(targets).items():
                assert torch.equal(getattr(taken, name), values[rows])


def as_sequences(
    manifest: Manifest, arrays: Mapping[str, Array], num_positions: int, has_tokens: bool
) -> tuple[Manifest, dict[str, Array]]:
    """A store of flat rows, whose rows are positions instead; the first tokens of two documents, and a refused row."""
    num_rows = len(arrays["status"]) // num_positions
    kept = {name: values.reshape(num_rows, num_positions, *values.shape[1:]) for name, values in arrays.items()}
    kept["status"] = np.zeros(num_rows, np.uint8)
    if has_tokens:
        # row 0: one document; row 1: a document of two tokens, then one of two; row 2: two tokens, then what pads it
        kept["position_ids"] = np.array([[0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 0, 0]], np.uint16)
    sequences = Sequences(num_positions, has_tokens, None, 0)
    return manifest_of(manifest.encoding, manifest.num_classes, manifest.temperatures, sequences=sequences), kept


MASK_NP = np.array([[1, 1, 1], [1, 0, 1], [1, 0, 0]], bool)


@pytest.mark.parametrize("has_tokens", [True, False])
@pytest.mark.parametrize("encoding", [*ENCODINGS, Hidden(4, "float32")], ids=str)
def test_positions_of_sequences_are_rows_and_masked_ones_have_no_targets(encoding: Encoding, has_tokens: bool) -> None:
    flat: tuple[Manifest, dict[str, Array]]
    if isinstance(encoding, Hidden):
        flat, options = stored_hidden(random_logits(9, 4, seed=2).astype(np.float32), HEAD), {"head": HEAD}
    else:
        flat, options = stored(encoding, random_logits(9)), {}
    manifest, arrays = as_sequences(*flat, num_positions=3, has_tokens=has_tokens)
    expected = build_targets(*flat, 1.0, **options)  # type: ignore[arg-type]
    given: dict[str, Any] = options if has_tokens else {**options, "mask_NP": MASK_NP}
    valid_R = torch.from_numpy(MASK_NP.flatten())
    for refused in ([], [0]):
        arrays["status"][refused] = STATUS_NOT_FINITE
        for row in refused:
            valid_R[3 * row : 3 * row + 3] = False
            for spec in manifest.arrays:
                if spec.name in arrays and spec.name not in ("status", "position_ids"):
                    arrays[spec.name][row] = spec.fill_value
        targets = build_targets(manifest, arrays, 1.0, **given)
        assert torch.equal(targets.valid_N, valid_R)
        for name, values in tensors(expected).items():
            assert torch.equal(getattr(targets, name)[valid_R], values[valid_R])
        student = torch.from_numpy(random_logits(9, seed=3)).float()
        found = gradient(lambda logits, t=targets: soft_loss(default_loss(encoding), logits, t), student)  # type: ignore[misc]
        whole = gradient(lambda logits: soft_loss(default_loss(encoding), logits, expected), student)
        assert torch.equal(found, torch.where(valid_R[:, None], whole, 0.0))


def test_a_mask_or_a_head_that_is_missing_or_unused_is_refused() -> None:
    flat = stored(Dense(), random_logits(9))
    with pytest.raises(ValueError, match=r"mask_NP: expected none, since the store says .*, got one; leave it out"):
        build_targets(*flat, 1.0, mask_NP=MASK_NP)
    with pytest.raises(ValueError, match="mask_NP: expected none"):
        build_targets(*as_sequences(*flat, num_positions=3, has_tokens=True), 1.0, mask_NP=MASK_NP)
    with pytest.raises(
        ValueError, match="mask_NP: expected the mask of sequences whose tokens are not stored, got non"
    ):
        build_targets(*as_sequences(*flat, num_positions=3, has_tokens=False), 1.0)
    with pytest.raises(ValueError, match="head: expected none with a dense store, got one; leave it out"):
        build_targets(*flat, 1.0, head=HEAD)
    hidden = stored_hidden(random_logits(6, 4).astype(np.float32), HEAD)
    with pytest.raises(ValueError, match="head: expected the teacher's head beside hidden states, got none; take it"):
        build_targets(*hidden, 1.0)
