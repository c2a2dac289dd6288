"""What every benchmark leaves behind: one JSON file with the figures, the command, the machine and the date."""

import datetime as dt
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SOFTWARE = ("numpy", "torch", "zarr", "h5py", "dask")


def write_result(name: str, figures: Mapping[str, Any]) -> Path:
    """Write `results/NAME.json` and say where it is.

    Args:
        name: of the file, without its suffix.
        figures: what was measured; units stand in the names.
    """
    result = {
        "name": name,
        "command": _command(),
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "figures": dict(figures),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    print(f"result: {path}", file=sys.stderr)
    return path


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory in GiB, how busy it is, and the versions that matter."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu(),
        "num_cores": len(os.sched_getaffinity(0)),
        "load_1_min": round(os.getloadavg()[0], 1),
        "memory_gib": round(pages / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in SOFTWARE},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _command() -> str:
    """The command as it is run from the repository's root, without where that is."""
    spec = sys.modules["__main__"].__spec__
    words = (
        ["-m", spec.name.removesuffix(".__main__")]
        if spec is not None
        else [os.path.relpath(sys.argv[0], RESULTS.parent.parent)]
    )
    return shlex.join(["python", *words, *sys.argv[1:]])
