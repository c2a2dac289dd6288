"""Imports point one way, and a command line imports nothing heavy."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

MODELS = tuple(f"studenttrain.{name}" for name in ("models", "heads", "language", "gpt", "hf", "hf_files"))
ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "torchvision", "timm", "transformers", "matplotlib", "sklearn", "tensorboard", "distributed")


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            module = (above + (node.module or "")).strip(".")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def offenders(package: str, *forbidden: str, allowed: tuple[str, ...] = ()) -> list[str]:
    found = []
    for path in sources(package):
        for name in imported(path):
            is_forbidden = any(name == top or name.startswith(f"{top}.") for top in forbidden)
            is_allowed = any(name == top or name.startswith(f"{top}.") for top in allowed)
            if is_forbidden and not is_allowed:
                found.append(f"{path.relative_to(ROOT)}: {name}")
    return found


def test_there_is_something_to_look_at() -> None:
    assert all(len(sources(package)) > 1 for package in ("storage", "studenttrain", "teacherdump"))
    assert "storage.reader" in set(imported(ROOT / "storage" / "writer.py"))


def test_storage_imports_neither_sibling_nor_torch() -> None:
    assert offenders("storage", "teacherdump", "studenttrain", "torch", "torchvision", "tests", "benchmarks") == []


def test_studenttrain_never_imports_the_teachers_side() -> None:
    assert offenders("studenttrain", "teacherdump", "tests", "benchmarks") == []


def test_teacherdump_takes_only_models_from_studenttrain() -> None:
    names = ("models", "gpt", "heads", "hf", "hf_files", "language")
    allowed = tuple(f"studenttrain.{name}" for name in names)
    found = offenders("teacherdump", "studenttrain", "tests", "benchmarks", allowed=allowed)
    assert [name for name in found if not name.endswith(": studenttrain")] == []


def test_encodings_and_layout_know_nothing_of_backends() -> None:
    names = {name for path in (ROOT / "storage" / "encodings").glob("*.py") for name in imported(path)}
    names |= set(imported(ROOT / "storage" / "layout.py")) | set(imported(ROOT / "storage" / "manifest.py"))
    assert not any(
        name.startswith(("storage.backends", "storage.reader", "storage.writer", "zarr", "h5py")) for name in names
    )


@pytest.mark.parametrize("module", ["storage.cli", "teacherdump.cli", "studenttrain.cli"])
def test_a_command_line_imports_nothing_heavy_and_opens_no_connection(module: str) -> None:
    if not (ROOT / Path(*module.split("."))).with_suffix(".py").exists():
        pytest.skip(f"there is no {module} yet")
    code = f"""
import sys
def audit(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
        raise SystemExit(f"{{event}} {{arguments}}")
sys.addaudithook(audit)
import {module}
print(*(name for name in {HEAVY!r} if name in sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""


def test_the_store_is_read_without_torch() -> None:
    code = "import sys, storage.reader, storage.writer, storage.corpus; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
