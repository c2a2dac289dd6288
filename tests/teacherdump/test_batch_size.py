"""The batch size that is chosen: by trial on CUDA, by the sample on a CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest

from teacherdump.batch_size import choose_batch_size, try_sizes
from teacherdump.teacher import TeacherMemoryError, load_teacher


def saturating(at: int, fits: int = 10**9) -> Callable[[int], float]:
    """A device whose rate rises up to a size, and whose memory is full behind another."""

    def rows_per_s(size: int) -> float:
        if size > fits:
            raise TeacherMemoryError("full")
        return 100.0 * min(size, at)

    return rows_per_s


@pytest.mark.parametrize(
    ("at", "fits", "most", "chosen"),
    [
        (64, 10**9, 4096, 64),  # the smallest that is fast enough, not the largest
        (10**9, 10**9, 512, 512),
        (10**9, 100, 4096, 64),  # the last that fits
        (10**9, 3, 4096, 2),  # halved until it fits
        (64, 10**9, 1, 1),
    ],
)
def test_a_trial_takes_the_smallest_size_that_is_fast_enough(at: int, fits: int, most: int, chosen: int) -> None:
    assert try_sizes(saturating(at, fits), lambda: 0.0, most) == chosen


def test_a_trial_stops_before_it_fills_the_memory() -> None:
    used = iter([0.1, 0.2, 0.3, 0.5, 0.9])
    assert try_sizes(saturating(10**9), lambda: next(used), 4096) == 64


def test_a_model_that_takes_no_single_sample_is_refused() -> None:
    with pytest.raises(TeacherMemoryError, match="expected one sample to fit the memory of the device"):
        try_sizes(saturating(1, 0), lambda: 0.0, 4096)


def test_a_cpu_takes_what_the_size_of_a_sample_says_and_never_more_than_a_shard(weights: Path) -> None:
    teacher = load_teacher([weights], "mlp:12-16-5", device="cpu")
    assert choose_batch_size(teacher, (12,), 1024) == 256
    assert choose_batch_size(teacher, (12,), 100) == 100
    assert choose_batch_size(teacher, (3, 224, 224), 1024) == 16
