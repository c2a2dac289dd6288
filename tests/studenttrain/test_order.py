"""The order of an epoch: a bijection, from numbers alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from storage.encodings import Dense, Encoding, TopK
from storage.layout import Layout, from_ranges, to_ranges
from storage.manifest import Manifest
from studenttrain.order import (
    WINDOW_BYTES,
    EpochOrder,
    batch_bounds,
    check_sealed,
    choose_block_rows,
    choose_window_blocks,
    num_batches,
    permutation,
)

GOLDEN_PERMUTATION = [6, 3, 0, 1, 2, 4, 7, 5]
GOLDEN_ORDER = [
    12,
    10,
    35,
    30,
    14,
    11,
    39,
    34,
    36,
    32,
    38,
    13,
    33,
    37,
    31,
    17,
    3,
    15,
    18,
    1,
    9,
    0,
    5,
    4,
    7,
    16,
    6,
    19,
    8,
    2,
]


@st.composite
def orders(draw: st.DrawFn) -> EpochOrder:
    """Orders of small stores, some of whose shards are sealed."""
    chunk_rows = draw(st.integers(1, 7))
    layout = Layout(draw(st.integers(1, 400)), chunk_rows * draw(st.integers(1, 9)), chunk_rows)
    shards = draw(st.sets(st.integers(0, layout.num_shards - 1), min_size=1))
    sealed = tuple(to_ranges(sorted(shards)))
    seed, epoch = draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, 1000))
    return EpochOrder(layout, sealed, seed, epoch, draw(st.integers(1, 30)), draw(st.integers(1, 12)))


def sealed_rows(order: EpochOrder) -> list[int]:
    """The rows of an order's shards, ascending."""
    return [row for shard in from_ranges(order.sealed) for row in range(*order.layout.shard_bounds(shard))]


@settings(deadline=None)
@given(orders())
def test_every_sealed_row_comes_once_an_epoch(order: EpochOrder) -> None:
    rows = order.rows(0, order.num_rows)
    assert rows.dtype == np.int64
    assert sorted(rows.tolist()) == sealed_rows(order)


@settings(deadline=None)
@given(orders(), st.integers(1, 50), st.integers(1, 5))
def test_ranks_share_the_batches_of_one_rank(order: EpochOrder, batch_size: int, world_size: int) -> None:
    for batch in range(num_batches(order.num_rows, batch_size)):
        bounds = [batch_bounds(order.num_rows, batch_size, batch, rank, world_size) for rank in range(world_size)]
        alone = batch_bounds(order.num_rows, batch_size, batch, 0, 1)
        assert alone[1] - alone[0] == min(batch_size, order.num_rows - batch * batch_size)
        assert np.concatenate([order.rows(*pair) for pair in bounds]).tolist() == order.rows(*alone).tolist()
        sizes = [stop - start for start, stop in bounds]
        assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(orders(), st.data())
def test_any_stretch_is_read_without_what_is_before_it(order: EpochOrder, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, order.num_rows))
    stop = data.draw(st.integers(start, order.num_rows))
    fresh = EpochOrder(order.layout, order.sealed, order.seed, order.epoch, order.block_rows, order.window_blocks)
    assert fresh.rows(start, stop).tolist() == order.rows(0, order.num_rows)[start:stop].tolist()


@settings(deadline=None)
@given(orders())
def test_a_window_is_its_blocks_shuffled_and_no_larger_than_it_may_be(order: EpochOrder) -> None:
    start = 0
    for index in range(order.num_windows):
        window = order.window(index)
        rows = np.concatenate([np.arange(*block) for block in window.blocks])
        assert window.start == start == order._window_starts[index]
        assert order.window_at(start) == index
        assert window.rows_R[window.positions_R].tolist() == rows.tolist()
        assert len(window.blocks) <= order.window_blocks
        assert len(rows) <= order.max_window_rows <= order.window_blocks * order.block_rows
        for first, end in window.blocks:
            assert order.layout.shard_of(first) == order.layout.shard_of(end - 1)
        start = window.stop
    assert start == order.num_rows


@st.composite
def chosen_orders(draw: st.DrawFn) -> tuple[EpochOrder, NDArray[np.bool_]]:
    """Orders that give some of their rows, and which these are."""
    order = draw(orders())
    share = draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    chosen_N = np.random.default_rng(draw(st.integers(0, 99))).random(order.layout.num_rows) < share
    return replace(order, chosen_N=chosen_N), chosen_N


@settings(deadline=None)
@given(chosen_orders())
def test_every_chosen_row_comes_once_an_epoch_and_no_other(drawn: tuple[EpochOrder, NDArray[np.bool_]]) -> None:
    order, chosen_N = drawn
    rows = order.rows(0, order.num_rows).tolist()
    assert sorted(rows) == [row for row in sealed_rows(order) if chosen_N[row]]


