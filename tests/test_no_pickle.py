"""No pickle in a store, ever: nothing in it is code."""

import ast
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.writer import StoreWriter
from tests.contracts.small import LATER, ON_DISK, compressor_of, names_of, path_of, small_manifest, write
from tests.storage.soft_targets import head_for

ROOT = Path(__file__).parents[1]
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def test_storage_uses_no_pickle() -> None:
    found = []
    for path in sorted((ROOT / "storage").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                found += [where for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
            elif isinstance(node, ast.ImportFrom):
                found += [where] if (node.module or "").split(".")[0] in FORBIDDEN_MODULES else []
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                is_false = isinstance(node.value, ast.Constant) and node.value.value is False
                found += [] if is_false else [where]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
                found.append(where)
    assert found == []


KEPT: dict[str, dict[str, Any]] = {"topk": {}, "hidden": LATER["hidden-sequences"]}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("kind", ON_DISK)
def test_writing_and_reading_a_store_pickles_nothing(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("expected no pickle, got one")

    for function in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, function, refuse)
    manifest = small_manifest(**KEPT[name], compressor=compressor_of(kind))
    with StoreWriter.open(path_of(kind, tmp_path), manifest, head_for(manifest)) as writer:
        write(writer)
        writer.finalize()
        writer.store.read(names_of(manifest), 0, 22)
        assert (writer.store.head() is None) == (name == "topk")


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("kind", ON_DISK)
def test_no_file_of_a_store_is_or_holds_a_pickle(kind: str, name: str, tmp_path: Path) -> None:
    path = path_of(kind, tmp_path)
    manifest = small_manifest(**KEPT[name], compressor=compressor_of(kind))
    with StoreWriter.open(path, manifest, head_for(manifest)) as writer:
        write(writer)
        writer.finalize()
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        data = file.read_bytes()
        assert b"numpy.core" not in data
        assert b"numpy._core" not in data
        assert b"builtins" not in data
        assert not data.startswith(tuple(bytes([0x80, protocol]) for protocol in range(2, 6)))
        if file.suffix == ".npy":  # the head: plain floats
            assert np.load(io.BytesIO(data), allow_pickle=False).dtype.kind == "f"
            continue
        with pytest.raises(Exception, match=r".*"):
            np.load(io.BytesIO(data), allow_pickle=False)
