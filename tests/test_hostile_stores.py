"""A store that somebody made on purpose can't write outside its folder, run code, or exhaust memory.

Records carry digests, but no keys: whoever makes a store can sign it. So everything here is signed as it should be.
"""

import contextlib
import json
import os
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from storage.arrays import STATUS_OK
from storage.backends import hdf5_plain
from storage.cli import main
from storage.console import printable
from storage.encodings import Dense, TopK
from storage.errors import DamageError, StoreError
from storage.exclusive import discard_unsealed, sole_run
from storage.reader import open_store
from storage.records import FINAL, MANIFEST, sha256, signed
from storage.scan import convert, copy, stats, verify
from storage.untrusted import MAX_RECORD_VALUES, parse_json
from storage.writer import StoreWriter
from tests.storage.scan_stores import manifest_of, shard_of, write_store
from tests.storage.soft_targets import hidden_encoding

ROOT = Path(__file__).parents[1]
CHILD_BYTES = 1 << 30  # that a command may take at most, with the libraries that it imports

# Runs commands on stores and prints, as JSON, how each ended and the most memory that all of them took.
CHILD = """
import json, re, sys
from pathlib import Path
from click.testing import CliRunner
from storage.cli import main
said = []
for command in json.load(sys.stdin):
    result = CliRunner().invoke(main, command)
    error = result.exception
    said.append([result.exit_code, result.stderr, None if isinstance(error, SystemExit | None) else repr(error)])
status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent's memory
peak = int(re.search(r"VmHWM:\\s+([0-9]+)", status)[1]) << 10
print(json.dumps([said, peak]))
"""


def in_child(commands: list[list[str]], most_s: float = 60, codes: tuple[int, ...] = (1,)) -> list[str]:
    """What each command says on stderr, in bounded memory and time: one line, where it fails, as it must by default."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=most_s,
        cwd=ROOT,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    said, peak = json.loads(done.stdout)
    assert peak < CHILD_BYTES, f"{peak >> 20} MiB"
    for command, (code, text, traceback) in zip(commands, said, strict=True):
        assert traceback is None, (command, traceback)
        assert code in codes, (command, code, text)
        assert code == 0 or (text.count("\n"), text[:7]) == (1, "error: "), (command, text)
    return [text for _, text, _ in said]


def remake(
    path: Path,
    manifest: Callable[[dict[str, Any]], None] | None = None,
    seal: Callable[[dict[str, Any]], None] | None = None,
    final: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Change the records of a Zarr store, and sign them as if they had been made so."""
    records = {MANIFEST: manifest, FINAL: final}
    records |= {f"seals/{it.name}": seal for it in (path / "seals").glob("*.json")}
    digest = ""
    for name in sorted(records, key=lambda name: (name != MANIFEST, name)):
        change = records[name]
        if not (path / name).exists():
            continue
        value = json.loads((path / name).read_bytes())
        if name != MANIFEST:
            del value["record_sha256"]
            value["manifest_sha256"] = digest
        if change is not None:
            change(value)
        data = json.dumps(value).encode() if name == MANIFEST else signed(value)
        digest = sha256(data) if name == MANIFEST else digest
        (path / name).write_bytes(data)
    return path


def read_records(path: Path) -> None:
    """Read each kind of record."""
    with open_store(path) as store:
        store.seal(0)