@settings(deadline=None)
@given(chosen_orders())
def test_a_window_of_chosen_rows_has_them_first_and_no_block_without_any(
    drawn: tuple[EpochOrder, NDArray[np.bool_]],
) -> None:
    order, chosen_N = drawn
    start = 0
    for index in range(order.num_windows):
        window = order.window(index)
        rows = np.concatenate([np.arange(*block) for block in window.blocks])
        assert sorted(window.positions_R.tolist()) == list(range(len(rows)))
        assert window.rows_R[window.positions_R[chosen_N[rows]]].tolist() == rows[chosen_N[rows]].tolist()
        assert window.start == start
        assert all(chosen_N[first:end].any() for first, end in window.blocks)
        assert len(rows) <= order.max_window_rows <= order.window_blocks * order.block_rows
        start = window.stop
    assert start == order.num_rows


@settings(deadline=None)
@given(chosen_orders(), st.data())
def test_any_stretch_of_chosen_rows_is_read_without_what_is_before_it(
    drawn: tuple[EpochOrder, NDArray[np.bool_]], data: st.DataObject
) -> None:
    order, _ = drawn
    start = data.draw(st.integers(0, order.num_rows))
    stop = data.draw(st.integers(start, order.num_rows))
    assert replace(order).rows(start, stop).tolist() == order.rows(0, order.num_rows)[start:stop].tolist()


@settings(deadline=None)
@given(orders())
def test_choosing_all_rows_is_choosing_none(order: EpochOrder) -> None:
    of_all = replace(order, chosen_N=np.ones(order.layout.num_rows, bool))
    assert of_all.rows(0, of_all.num_rows).tolist() == order.rows(0, order.num_rows).tolist()
    assert of_all.max_window_rows == order.max_window_rows


@settings(deadline=None)
@given(st.integers(0, 3000), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_a_permutation_holds_every_number_once(size: int, seed: int, epoch: int, stream: int) -> None:
    assert sorted(permutation(size, seed, epoch, stream).tolist()) == list(range(size))


def test_the_order_is_the_same_for_good() -> None:
    # a run that is resumed after an update must go on in the order that it began with
    assert permutation(8, 1, 2, 3).tolist() == GOLDEN_PERMUTATION
    order = EpochOrder(Layout(40, 10, 5), ((0, 2), (3, 4)), 7, 1, 5, 3)
    assert order.rows(0, 30).tolist() == GOLDEN_ORDER


def test_seed_epoch_and_window_each_give_another_order() -> None:
    found = [permutation(50, *key).tolist() for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len({tuple(values) for values in found}) == 4


def test_rows_are_mixed_over_the_whole_window() -> None:
    order = EpochOrder(Layout(6400, 640, 32), ((0, 10),), 0, 0, 32, 200)
    blocks = [set((order.rows(start, start + 100) // 32).tolist()) for start in range(0, 6400, 100)]
    assert min(map(len, blocks)) > 50  # a batch of 100 rows out of 200 blocks meets about 79 of them
    first = order.rows(0, 6400)
    assert abs(np.corrcoef(np.arange(6400), first)[0, 1]) < 0.05


def manifest_of(num_classes: int, encoding: Encoding, chunk_rows: int, shard_rows: int) -> Manifest:
    """A manifest, as far as its row's size and layout go."""
    empty: dict[str, Any] = {}
    return Manifest(
        num_rows=10**6,
        num_classes=num_classes,
        encoding=encoding,
        chunk_rows=chunk_rows,
        shard_rows=shard_rows,
        has_hard_targets=False,
        compressor="none",
        provenance=empty,
        temperatures=(1.0,),
        teacher=empty,
        corpus=empty,
        preprocess=empty,
        class_names=None,
    )


@pytest.mark.parametrize(
    ("manifest", "block_rows", "window_blocks"),
    [
        (manifest_of(1000, Dense("float16"), 256, 12544), 256, 259),
        (manifest_of(1000, Dense("float16"), 16, 12544), 256, 259),
        (manifest_of(10, Dense("float32"), 64, 640), 640, 409),
        (manifest_of(150_000, TopK(64), 512, 8192), 1024, 256),
        (manifest_of(150_000, Dense("float32"), 64, 640), 64, 16),
    ],
)
def test_a_window_is_bounded_whatever_the_rows(manifest: Manifest, block_rows: int, window_blocks: int) -> None:
    assert choose_block_rows(manifest) == block_rows
    assert choose_window_blocks(manifest, block_rows) == window_blocks
    if window_blocks > 16:
        assert block_rows * window_blocks * manifest.row_bytes <= WINDOW_BYTES


@pytest.mark.parametrize("sealed", [[], [[0, 0]], [[2, 1]], [[0, 2], [2, 3]], [[0, 2], [1, 3]], [[-1, 1]], [[0, 5]]])
def test_ranges_that_can_not_be_are_refused(sealed: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="sealed: expected ascending ranges in 0 to 4, got "):
        check_sealed(sealed, Layout(40, 10, 5))
