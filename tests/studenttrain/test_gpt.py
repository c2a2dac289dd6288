"""The small decoder: what a position sees, and where the model runs."""

import io
import math
import warnings

import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from studenttrain import gpt
from studenttrain.gpt import GPT, document_mask, fitting_heads

VOCABULARY = 11


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(2, 16, VOCABULARY, num_heads=2)


@pytest.fixture
def token_ids() -> Tensor:
    return torch.randint(VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(1))


def packed(*lengths: int) -> Tensor:
    """Positions of documents of these lengths, behind one another, of one row."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


def test_its_weights_have_plain_names(model: GPT) -> None:
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if "blocks.1" not in name}
    assert shapes == {
        "embedding.weight": (11, 16),
        "blocks.0.attention.query_key_value.weight": (48, 16),
        "blocks.0.attention.output.weight": (16, 16),
        "blocks.0.feed_forward.up.weight": (64, 16),
        "blocks.0.feed_forward.down.weight": (16, 64),
        "head.weight": (11, 16),
    }


def test_a_fresh_model_knows_nothing_and_says_so(token_ids: Tensor) -> None:
    torch.manual_seed(0)
    model = GPT(4, 64, VOCABULARY)
    loss = F.cross_entropy(model(token_ids).flatten(0, 1), token_ids.flatten())
    assert float(loss.detach()) == pytest.approx(math.log(VOCABULARY), rel=0.02)
    adds, others = model.get_parameter("blocks.0.feed_forward.down.weight"), model.get_parameter("embedding.weight")
    assert float(adds.detach().std()) == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
    assert float(others.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_no_position_sees_a_later_token(model: GPT, token_ids: Tensor) -> None:
    changed = token_ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % VOCABULARY
    for position_ids in (None, packed(4, 6).expand(3, -1)):
        before, after = model(token_ids, position_ids), model(changed, position_ids)
        torch.testing.assert_close(before[:, :6], after[:, :6])
        assert not torch.allclose(before[:, 6:], after[:, 6:])


def test_no_document_sees_another(model: GPT, token_ids: Tensor) -> None:
    position_ids = torch.cat((packed(4, 6), packed(1, 1, 8), packed(10)))
    found = model(token_ids, position_ids)
    torch.testing.assert_close(found[:1, :4], model(token_ids[:1, :4]))
    torch.testing.assert_close(found[:1, 4:], model(token_ids[:1, 4:]))
    torch.testing.assert_close(found[1:2, 1:2], model(token_ids[1:2, 1:2]))
    torch.testing.assert_close(found[1:2, 2:], model(token_ids[1:2, 2:]))
    torch.testing.assert_close(found[2:], model(token_ids[2:]))


def test_the_mask_of_documents_is_lower_triangular_in_blocks() -> None:
    expected = torch.block_diag(torch.ones(2, 2).tril(), torch.ones(3, 3).tril(), torch.ones(1, 1)).bool()
    assert torch.equal(document_mask(packed(2, 3, 1))[0, 0], expected)


def test_order_matters_and_place_in_the_sequence_does_not(model: GPT, token_ids: Tensor) -> None:
    turned = token_ids.clone()
    turned[:, :2] = turned[:, :2].flip(1)
    turned[:, 0] = (token_ids[:, 1] + 1) % VOCABULARY
    assert not torch.allclose(model(token_ids)[:, -1], model(turned)[:, -1])
    later = torch.arange(10)[None].expand(3, -1) + 1
    seen_from_later = model(token_ids, later)  # no 0 in it: one document, further on
    torch.testing.assert_close(seen_from_later, model(token_ids), rtol=1e-4, atol=1e-5)


def test_a_product_of_complex_numbers_turns_as_one_written_out() -> None:
    generator = torch.Generator().manual_seed(2)
    heads_NPHD = torch.randn(2, 5, 3, 8, generator=generator)
    turn = gpt._turn(packed(3, 2).expand(2, -1), 8)
    pairs = heads_NPHD.unflatten(-1, (-1, 2))
    written_out = gpt._turn_pairs(pairs, turn).flatten(-2)
    torch.testing.assert_close(gpt._rotate(heads_NPHD, turn), written_out)
    torch.testing.assert_close(written_out.norm(dim=-1), heads_NPHD.norm(dim=-1))
    torch.testing.assert_close(written_out[:, 0], heads_NPHD[:, 0])
    angle = 2 * gpt.ROTARY_BASE ** (-2 / 8)  # of the second pair at position 2
    first, second = pairs[:, 2, :, 1].unbind(-1)
    torch.testing.assert_close(written_out[:, 2, :, 2], first * math.cos(angle) - second * math.sin(angle))


def test_autocast_and_half_weights_stay_close(model: GPT, token_ids: Tensor) -> None:
    position_ids = packed(4, 6).expand(3, -1)
    expected = model(token_ids, position_ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(token_ids, position_ids)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.01, rtol=0)
    found.float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.testing.assert_close(model.bfloat16()(token_ids, position_ids).float(), expected, atol=0.01, rtol=0)


def test_dropout_is_on_in_training_only(token_ids: Tensor) -> None:
    torch.manual_seed(0)
    model = GPT(1, 16, VOCABULARY, dropout=0.5)
    assert not torch.equal(model(token_ids), model(token_ids))
    model.eval()
    assert torch.equal(model(token_ids), model(token_ids))


@pytest.mark.parametrize("gives_positions", [True, False])
def test_it_can_be_exported_for_any_batch(model: GPT, token_ids: Tensor, gives_positions: bool) -> None:
    inputs = (token_ids, packed(4, 6).expand(3, -1).contiguous()) if gives_positions else (token_ids,)
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model.eval(), inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
        archive = io.BytesIO()
        torch.export.save(program, archive)
    one = tuple(value[:1] for value in inputs)
    torch.testing.assert_close(program.module()(*one), model(*one))


def test_it_can_be_compiled_as_one_graph(token_ids: Tensor) -> None:
    torch.manual_seed(0)
    model = GPT(1, 16, VOCABULARY)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    position_ids = packed(4, 6).expand(3, -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = compiled(token_ids, position_ids)
        found.square().sum().backward()
    gradient = model.embedding.weight.grad
    assert gradient is not None
    model.zero_grad()
    expected = model(token_ids, position_ids)
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, model.embedding.weight.grad)


def test_the_head_outside_of_a_parallel_forward_gets_its_gradient(
    model: GPT, token_ids: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = (tmp_path_factory.mktemp("ranks") / "store").as_uri()
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        for _ in range(2):
            hidden_NPW = parallel(token_ids, hidden_only=True)
            model.output_head().logits(hidden_NPW).logsumexp(2).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(token_ids).logsumexp(2).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(gradients[name], 2 * parameter.grad, msg=name)


@pytest.mark.parametrize(("width", "heads"), [(128, 2), (384, 6), (64, 1), (16, 1), (160, 2), (200, 2), (130, 1)])
def test_as_many_heads_of_about_64_as_divide_the_width(width: int, heads: int) -> None:
    assert fitting_heads(width) == heads
    assert GPT(1, width, 3).num_heads == heads


@pytest.mark.parametrize(("width", "heads", "advice"), [(128, 3, 2), (16, 16, 1)])
def test_heads_that_do_not_divide_the_width_are_refused(width: int, heads: int, advice: int) -> None:
    message = f"heads: expected a number that divides width {width} into even parts, got .*; use heads={advice}"
    with pytest.raises(ValueError, match=message):
        GPT(1, width, 3, heads)


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match="width: expected an even number, got 15; use 16"):
        GPT(1, 15, 3)
