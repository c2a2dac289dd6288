"""The arithmetic of a dump: layout, batches, limits."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from storage.arrays import ArraySpec, common_arrays
from storage.encodings import Dense, TopK
from storage.layout import MAX_SHARDS, Layout
from teacherdump.plan import (
    CHUNK_BYTES,
    MAX_SHARD_ROWS,
    SHARD_BYTES,
    Limits,
    batches,
    choose_layout,
    cpu_batch_size,
    estimate,
)


def arrays_of(num_classes: int, k: int | None = None) -> tuple[ArraySpec, ...]:
    encoding = Dense() if k is None else TopK(k)
    return (*common_arrays(3, True), *encoding.arrays(num_classes, 3))


@given(num_rows=st.integers(1, 10**9), num_classes=st.integers(1, 200_000))
@example(num_rows=838_860_801, num_classes=41_105)
@example(num_rows=10**9, num_classes=200_000)
def test_any_layout_is_valid_and_within_its_bounds(num_rows: int, num_classes: int) -> None:
    arrays = arrays_of(num_classes)
    layout = choose_layout(num_rows, arrays)
    assert layout.chunk_rows & (layout.chunk_rows - 1) == 0
    assert 16 <= layout.chunk_rows <= 4096
    assert layout.chunk_rows <= layout.shard_rows <= MAX_SHARD_ROWS
    row_bytes = sum(spec.row_bytes for spec in arrays)
    least_rows = -(-num_rows // MAX_SHARDS)  # of shards that are as many as a store may have
    assert layout.shard_rows * row_bytes <= max(SHARD_BYTES, 16 * row_bytes, (least_rows + 16) * row_bytes)
    assert layout.chunk_rows == 16 or layout.chunk_rows * num_classes * 2 <= CHUNK_BYTES


@pytest.mark.parametrize(
    ("num_rows", "num_classes", "shard_rows", "chunk_rows"),
    [
        (10, 10, 1024, 256),
        (1797, 10, 1024, 256),
        (10_000, 10, 1024, 256),
        (60_000, 10, 4096, 1024),
        (1_281_167, 1000, 32_768, 256),
        (10**8, 10, 65_536, 4096),
    ],
)
def test_layouts_of_common_sizes(num_rows: int, num_classes: int, shard_rows: int, chunk_rows: int) -> None:
    assert choose_layout(num_rows, arrays_of(num_classes)) == Layout(num_rows, shard_rows, chunk_rows)


@given(num_rows=st.integers(20_000, 10**7), num_classes=st.integers(1, 5_000))
def test_a_corpus_of_some_size_has_a_dozen_shards_at_least(num_rows: int, num_classes: int) -> None:
    assert choose_layout(num_rows, arrays_of(num_classes)).num_shards >= 11


@given(st.integers(1, 10_000), st.integers(1, 5_000))
def test_a_shard_that_is_asked_for_is_a_whole_number_of_chunks(shard_rows: int, num_classes: int) -> None:
    assert choose_layout(100_000, arrays_of(num_classes), shard_rows).shard_rows == shard_rows


def test_chunks_that_are_asked_for_are_kept_and_must_fill_a_shard() -> None:
    assert choose_layout(100_000, arrays_of(10), None, 48).chunk_rows == 48
    with pytest.raises(ValueError, match=r"shard_rows: expected a multiple of chunk_rows \(48\), got 100"):
        choose_layout(100_000, arrays_of(10), 100, 48)


@given(st.integers(0, 10**6), st.integers(1, 5_000), st.integers(1, 700))
def test_batches_cover_a_shard_in_order(start: int, num_rows: int, batch_size: int) -> None:
    found = batches(start, start + num_rows, batch_size)
    assert [row for first, stop in found for row in range(first, stop)] == list(range(start, start + num_rows))
    assert all(stop - first == batch_size for first, stop in found[:-1])


@given(st.integers(1, 10**9))
def test_the_batch_size_of_a_cpu_is_between_16_and_256(sample_bytes: int) -> None:
    assert 16 <= cpu_batch_size(sample_bytes) <= 256


LAYOUT = Layout(num_rows=1000, shard_rows=100, chunk_rows=50)


@pytest.mark.parametrize(
    ("limits", "num_rows"),
    [
        (Limits(), 1000),
        (Limits(samples=1), 100),
        (Limits(samples=100), 100),
        (Limits(samples=101), 200),
        (Limits(samples=10**6), 1000),
        (Limits(num_bytes=99 * 8), 0),
        (Limits(num_bytes=250 * 8), 200),
        (Limits(hours=1e-9), 100),
        (Limits(hours=250 / 10 / 3600), 200),
        (Limits(samples=500, hours=350 / 10 / 3600, num_bytes=450 * 8), 300),
    ],
)
def test_limits_stop_at_whole_shards(limits: Limits, num_rows: int) -> None:
    found = estimate(LAYOUT, range(10), limits, row_bytes=8, rows_per_s=10.0)
    assert (found.num_rows, found.num_shards, found.num_bytes) == (num_rows, num_rows // 100, num_rows * 8)
    assert found.seconds == pytest.approx(num_rows / 10)


def test_the_last_shard_counts_its_own_rows() -> None:
    assert estimate(Layout(950, 100, 50), [8, 9], Limits(), 8, None).num_rows == 150


def test_a_limit_says_its_name() -> None:
    assert Limits(samples=5).reached(5, 1, 0, 1) == "--limit-samples 5"
    assert Limits(hours=0.5).reached(5, 5, 1000, 1) == "--limit-hours 0.5"
    assert Limits(num_bytes=10).reached(0, 5, 0, 3) == "--limit-bytes 10"
    assert Limits(samples=5, hours=1, num_bytes=100).reached(4, 5, 100, 1) is None