def setter(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda value: value.update(fields)


def run_all(path: Path, folder: Path) -> list[list[str]]:
    """What somebody may do with a store from elsewhere."""
    store, out = str(path), str(folder / "out.zarr")
    return [["info", store], ["verify", store], ["stats", store], ["convert", store, out], ["copy", store, out]]


# Records


@pytest.mark.parametrize("name", [MANIFEST, FINAL, "seals/00000000.json"])
def test_a_record_of_a_terabyte_is_refused_before_it_is_read(name: str, tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of())
    os.truncate(path / name, 1 << 40)  # which takes no room on the disk
    with (
        pytest.raises(
            DamageError, match=r"expected at most 268435456 bytes, got 1099511627776; this is no logit store"
        ),
        open_store(path) as store,
    ):
        store.seal(0)


def test_a_small_record_that_becomes_large_in_memory_is_refused() -> None:
    data = b"[" + b"[]," * (MAX_RECORD_VALUES // 2) + b"0]"
    with pytest.raises(DamageError, match="expected at most 5,000,000 values, got more"):
        parse_json(data, "here")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[" * 100 + "]" * 100,
        '{"a":' * 40 + "1" + "}" * 40,
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        '{"a": ' + "9" * 5000 + "}",
        '{"a": "\x00"}',
    ],
)
def test_json_that_no_record_has_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(DamageError, match="here: expected JSON, got"):
        parse_json(text.encode(), "here")
    path = write_store(tmp_path / "a.zarr", manifest_of())
    (path / MANIFEST).write_text(text)
    result = CliRunner().invoke(main, ["info", str(path), "--json"])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"objects": ["values/c/0/0"]},
        {"objects": {"values/c/0/0": 3}},
        {"objects": {"values/c/0/0": {"num_bytes": -1, "xxh3_128": ""}}},
        {"objects": {"values/c/0/0": {"num_bytes": 10**30, "xxh3_128": ""}}},
        {"arrays": [1]},
        {"arrays": {"lse": 1}},
        {"shard": True},
        {"start": 0.0},
        {"quarantine": {"row": 1}},
        {"quarantine": [{"row": "3", "key": "a", "reason": "b"}]},
        {"quarantine": [{"row": 3, "key": None, "reason": "b"}]},
        {"quarantine": [{"row": 20, "key": "a", "reason": "b"}]},
    ],
)
def test_a_seal_of_other_types_is_damage(fields: dict[str, Any], tmp_path: Path) -> None:
    path = remake(write_store(tmp_path / "a.zarr", manifest_of(), shards=1, finalize=False), seal=setter(**fields))
    for command in run_all(path, tmp_path)[:3]:
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1, (command, result.output)
        assert not result.exception or isinstance(result.exception, SystemExit), repr(result.exception)


@pytest.mark.parametrize(
    "fields",
    [
        {"teacher": [["digest", "x"]]},
        {"corpus": 3},
        {"corpus": {"first_row": -1}},
        {"corpus": {"first_row": "3"}},
        {"has_hard_targets": "yes"},
        {"num_classes": 5.0},
        {"encoding": {"name": "topk", "k": 2.5, "values": "float16"}},
        {"temperatures": [{}]},
    ],
)
def test_a_manifest_of_other_types_is_damage(fields: dict[str, Any], tmp_path: Path) -> None:
    path = remake(write_store(tmp_path / "a.zarr", manifest_of()), manifest=setter(**fields))
    with pytest.raises(DamageError, match=r"manifest.json: expected a valid"):
        open_store(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sealed": [[0, 10**15]]}, "expected a final record, got at most 1,048,576 sealed shards"),
        ({"sealed": [[3, 2]]}, "expected a final record, got ascending ranges of shards"),
        ({"sealed": [[0, 2], [1, 3]]}, "expected a final record, got ascending ranges of shards"),
        ({"sealed": [[-5, 2]]}, "expected a final record, got ascending ranges of shards"),
        ({"sealed": [[0, 2.5]]}, "expected a final record, got ascending ranges of shards"),
        ({"sealed": [[0, 4]]}, "expected shards of the store, got others"),
        ({"sealed": 3}, "expected a final record"),
        ({"metadata": {"../../x": {"num_bytes": 1, "xxh3_128": ""}}}, "names of objects inside the store"),
        ({"num_sealed_rows": "all"}, "expected a final record, got counts of rows"),
    ],
)
def test_a_final_record_that_claims_what_can_not_be_is_damage(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = remake(write_store(tmp_path / "a.zarr", manifest_of()), final=setter(**fields))
    with pytest.raises(DamageError, match=message):
        open_store(path)


# Claims


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_rows": 10**15}, "shard_rows: expected at most 1,048,576 shards, got 125,000,000,000,000"),
        ({"num_rows": 10**30}, "num_rows: expected at most 9,223,372,036,854,775,807 rows"),
        ({"shard_rows": 10**12, "chunk_rows": 1}, "chunk_rows: expected at most 65,536 chunks a shard"),
        ({"num_classes": 10**9, "class_names": None}, "num_classes: expected 1 to 4,194,304, got 1000000000"),
        ({"shard_rows": 10**12, "chunk_rows": 10**12}, "chunk_rows: expected chunks of at most 2,147,483,584 bytes"),
        ({"encoding": {"name": "topk", "k": 10**9, "values": "float16"}}, "k: expected at most the number of classes"),
        ({"encoding": {"name": "sample", "draws": 10**9, "seed": 0}}, "draws: expected 1 to 255"),
        ({"encoding": {"name": "hidden", "width": 10**12, "scale": 1.0}}, "expected chunks of at most"),
    ],
)
def test_a_manifest_that_claims_what_no_store_has_is_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = remake(write_store(tmp_path / "a.zarr", manifest_of()), manifest=setter(**fields))
    with pytest.raises(DamageError, match=message):
        open_store(path)


