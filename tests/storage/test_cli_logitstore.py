"""`logitstore`: what it prints, and how it fails."""

import json
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
from click.testing import CliRunner, Result

from storage.cli import main
from storage.encodings import Dense, Encoding, Sample, TopK
from storage.reader import open_store
from storage.records import MANIFEST
from tests.storage.scan_stores import manifest_of, write_store
from tests.storage.soft_targets import hidden_encoding, sequences_of

INFO_KEYS = {
    "content_digest",
    "num_rows",
    "num_sealed_rows",
    "num_quarantined",
    "encoding",
    "temperatures",
    "teacher",
    "corpus",
    "format_version",
    "num_classes",
    "class_names",
    "preprocess",
    "num_bytes",
    "complete",
    "finalized",
    "num_shards",
}


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def command(*words: object) -> list[str]:
    return [sys.executable, "-c", "from storage.cli import main; main()", *map(str, words)]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "a.zarr", manifest_of(encoding=TopK(3)))


def flip(path: Path, position: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("suffix", [".zarr", ".h5"])
def test_info_as_json_gives_the_figures_of_the_contract(tmp_path: Path, suffix: str) -> None:
    manifest = manifest_of(encoding=TopK(3))
    path = write_store(tmp_path / f"a{suffix}", manifest)
    figures = json.loads(run("info", path, "--json").stdout)
    assert set(figures) >= INFO_KEYS
    with open_store(path) as opened:
        assert figures["content_digest"] == opened.content_digest
    assert (figures["num_rows"], figures["num_sealed_rows"], figures["num_quarantined"]) == (22, 22, 2)
    assert figures["encoding"] == {"name": "topk", "k": 3, "values": "float16"}
    assert figures["temperatures"] == [1.0, 4.0]
    assert figures["teacher"] == dict(manifest.teacher)
    assert figures["corpus"] == dict(manifest.corpus)
    assert figures["format_version"] == "1.0"


def test_info_of_an_unfinalized_store_counts_what_is_sealed(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of(), shards=1, finalize=False)
    figures = json.loads(run("info", path, "--json").stdout)
    assert figures["content_digest"] is None
    assert (figures["num_sealed_rows"], figures["num_quarantined"], figures["complete"]) == (8, 1, False)
    text = run("info", path).stdout
    assert "not finished: the same teacherdump run goes on with it" in text
    assert "8 of 22 sealed, 1 of them without targets" in text
    origin = {"content_digest": "ab" * 32, "encoding": {"name": "dense", "values": "float16"}, "temperatures": [1.0]}
    made = write_store(tmp_path / "b.zarr", manifest_of(lineage=(origin,)), shards=1, finalize=False)
    assert "not finished: the same command goes on with it" in run("info", made).stdout


def test_info_reads_well(store: Path) -> None:
    lines = run("info", store).stdout.splitlines()
    assert lines[0] == f"{store}: a logit store, finalized"
    assert 8 <= len(lines) <= 12
    assert all(len(line) <= 120 for line in lines[1:])
    text = "\n".join(lines)
    assert "topk k=3 float16, exact at T = 1, 4" in text
    assert "22, 2 of them without targets" in text


def test_info_of_a_finalized_store_reads_no_seal(store: Path) -> None:
    for seal in (store / "seals").iterdir():
        seal.write_text("not read")
    assert run("info", store).exit_code == 0


def test_info_shortens_long_lists_of_names(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of(num_classes=40, encoding=Dense("uint8")))
    assert "40: class 0, class 1, class 2, class 3, ..., class 39; with hard targets" in run("info", path).stdout
    path = write_store(tmp_path / "b.zarr", manifest_of(class_names=None, has_hard_targets=False), shards=1)
    text = run("info", path).stdout
    assert "classes   5\n" in text
    assert "finalized at a part of its rows" in text
    assert "dense float16, any T (statistics at 1, 4)" in text


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        (TopK(4), "topk k=4 float16, exact at T = 1, 4"),
        (Sample(50, 3), "sample 50 draws at T = 1"),
        (Sample(1), "sample 1 draw at T = 1"),
        (hidden_encoding(3000, 4), "hidden 4 x float16 + head 3,000 x 4, any T (statistics at 1, 4)"),
        (
            hidden_encoding(3000, 4, values="float32", scale=0.5, soft_cap=30.0, has_bias=True),
            "hidden 4 x float32 + head 3,000 x 4 and bias, scale 0.5, soft cap 30, any T (statistics at 1, 4)",
        ),
    ],
)
def test_info_of_sequences_reads_well(tmp_path: Path, encoding: Encoding, said: str) -> None:
    manifest = manifest_of(num_rows=6, num_classes=3000, encoding=encoding, sequences=sequences_of(16))
    path = write_store(tmp_path / "a.zarr", manifest)
    lines = run("info", path).stdout.splitlines()
    assert 8 <= len(lines) <= 12
    assert all(len(line) <= 120 for line in lines[1:])
    text = "\n".join(lines)
    assert f"encoding  {said}\n" in text
    assert "rows      6, sequences of 16: 96 positions, 1 rows without targets" in text
    assert "vocabulary 3,000, 2 more outputs of the teacher cut off, tokenizer efefefefefefefef, stored" in text
    assert "bytes a position" in text
    assert "format 1.1" in text
    figures = json.loads(run("info", path, "--json").stdout)
    assert (figures["num_positions"], figures["sequences"]) == (16, sequences_of(16).to_json())
    assert figures["encoding"] == encoding.to_json()


