"""The layout is a bijection between rows and places."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.layout import Layout, from_ranges, to_ranges

layouts = st.builds(
    lambda num_rows, chunk_rows, chunks: Layout(num_rows, chunk_rows * chunks, chunk_rows),
    st.integers(1, 300),
    st.integers(1, 20),
    st.integers(1, 6),
)


@given(layouts)
def test_every_row_is_in_just_one_chunk_of_just_one_shard(layout: Layout) -> None:
    rows = []
    for shard in range(layout.num_shards):
        start, stop = layout.shard_bounds(shard)
        in_chunks: list[int] = []
        for chunk in range(layout.num_chunks(shard)):
            first, end = layout.chunk_bounds(shard, chunk)
            assert 0 < end - first <= layout.chunk_rows
            in_chunks += range(first, end)
        assert in_chunks == list(range(start, stop))
        assert {layout.shard_of(row) for row in in_chunks} == {shard}
        rows += in_chunks
    assert rows == list(range(layout.num_rows))


@given(layouts, st.data())
def test_split_gives_each_row_of_a_range_once_with_its_shard(layout: Layout, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, layout.num_rows))
    stop = data.draw(st.integers(start, layout.num_rows))
    pieces = list(layout.split(start, stop))
    assert [row for _, first, end in pieces for row in range(first, end)] == list(range(start, stop))
    for shard, first, end in pieces:
        assert first < end
        assert layout.shard_of(first) == layout.shard_of(end - 1) == shard


@given(st.sets(st.integers(0, 60)))
def test_ranges_give_back_the_shards(shards: set[int]) -> None:
    ranges = to_ranges(sorted(shards))
    assert from_ranges(ranges) == sorted(shards)
    assert all(before[1] < after[0] for before, after in pairwise(ranges))


def test_places_that_can_not_be_are_refused() -> None:
    layout = Layout(10, 4, 2)
    with pytest.raises(ValueError, match="shard: expected 0 to 2, got 3"):
        layout.shard_bounds(3)
    with pytest.raises(ValueError, match="row: expected 0 to 9, got -1"):
        layout.shard_of(-1)
    with pytest.raises(ValueError, match="chunk: expected 0 to 0 in shard 2, got 1"):
        layout.chunk_bounds(2, 1)
    with pytest.raises(ValueError, match=r"rows: expected a range inside \[0, 10\), got \[4, 3\)"):
        list(layout.split(4, 3))


def test_counts_that_can_not_be_are_refused() -> None:
    for name in ("num_rows", "shard_rows", "chunk_rows"):
        counts = {"num_rows": 1, "shard_rows": 1, "chunk_rows": 1, name: 0}
        with pytest.raises(ValueError, match=f"{name}: expected a whole number, at least 1, got 0"):
            Layout(**counts)
    with pytest.raises(ValueError, match=r"num_rows: expected a whole number, at least 1, got 1\.5"):
        Layout(1.5, 1, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shard_rows: expected a multiple of chunk_rows \(3\), got 4"):
        Layout(10, 4, 3)