@pytest.mark.slow
def test_what_a_store_claims_is_not_allocated(tmp_path: Path) -> None:
    # as large as the limits let it be: 2^20 shards of 2^16 chunks, of which none is there
    def large(value: dict[str, Any]) -> None:
        value |= {"chunk_rows": 1 << 20, "shard_rows": 1 << 36, "num_rows": 1 << 56}

    def huge_seal(value: dict[str, Any]) -> None:
        shard = value["shard"]
        value |= {"start": shard << 36, "stop": (shard + 1) << 36, "quarantine": []}

    sealed = write_store(tmp_path / "sealed.zarr", manifest_of(), finalize=False)
    remake(sealed, large, huge_seal)
    claimed = write_store(tmp_path / "claimed.zarr", manifest_of())
    remake(claimed, large, huge_seal, setter(sealed=[[0, 1 << 20]], num_sealed_rows=1 << 56))
    commands = [
        ["stats", str(sealed)],
        ["finalize", str(sealed)],
        ["finalize", "--partial", str(sealed)],
        ["copy", str(sealed), str(tmp_path / "out.zarr")],
        ["stats", str(claimed)],
        ["convert", str(claimed), str(tmp_path / "out.h5")],
        ["copy", str(claimed), str(tmp_path / "more.zarr")],
        ["copy", str(claimed), str(tmp_path / "part.zarr"), "--rows", "5:1000000000"],
    ]
    in_child(commands, 120)
    assert not verify(sealed).ok
    result = verify(claimed)
    assert not result.ok
    assert len(result.damage) < 2000
    assert "seals that are none; the others were not read" in " ".join(item.message for item in result.damage)


@pytest.mark.slow
def test_classes_that_no_row_has_take_bounded_memory_when_they_are_counted(tmp_path: Path) -> None:
    manifest = manifest_of(num_rows=8 * 3, num_classes=1 << 22, encoding=TopK(2), class_names=None)
    with StoreWriter.open(tmp_path / "a.zarr", manifest) as writer:
        for shard in range(3):
            arrays = {spec.name: np.zeros((8, *spec.row_shape), spec.dtype) for spec in manifest.arrays}
            writer.write_shard(shard, arrays | {"ids": np.tile(np.array([3, 5], "u4"), (8, 1))})
        writer.finalize()
    in_child([["stats", str(tmp_path / "a.zarr")]], 120, codes=(0,))


def test_an_id_that_is_no_class_is_damage_when_it_is_counted(tmp_path: Path) -> None:
    manifest = manifest_of(encoding=TopK(2))
    with StoreWriter.open(tmp_path / "a.zarr", manifest) as writer:
        arrays, quarantine = shard_of(manifest, 0)
        arrays["ids"][1] = 200
        writer.write_shard(0, arrays, quarantine)
    with pytest.raises(DamageError, match="expected classes below 5, got 200; see what else is wrong"):
        stats(tmp_path / "a.zarr")


def test_no_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from storage import info

    def describe(_: Path) -> None:
        raise MemoryError("Unable to allocate 1 PiB")

    monkeypatch.setattr(info, "info", describe)
    result = CliRunner().invoke(main, ["info", "x.zarr"])
    assert (result.exit_code, result.stderr) == (
        1,
        "error: memory: expected enough for this, got Unable to allocate 1 PiB; use smaller shards, or more memory\n",
    )


