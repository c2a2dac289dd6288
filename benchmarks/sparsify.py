"""Time of sparsify over the time of one read of the logits, at a large vocabulary.

    python -m benchmarks.sparsify [--vocabulary 151936] [--rows 512] [--rounds 7]

One read is `logits.sum(1)` on the same device. On CUDA too where there is one. The logits are random in bfloat16's
precision, as those of a teacher in bf16, so that there are ties at the border of the kept entries.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.result import write_result
from storage.encodings import Encoding, Sample, TopK
from teacherdump.sparsify import TeacherRows, build_sparsify

ENCODINGS: dict[str, Encoding] = {
    "topk 64, float16": TopK(64),
    "topk 128, uint8": TopK(128, "uint8"),
    "sample 50": Sample(50),
    "sample 255": Sample(255),
}


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long some work takes, until it is done on the device."""
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def measure(device: torch.device, vocabulary: int, num_rows: int, num_rounds: int) -> dict[str, dict[str, float]]:
    """Median times and ratios of each encoding, all in turn in each round."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(num_rows, vocabulary, generator=generator) * 3).bfloat16().float().to(device)
    uniform = torch.rand(num_rows, dtype=torch.float64, generator=generator).to(device)

    def run(encoding: Encoding) -> dict[str, Tensor]:
        return build_sparsify(encoding, (1.0,))(TeacherRows(logits, uniform_N=uniform))

    reads: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in ENCODINGS}
    for round_index in range(num_rounds + 1):
        read_s = seconds(lambda: logits.sum(1), device)
        found = {name: seconds(lambda encoding=encoding: run(encoding), device) for name, encoding in ENCODINGS.items()}  # type: ignore[misc]
        if round_index:  # the first one warms up
            reads.append(read_s)
            for name, value in found.items():
                times[name].append(value)
    return {
        name: {
            "ms_a_row": 1e3 * statistics.median(values) / num_rows,
            "over_one_read": statistics.median(value / read for value, read in zip(values, reads, strict=True)),
        }
        for name, values in times.items()
    }


def main() -> None:
    """Measure on the CPU, and on CUDA where there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    figures = {}
    for name in devices:
        figures[name] = measure(torch.device(name), options.vocabulary, options.rows, options.rounds)
        for encoding, values in figures[name].items():
            print(f"{name}  {encoding:<18} {values['ms_a_row']:8.3f} ms a row, {values['over_one_read']:6.1f} reads")
    write_result("sparsify", {"vocabulary": options.vocabulary, "num_rows": options.rows, **figures})


if __name__ == "__main__":
    main()
