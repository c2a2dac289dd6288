"""Steps of an experiment: commands, each run once, with the time that it took, so that a run in pieces sums up."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# glibc gives large blocks back to the system and fetches them anew at every optimizer step, a third of a step's time.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
POLL_S = 2.0  # how often a running step writes down its time: what a kill of everything loses at most


@dataclass(frozen=True)
class Step:
    """What is known of one command.

    Attributes:
        name: of the step, and of its file.
        command: as it was run.
        is_done: whether it ended well; what it printed is then in `output`.
        wall_s: seconds by the clock, over all attempts.
        cpu_s: seconds of the processor, over all attempts.
        num_attempts: how often it was started.
        output: what it printed.
    """

    name: str
    command: str
    is_done: bool = False
    wall_s: float = 0.0
    cpu_s: float = 0.0
    num_attempts: int = 0
    output: str = ""


class Steps:
    """The steps of one run folder, a JSON file each.

    Args:
        folder: of the files; made if it is missing.
        threads: that each command may use.
        places: folders by the names that stand for them where a command is written down: it is the same command
            wherever they lie.
    """

    def __init__(self, folder: Path, threads: int = 1, places: Mapping[str, Path] | None = None) -> None:
        self.folder = folder
        self.threads = threads
        self.places = dict(places or {})
        self.used: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)

    def call(self, name: str, *words: object) -> str:
        """What a command of the project printed: run now, or when the same step was done before.

        Args:
            name: of the step, unique in the folder.
            words: the command; its first word is a console script, or `-m`, which stands for python.

        Raises:
            ValueError: the step was done by another command.
            CalledProcessError: the command failed.
        """
        said = self.said(shlex.join(str(word) for word in words))
        step = self._load(name)
        if step is not None and self.said(step.command) != said:
            raise ValueError(
                f"step '{name}': expected the command that it was done by, {step.command}, got {said}; "
                "give another folder, or the same options"
            )
        self.used.append(name)
        if step is not None and step.is_done:
            return step.output
        return self._run(step or Step(name, said), [str(word) for word in words])

    def times(self) -> dict[str, float]:
        """Seconds by the clock and of the processor of all steps that were asked for here."""
        steps = [step for name in dict.fromkeys(self.used) if (step := self._load(name)) is not None]
        return {
            "wall_s": round(sum(step.wall_s for step in steps), 1),
            "cpu_s": round(sum(step.cpu_s for step in steps), 1),
            "num_steps": len(steps),
        }

    def _run(self, before: Step, words: list[str]) -> str:
        program = [sys.executable] if words[0] == "-m" else [str(Path(sys.executable).with_name(words.pop(0)))]
        environment = os.environ | KEEP_MEMORY | {"OMP_NUM_THREADS": str(self.threads)}
        printed = self.folder / f"{before.name}.out"
        step = replace(before, num_attempts=before.num_attempts + 1)
        start = time.perf_counter()
        with printed.open("w") as stream:
            process = subprocess.Popen([*program, *words], stdout=stream, env=environment)
        try:
            code, cpu_s = self._wait(process, step, start)
        except BaseException:
            process.kill()
            process.wait()
            raise
        step = _after(step, start, cpu_s)
        if code:
            self._save(step)
            raise subprocess.CalledProcessError(code, step.command)
        step = replace(step, is_done=True, output=printed.read_text())
        self._save(step)
        printed.unlink()
        return step.output

    def _wait(self, process: subprocess.Popen[bytes], step: Step, start: float) -> tuple[int, float]:
        """Exit code and seconds of the processor of a process, whose time so far is written down meanwhile."""
        while True:
            self._save(_after(step, start, _cpu_s_so_far(process.pid)))
            deadline = time.perf_counter() + POLL_S
            while time.perf_counter() < deadline:
                pid, status, used = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    return process.returncode, used.ru_utime + used.ru_stime
                time.sleep(0.02)

    def said(self, text: str) -> str:
        """A text with the folders by their names."""
        for name, place in sorted(self.places.items(), key=lambda item: -len(str(item[1]))):
            text = text.replace(str(place), name)
        return text

    def _load(self, name: str) -> Step | None:
        path = self.folder / f"{name}.json"
        return Step(**json.loads(path.read_text())) if path.exists() else None

    def _save(self, step: Step) -> None:
        path = self.folder / f"{step.name}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(step), indent=2) + "\n")
        partial.replace(path)


def _after(step: Step, start: float, cpu_s: float) -> Step:
    wall_s = round(step.wall_s + time.perf_counter() - start, 2)
    return replace(step, wall_s=wall_s, cpu_s=round(step.cpu_s + cpu_s, 2))


def _cpu_s_so_far(pid: int) -> float:
    """Seconds of the processor that a running process has used; 0 where the system doesn't say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