def test_info_tells_what_is_not_there_and_where_rows_came_from(tmp_path: Path) -> None:
    origins = [{"content_digest": "12" * 32, "encoding": {"name": "dense", "values": "float16"}}, {}]
    sequences = sequences_of(2, has_tokens=False, tokenizer=None, num_padded=0)
    manifest = manifest_of(encoding=TopK(2), sequences=sequences, lineage=tuple(origins))
    path = write_store(tmp_path / "a.zarr", manifest)
    text = run("info", path).stdout
    assert "tokens    vocabulary 5, tokenizer not known, not stored: a student needs the corpus\n" in text
    assert "lineage   from dense digest 1212121212121212, from a store\n" in text
    assert json.loads(run("info", path, "--json").stdout)["lineage"] == origins
    empty = write_store(tmp_path / "b.zarr", manifest_of(sequences=sequences), shards=0, finalize=False)
    assert "0 of 22 sealed, sequences of 2: 0 positions" in run("info", empty).stdout
    figures = json.loads(run("info", write_store(tmp_path / "c.zarr", manifest_of()), "--json").stdout)
    assert (figures["num_positions"], figures["sequences"], figures["lineage"]) == (1, None, None)


def test_stats_of_sequences_are_of_tokens(tmp_path: Path) -> None:
    encoding = hidden_encoding(3000, 4)
    manifest = manifest_of(num_rows=6, num_classes=3000, encoding=encoding, sequences=sequences_of(16))
    path = write_store(tmp_path / "a.zarr", manifest)
    result = run("stats", path)
    assert result.exit_code == 0
    figures = json.loads(run("stats", path, "--json").stdout)
    num_tokens = figures["num_tokens"]
    assert num_tokens == sum(figures["top1_counts"]) < 5 * 16
    assert f"tokens           {num_tokens} of 96 positions; the others are masked" in result.stdout
    assert "next token met" in result.stdout
    assert "nats on the next tokens" in result.stdout
    assert "and 2,990 ids more" in result.stdout
    assert "bytes a token    " in result.stdout
    assert "head             24.1 kB, once" in result.stdout
    assert "class" not in result.stdout
    assert run("verify", path).exit_code == 0


def test_verify_says_that_nothing_is_damaged(store: Path) -> None:
    result = run("verify", store)
    assert result.exit_code == 0
    assert "nothing is damaged" in result.stdout
    assert json.loads(run("verify", store, "--json").stdout)["ok"] is True


def test_verify_exits_with_1_and_names_shard_and_chunk(store: Path) -> None:
    flip(store / "ids" / "c" / "1" / "0", 17)
    result = run("verify", store, "--threads", 1)
    assert result.exit_code == 1
    assert "array 'ids', shard 1, chunk 1" in result.stdout
    assert "1 found damaged" in result.stdout
    found = run("verify", store, "--json")
    assert found.exit_code == 1
    assert [(item["shard"], item["array"], item["chunk"]) for item in json.loads(found.stdout)["damage"]] == [
        (1, "ids", 1)
    ]


def test_verify_tells_of_warnings_notes_and_missing_rows(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of(), shards=1, finalize=False)
    (path / "photo.jpg").write_text("mine")
    result = run("verify", path)
    assert result.exit_code == 0
    assert "warning: " in result.stdout
    assert "note: not finalized" in result.stdout
    assert "rows not sealed: 8 to 21" in result.stdout


def test_stats_prints_and_draws(store: Path, tmp_path: Path) -> None:
    result = run("stats", store, "--picture", tmp_path / "a.png")
    assert result.exit_code == 0
    for words in ("without targets  2", "kept at T = 4", "hard target met", "bytes a row"):
        assert words in result.stdout
    assert (tmp_path / "a.png").stat().st_size > 10_000
    figures = json.loads(run("stats", store, "--json").stdout)
    assert sum(figures["top1_counts"]) == 20


def test_a_picture_of_another_kind_is_refused_before_the_pass(store: Path, tmp_path: Path) -> None:
    result = run("stats", store, "--picture", tmp_path / "a.gif")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: picture: expected a path that ends in .png or .html")