def test_a_student_of_a_store_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    from studenttrain.cli import main as studenttrain
    from tests.builders import write_npz

    path = write_store(tmp_path / "a.zarr", manifest_of(preprocess=preprocess_of((6,))))
    remake(path, lambda it: it.update(chunk_rows=1 << 20, shard_rows=1 << 36, num_rows=1 << 50))
    data = write_npz(tmp_path / "x.npz", has_labels=False)
    options = ["--targets", str(path), "--data", str(data), "--student", "mlp:6-5", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(studenttrain, ["fit", *options, "--epochs", "1"])
    assert result.exit_code == 1
    assert "error: " in result.stderr
    assert isinstance(result.exception, SystemExit), repr(result.exception)


def preprocess_of(shape: tuple[int, ...]) -> dict[str, Any]:
    from storage.corpus import Preprocess

    return Preprocess(kind="array", shape=shape).to_json()


# The metadata of Zarr


def other_codecs(value: dict[str, Any]) -> None:
    value["codecs"] = [{"name": "bytes", "configuration": {"endian": "little"}}]


def other_type(value: dict[str, Any]) -> None:
    value |= {"data_type": "variable_length_utf8", "fill_value": ""}


def other_shape(value: dict[str, Any]) -> None:
    value["shape"][0] = 10**15


def other_keys(value: dict[str, Any]) -> None:
    value["chunk_key_encoding"] = {"name": "v2", "configuration": {"separator": "."}}


@pytest.mark.parametrize("change", [other_codecs, other_type, other_shape, other_keys])
def test_a_reader_and_a_writer_go_by_the_manifest_and_not_by_the_metadata_of_zarr(
    change: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    manifest = manifest_of()
    good = write_store(tmp_path / "a.zarr", manifest)
    path = write_store(tmp_path / "b.zarr", manifest, shards=1, finalize=False)
    metadata = path / "values" / "zarr.json"
    value = json.loads(metadata.read_bytes())
    change(value)
    metadata.write_text(json.dumps(value))
    with StoreWriter.open(path, manifest) as writer:
        for shard in writer.owed_shards():
            writer.write_shard(shard, *shard_of(manifest, shard))
    assert (path / "values" / "c" / "2" / "0").read_bytes() == (good / "values" / "c" / "2" / "0").read_bytes()
    with open_store(path) as one, open_store(good) as two:
        np.testing.assert_array_equal(one.read(["values"], 0, 22)["values"], two.read(["values"], 0, 22)["values"])
    if change is not other_keys:
        assert "values/zarr.json: expected" in verify(path).damage[0].message


def test_metadata_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of(), shards=1, finalize=False)
    os.truncate(path / "values" / "zarr.json", 1 << 40)
    assert "expected at most 1048576 bytes, got 1099511627776" in verify(path).damage[0].message
    with pytest.raises(DamageError, match="expected at most 1048576 bytes"):
        copy(path, tmp_path / "b.zarr")


# Seals that point elsewhere


@pytest.mark.parametrize(
    "key", ["../../etc/passwd", "/etc/passwd", "values/../../secret", "values//0", "../b.zarr/values/c/0/0", "C:\\x"]
)
def test_a_seal_that_names_what_is_outside_is_refused_and_nothing_there_is_read(key: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")

    def point(value: dict[str, Any]) -> None:
        value["objects"][key] = value["objects"].pop("values/c/0/0", {"num_bytes": 6, "xxh3_128": "0" * 32})

    path = remake(write_store(tmp_path / "a.zarr", manifest_of(), shards=1, finalize=False), seal=point)
    for act in (lambda: copy(path, tmp_path / "out.zarr"), lambda: stats(path), lambda: open_store(path).quarantine()):
        with pytest.raises(DamageError, match="expected a seal record, got names of objects inside the store, got"):
            act()
    assert "names of objects inside the store" in verify(path).damage[0].message
    assert not list(tmp_path.rglob("passwd"))


def test_a_seal_that_names_another_store_s_object_is_refused(tmp_path: Path) -> None:
    def point(value: dict[str, Any]) -> None:
        value["objects"]["other/c/0"] = value["objects"].pop("status/c/0")

    path = remake(write_store(tmp_path / "a.zarr", manifest_of(), shards=1, finalize=False), seal=point)
    with pytest.raises(DamageError, match="expected objects of the store's arrays, got others"):
        copy(path, tmp_path / "out.zarr")


def test_a_seal_without_one_of_the_objects_is_not_copied(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of(), shards=1, finalize=False)
    remake(path, seal=lambda value: value["objects"].pop("status/c/0"))
    with pytest.raises(DamageError, match="expected the objects of the shard, got others"):
        copy(path, tmp_path / "out.zarr")


# Links


LINK = "expected a file or folder of the store, got a link, which is not followed"


def outside(tmp_path: Path) -> Path:
    """A folder outside with what a store's array has, that must stay as it is."""
    folder = tmp_path / "outside"
    (folder / "c" / "0").mkdir(parents=True)
    (folder / "c" / "2").mkdir()
    for name in ("c/0/0", "c/2/0", "0", "file"):
        (folder / name).write_bytes(b"precious")
    return folder


def state_of(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("place", ["values", "values/c", "values/c/0", "values/c/0/0", "status/c/0"])
def test_what_lies_behind_a_link_is_neither_read_nor_written_nor_removed(place: str, tmp_path: Path) -> None:
    folder, manifest = outside(tmp_path), manifest_of()
    path = write_store(tmp_path / "a.zarr", manifest, shards=1, finalize=False)
    there = path / place
    kept = tmp_path / "kept"
    there.rename(kept)
    target = {"values": folder, "values/c": folder / "c", "values/c/0": folder / "c" / "0"}.get(place, folder / "file")
    there.symlink_to(target)
    before = state_of(folder)
    with open_store(path) as store, pytest.raises(DamageError, match=LINK):
        store.read(["values", "status"], 0, 8)
    with StoreWriter.open(path, manifest) as writer, pytest.raises(DamageError, match=LINK):
        writer.finalize(partial=True)
    with pytest.raises(DamageError, match=LINK):
        copy(path, tmp_path / "b.zarr")
    assert any(LINK in item.message for item in verify(path).damage)
    (path / "seals" / "00000000.json").unlink()
    with StoreWriter.open(path, manifest) as writer:
        is_file = place.endswith("/0") and place != "values/c/0"  # which is put in the place of the link
        with contextlib.nullcontext() if is_file else pytest.raises(DamageError, match=LINK):
            writer.write_shard(0, *shard_of(manifest, 0))
    assert state_of(folder) == before


def test_finalizing_removes_nothing_behind_a_link(tmp_path: Path) -> None:
    folder, manifest = outside(tmp_path), manifest_of()
    path = write_store(tmp_path / "a.zarr", manifest, finalize=False)
    (path / "seals" / "00000002.json").unlink()
    (path / "values" / "c" / "2" / "0").unlink()
    (path / "values" / "c" / "2").rmdir()
    (path / "values" / "c" / "2").symlink_to(folder / "c")
    before = state_of(folder)
    with StoreWriter.open(path, manifest) as writer:
        writer.finalize(partial=True)
    assert state_of(folder) == before
    assert not (path / "values" / "c" / "2").is_symlink()


@pytest.mark.parametrize("name", [MANIFEST, "seals", "head", "values", "values/zarr.json"])
def test_a_dump_into_a_folder_with_links_writes_nothing_behind_them(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "outside"
    folder.mkdir()
    (tmp_path / "a.zarr" / name).parent.mkdir(parents=True)
    (tmp_path / "a.zarr" / name).symlink_to(folder / "x" if name.endswith(".json") else folder)
    manifest = manifest_of()
    with contextlib.suppress(StoreError):
        write_store(tmp_path / "a.zarr", manifest)
    assert not list(folder.iterdir())


def test_a_link_in_the_place_of_a_record_or_a_lock_is_not_followed(tmp_path: Path) -> None:
    manifest = manifest_of()
    path = write_store(tmp_path / "a.zarr", manifest, shards=1, finalize=False)
    (path / "seals" / "00000000.json").rename(tmp_path / "seal")
    (path / "seals" / "00000000.json").symlink_to(tmp_path / "seal")
    with open_store(path) as store, pytest.raises(DamageError, match=LINK):
        store.seal(0)
    (path / "seals" / "00000001.json.lock.partial").symlink_to(tmp_path / "made")
    with StoreWriter.open(path, manifest) as writer, pytest.raises(StoreError, match="Too many levels of symbolic"):
        writer.write_shard(1, *shard_of(manifest, 1))
    assert not (tmp_path / "made").exists()


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of(), finalize=False)
    for name in ("values/c/0/0", "seals/00000001.json"):
        (path / name).unlink()
        os.mkfifo(path / name)
    done = threading.Event()

    def look() -> None:
        with open_store(path) as store:
            for act in (lambda: store.read(["values"], 0, 8), lambda: store.seal(1), lambda: store.check_shard(0)):
                with pytest.raises(DamageError, match="expected a plain file, got something else"):
                    act()
        done.set()

    threading.Thread(target=look, daemon=True).start()
    assert done.wait(20)


def test_what_is_removed_of_a_begun_store_is_not_what_a_link_leads_to(tmp_path: Path) -> None:
    folder, manifest = outside(tmp_path), manifest_of()
    path = write_store(tmp_path / "a.zarr", manifest, shards=0, finalize=False)
    (path / "seals").symlink_to(folder)
    before = state_of(folder)
    with sole_run(path):
        discard_unsealed(open_store(path))
    assert state_of(folder) == before
    assert not path.exists()


def test_parts_of_an_hdf5_store_are_not_links(tmp_path: Path) -> None:
    folder, manifest = outside(tmp_path), manifest_of()
    path = write_store(tmp_path / "a.h5", manifest, shards=1, finalize=False)
    shards = tmp_path / "a.h5.parts" / "shards"
    shards.rename(tmp_path / "moved")
    shards.symlink_to(tmp_path / "moved")
    with open_store(path) as store, pytest.raises(DamageError, match=LINK):
        store.read(["lse"], 0, 8)
    with pytest.raises(DamageError, match=LINK):
        stats(path)
    shards.unlink()
    shards.symlink_to(folder)
    before = state_of(folder)
    with StoreWriter.open(path, manifest) as writer, pytest.raises(DamageError, match=LINK):
        writer.write_shard(1, *shard_of(manifest, 1))
    assert state_of(folder) == before


def test_the_store_s_own_folder_may_be_a_link(tmp_path: Path) -> None:
    write_store(tmp_path / "real.zarr", manifest_of())
    (tmp_path / "a.zarr").symlink_to(tmp_path / "real.zarr")
    assert verify(tmp_path / "a.zarr").ok


# HDF5


def replaced(path: Path, name: str, make: Callable[[h5py.File, Any], None]) -> Path:
    """An HDF5 store with something else in the place of a dataset."""
    with h5py.File(path, "r+") as file:
        values = file[name][()]
        del file[name]
        make(file, values)
    return path


def external_link(file: h5py.File, values: Any) -> None:
    with h5py.File(Path(file.filename).with_name("other.h5"), "w") as other:
        other["lse"] = values
    file["lse"] = h5py.ExternalLink("other.h5", "lse")


def soft_link(file: h5py.File, values: Any) -> None:
    file["hidden"] = values
    file["lse"] = h5py.SoftLink("/hidden")


def external_storage(file: h5py.File, values: Any) -> None:
    raw = Path(file.filename).with_name("raw")
    raw.write_bytes(values.tobytes())
    file.create_dataset("lse", values.shape, values.dtype, external=[(str(raw), 0, values.nbytes)])


def virtual_dataset(file: h5py.File, values: Any) -> None:
    with h5py.File(Path(file.filename).with_name("other.h5"), "w") as other:
        other["lse"] = values
    layout = h5py.VirtualLayout(values.shape, values.dtype)
    layout[:] = h5py.VirtualSource("other.h5", "lse", values.shape)
    file.create_virtual_dataset("lse", layout)


def committed_type(file: h5py.File, values: Any) -> None:
    file["type"] = np.dtype(values.dtype)
    file.create_dataset("lse", data=values, dtype=file["type"])


def strings(file: h5py.File, values: Any) -> None:
    file.create_dataset("lse", values.shape, h5py.string_dtype())


def references(file: h5py.File, values: Any) -> None:
    file.create_dataset("lse", values.shape, h5py.ref_dtype)


def plugin_filter(file: h5py.File, values: Any) -> None:
    made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    made.set_chunk((4, *values.shape[1:]))
    made.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, ())  # zstd, which a plugin brings
    space, kind = h5py.h5s.create_simple(values.shape), h5py.h5t.py_create(values.dtype)
    h5py.h5d.create(file.id, b"lse", kind, space, made)


def twice_deflated(file: h5py.File, values: Any) -> None:
    made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    made.set_chunk((4, *values.shape[1:]))
    made.set_deflate(1)
    made.set_deflate(1)
    space, kind = h5py.h5s.create_simple(values.shape), h5py.h5t.py_create(values.dtype)
    h5py.h5d.create(file.id, b"lse", kind, space, made)


def group(file: h5py.File, values: Any) -> None:
    file.create_group("lse")


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (external_link, "a link, which is not followed"),
        (soft_link, "a link, which is not followed"),
        (external_storage, "one whose bytes are in another file"),
        (virtual_dataset, "one made of other datasets"),
        (committed_type, "a type that is named elsewhere"),
        (strings, "values that are no numbers"),
        (references, "values that are no numbers"),
        (plugin_filter, r"filters \[32015\], which would be loaded from elsewhere"),
        (twice_deflated, r"filters \[1, 1\], which would be loaded from elsewhere, or undone twice"),
        (group, "a group"),
    ],
)
def test_hdf5_that_leads_elsewhere_is_not_followed(
    make: Callable[[h5py.File, Any], None], got: str, tmp_path: Path
) -> None:
    path = replaced(write_store(tmp_path / "a.h5", manifest_of()), "lse", make)
    with open_store(path) as store, pytest.raises(DamageError, match=f"lse: expected a plain dataset.*, got {got}"):
        store.read(["lse"], 0, 8)
    with pytest.raises(DamageError):
        convert(path, tmp_path / "b.zarr")
    with pytest.raises(DamageError):
        stats(path)
    assert not verify(path).ok


