"""How many rows a forward pass takes, where the user does not say."""

import time
from collections.abc import Callable

import torch

from teacherdump.plan import cpu_batch_sequences, cpu_batch_size
from teacherdump.teacher import Teacher, TeacherMemoryError

FIRST_TRIAL = 8
MOST_ROWS = 4096
TRIAL_S = 0.2  # seconds that a size is timed for at least
ENOUGH = 0.95  # the smallest size that reaches this share of the best rate is taken
MEMORY_SHARE = 0.8  # of the device's memory that a trial may have used


def choose_batch_size(teacher: Teacher, input_shape: tuple[int, ...], most_rows: int, is_tokens: bool = False) -> int:
    """Rows of a batch: on a CPU by the size of a sample, on CUDA by trial, and never more than the model takes.

    Args:
        teacher: on its device.
        input_shape: of one sample as the teacher takes it.
        most_rows: rows of a shard: no batch is longer.
        is_tokens: whether a sample is a sequence, token ids and position ids.
    """
    if teacher.device.type == "cuda":
        most = min(most_rows, teacher.max_batch or MOST_ROWS, MOST_ROWS)
        size = try_sizes(
            lambda rows: _rows_per_s(teacher, (rows, *input_shape), is_tokens),
            lambda: _memory_used(teacher.device),
            most,
        )
    elif is_tokens:
        size = cpu_batch_sequences(input_shape[1] - 1)
    else:
        sample_bytes = 4
        for axis in input_shape:
            sample_bytes *= axis
        size = cpu_batch_size(sample_bytes)
    return max(1, min(size, most_rows, teacher.max_batch or size))


def try_sizes(rows_per_s: Callable[[int], float], memory_used: Callable[[], float], most: int) -> int:
    """Double the size until the rate no longer rises, or the memory is used up; then the smallest that is fast enough.

    When even the first size does not fit, it is halved.
    """
    rates: dict[int, float] = {}
    size = min(FIRST_TRIAL, most)
    while size >= 1:
        try:
            rates[size] = rows_per_s(size)
        except TeacherMemoryError:
            torch.cuda.empty_cache()
            if rates or size == 1:
                break
            size //= 2
            continue
        is_rising = rates[size] > max([rate for other, rate in rates.items() if other != size], default=0.0) / ENOUGH
        if not is_rising or size * 2 > most or memory_used() > MEMORY_SHARE / 2:
            break
        size *= 2
    if not rates:
        raise TeacherMemoryError("batch_size: expected one sample to fit the memory of the device, got none left")
    best = max(rates.values())
    return min(size for size, rate in rates.items() if rate >= ENOUGH * best)


def _rows_per_s(teacher: Teacher, shape: tuple[int, ...], is_tokens: bool) -> float:
    """Rows that the teacher takes in a second in batches of a shape, warm."""
    inputs_N = torch.zeros(shape, dtype=torch.int64 if is_tokens else torch.float32, device=teacher.device)
    if is_tokens:
        inputs_N[:, 1] = torch.arange(shape[2], device=teacher.device)

    def speak() -> None:
        for _ in teacher.speak_tokens(inputs_N) if is_tokens else teacher.speak(inputs_N):
            pass

    speak()
    torch.cuda.synchronize(teacher.device)
    start, num_rows = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < TRIAL_S:
        speak()
        torch.cuda.synchronize(teacher.device)
        num_rows += shape[0]
    return num_rows / seconds


def _memory_used(device: torch.device) -> float:
    """Share of the device's memory that this process had at most."""
    return torch.cuda.max_memory_reserved(device) / torch.cuda.get_device_properties(device).total_memory