def test_finalize_says_the_digest_and_may_be_repeated(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of(), finalize=False)
    result = run("finalize", path)
    with open_store(path) as opened:
        assert f"finalized: 22 rows\ncontent digest {opened.content_digest}" in result.stdout
    again = run("finalize", path)
    assert again.exit_code == 0
    assert "was finalized already" in again.stdout


@pytest.mark.parametrize("suffix", [".zarr", ".h5"])
def test_finalize_refuses_missing_rows_unless_it_is_told(tmp_path: Path, suffix: str) -> None:
    path = write_store(tmp_path / f"a{suffix}", manifest_of(), shards=2, finalize=False)
    refused = run("finalize", path)
    assert refused.exit_code == 1
    assert "expected all 3 shards sealed, got 2" in refused.stderr
    assert "--partial" in refused.stderr
    done = run("finalize", path, "--partial")
    assert done.exit_code == 0
    assert "16 rows (6 rows are missing for good)" in done.stdout
    assert run("verify", path).exit_code == 0


def test_convert_says_what_it_made(store: Path, tmp_path: Path) -> None:
    result = run("convert", store, tmp_path / "b.h5", "--compressor", "zstd")
    assert result.exit_code == 0
    with open_store(store) as opened:
        assert f"content digest {opened.content_digest}, as {store} has it" in result.stdout
    assert json.loads(run("info", tmp_path / "b.h5", "--json").stdout)["compressor"] == "zstd"
    assert run("convert", store, tmp_path / "c.h5", "--compressor", "lzma").exit_code == 2


def a_corpus(path: Path) -> None:
    (path / "cat").mkdir(parents=True)
    (path / "cat" / "0.jpg").write_bytes(b"x")


def a_newer_store(path: Path) -> None:
    write_store(path, manifest_of(), finalize=False, shards=0)
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text.replace('"format_version": "1.0"', '"format_version": "2.0"'))


def anothers_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["x"] = [1, 2]


def a_store_of_another_kind(path: Path) -> None:
    path.mkdir()
    (path / MANIFEST).write_text('{"format": "else"}')


NO_STORES = [
    ("no.zarr", lambda _: None, "expected a logit store, got no such path"),
    ("empty", lambda path: path.mkdir(), "expected a logit store, got"),
    ("corpus", a_corpus, "expected a logit store, got something without a manifest"),
    ("file.txt", lambda path: path.write_text("hello"), "expected a logit store, got something without a manifest"),
    ("other.h5", anothers_hdf5, "expected a logit store, got something without a manifest"),
    ("text.h5", lambda path: path.write_text("hello"), "expected an HDF5 file, got something else"),
    ("newer.zarr", a_newer_store, "expected format version 1.x, got 2.0; install a newer release"),
    ("json.zarr", a_store_of_another_kind, "is this a logit store?"),
]


@pytest.mark.parametrize("words", [("info",), ("verify",), ("stats",), ("finalize",), ("convert",)])
@pytest.mark.parametrize(("name", "make", "expected"), NO_STORES, ids=[name for name, _, _ in NO_STORES])
def test_what_is_no_store_is_refused_in_one_line(
    tmp_path: Path, words: tuple[str], name: str, make: object, expected: str
) -> None:
    assert callable(make)
    make(tmp_path / name)
    target = [tmp_path / "target.zarr"] if words == ("convert",) else []
    result = run(*words, tmp_path / name, *target)
    assert result.exit_code == 1
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    assert result.stdout == ""


def test_finalize_of_a_store_of_which_nothing_is_sealed_says_so(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of(), shards=0, finalize=False)
    for words in ([], ["--partial"]):
        result = run("finalize", path, *words)
        assert (result.exit_code, "nothing is sealed yet" in result.stderr) == (1, True)


def test_a_damaged_record_is_one_line(store: Path) -> None:
    flip(store / "final.json", 40)
    result = run("info", store)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "final.json: expected its checksum to hold" in result.stderr


def test_usage_exits_with_2(store: Path) -> None:
    assert run("info").exit_code == 2
    assert run("verify", store, "--threads", 0).exit_code == 2
    assert run("transmogrify", store).exit_code == 2


def test_a_reader_that_hangs_up_is_no_error(store: Path) -> None:
    process = subprocess.Popen(command("info", store), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # before anything is written
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0
    assert errors == b""


def test_help_and_info_import_neither_torch_nor_dask_nor_matplotlib(store: Path) -> None:
    check = "import sys; bad = {'torch', 'dask', 'matplotlib', 'distributed'} & set(sys.modules); assert not bad, bad"
    for words in (["--help"], ["info", str(store)]):
        code = f"from storage.cli import main\ntry:\n    main({words!r})\nexcept SystemExit:\n    pass\n{check}"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    code = f"from storage.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n{check}\n"
    quick = "assert not {'zarr', 'h5py', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code + quick], check=True, capture_output=True)


def test_version_is_the_release() -> None:
    assert run("--version").stdout.startswith("logitstore, version ")