@pytest.mark.parametrize("name", ["records", "records/manifest.json", "records/seals"])
def test_records_of_an_hdf5_file_that_are_links_are_not_followed(name: str, tmp_path: Path) -> None:
    path, other = write_store(tmp_path / "a.h5", manifest_of()), write_store(tmp_path / "b.h5", manifest_of())
    with h5py.File(path, "r+") as file:
        del file[name]
        file[name] = h5py.ExternalLink(str(other), name)
    with pytest.raises(DamageError, match="a link, which is not followed"), open_store(path) as store:
        store.seal(0)


@pytest.mark.parametrize("name", ["manifest.json", "seals", "final.json"])
def test_a_record_of_a_terabyte_in_an_hdf5_file_is_not_read(name: str, tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.h5", manifest_of())
    with h5py.File(path, "r+") as file:
        del file[f"records/{name}"]
        file.create_dataset(f"records/{name}", (1 << 40,), "u1", chunks=(1 << 20,))
    with pytest.raises(DamageError, match=r"expected at most \d+ bytes that are there, got uint8 \(1099511627776,\)"):
        read_records(path)


def test_a_user_block_that_lies_is_found(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.h5", manifest_of())
    data = path.read_bytes()
    path.write_bytes(data[:512].replace(b'"num_bytes": 1', b'"num_bytes": 9') + data[512:])
    assert "expected the digest of the whole file to hold" in verify(path).damage[0].message


def swollen(tmp_path: Path) -> Path:
    """A compressed HDF5 store with a chunk that becomes a hundred times as large as a chunk is."""
    path = write_store(tmp_path / "a.h5", manifest_of(encoding=Dense("float32"), compressor="zstd"))
    with h5py.File(path, "r+") as file:
        dataset = file["values"]
        packed = zlib.compress(bytes(100 * 4 * 5 * 4))
        dataset.id.write_direct_chunk((0, 0), packed + bytes(4), 0)
    return path


def test_a_chunk_that_swells_when_it_is_decompressed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = swollen(tmp_path)
    monkeypatch.setattr(hdf5_plain, "INFLATED_BYTES", 0)  # below which HDF5 may find out
    with (
        open_store(path) as store,
        pytest.raises(DamageError, match="80 bytes in the chunk of row 0 once it is decomp"),
    ):
        store.read(["values"], 0, 4)
    with h5py.File(path, "r+") as file:
        file["values"].id.write_direct_chunk((0, 0), bytes(1000), 0)
    with (
        open_store(path) as store,
        pytest.raises(DamageError, match="at most 80 bytes in the chunk of row 0, got 1000"),
    ):
        store.read(["values"], 0, 4)


# Chunks of Zarr


def test_a_blosc_chunk_that_claims_two_gigabytes_is_not_decompressed(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of(compressor="zstd"), shards=1, finalize=False)
    file = path / "values" / "c" / "0" / "0"
    data = bytearray(file.read_bytes())
    offset, length = struct.unpack_from("<QQ", data, len(data) - 4 - 2 * 16)
    struct.pack_into("<I", data, offset + 4, (2 << 30) - 64)
    struct.pack_into("<I", data, offset + length - 4, google_crc32c.value(bytes(data[offset : offset + length - 4])))
    file.write_bytes(data)
    with (
        open_store(path) as store,
        pytest.raises(DamageError, match=r"expected 40 bytes compressed into \d+, got \(21474"),
    ):
        store.read(["values"], 0, 4)


# The head


@pytest.mark.parametrize(
    "data",
    [
        b"\x93NUMPY\x01\x00\x76\x00"
        + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 4), }".ljust(117)
        + b"\n",
        b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (5, 4), }".ljust(117) + b"\n",
        b"\x93NUMPY\x01\x00\x76\x00" + b"__import__('os').system('touch pwned')".ljust(117) + b"\n",
        b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.",
        b"\x93NUMPY\x03\x00\xff\xff\xff\xff{",
        b"",
    ],
)
def test_a_head_that_is_no_plain_array_is_refused(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_store(tmp_path / "a.zarr", manifest_of(encoding=hidden_encoding(5, 4)), shards=1, finalize=False)
    (path / "head" / "weight.npy").write_bytes(data)
    remake(path, lambda value: value["encoding"].update(head_sha256=sha256(data)))
    with open_store(path) as store, pytest.raises(DamageError, match=r"weight.npy: expected plain .npy records, got"):
        store.head()
    assert not (tmp_path / "pwned").exists()


# What is shown


ESCAPES = "\x1b]0;pwned\x07\x1b[2J\x9b1m\u202egnp.exe\r\n"


def test_nothing_that_a_terminal_obeys_is_shown(tmp_path: Path) -> None:
    names = tuple(f"{ESCAPES}{index}" for index in range(5))
    teacher = {"digest": f"a{ESCAPES}", "kind": ESCAPES, "arch": ESCAPES, "precision": "fp32"}
    manifest = manifest_of(class_names=names, teacher=teacher, provenance={"made": ESCAPES})
    path = write_store(tmp_path / "a.zarr", manifest, finalize=False)

    def speak(value: dict[str, Any]) -> None:
        for entry in value["quarantine"]:
            entry |= {"key": f"key{ESCAPES}", "reason": f"reason{ESCAPES}"}

    remake(path, seal=speak)
    for command in ("info", "verify", "stats"):
        result = CliRunner().invoke(main, [command, str(path)])
        assert result.exit_code == 0, result.output
        shown = result.stdout + result.stderr
        assert not set(shown) & set("\x1b\x07\x9b\u202e\r"), command
    result = CliRunner().invoke(main, ["info", str(path), "--json"])
    assert "\x1b" not in result.stdout
    assert json.loads(result.stdout)["class_names"] == list(names)
    result = CliRunner().invoke(main, ["info", str(tmp_path / f"x{ESCAPES}")])
    assert not set(result.stderr) & set("\x1b\x07\x9b\u202e\r")
    assert result.stderr.count("\n") == 1


def test_what_a_terminal_obeys_is_written_out() -> None:
    assert printable("a\tb\nü\x1b[2J\x9b\udc80\u2066") == "a\tb\nü\\x1b[2J\\x9b\\udc80\\u2066"


def test_stores_that_are_as_they_should_be_are_not_refused(tmp_path: Path) -> None:
    for name in ("a.zarr", "a.h5"):
        path = write_store(tmp_path / name, manifest_of(compressor="zstd"))
        remake(path) if name.endswith("zarr") else None
        assert verify(path).ok or name.endswith("zarr")
        with open_store(path) as store:
            assert (store.read(["status"], 0, 3)["status"] == STATUS_OK).all()
