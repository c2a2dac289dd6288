import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.corpus import (
    Columns,
    SequenceOptions,
    TokenCorpus,
    default_preprocess,
    open_corpus,
    read_batch,
    sample_digest,
    sample_digests,
)
from storage.corpus import parquet_files as access
from storage.corpus.parquet import ParquetCorpus
from storage.corpus.part import hard_targets_at
from storage.corpus.protocol import SampleError
from storage.errors import CorpusError
from storage.remote import open_place
from tests.builders import image_bytes, random_pixels, write_image_folder
from tests.s3 import S3Server
from tests.storage.corpus.test_webdataset import png_bomb

NAMES = ("ant", "bee", "cat")
BYTES = SequenceOptions(4, tokenizer="bytes")


def pictures(start: int, stop: int, size: int = 8) -> list[bytes]:
    return [image_bytes(random_pixels(size, size, 3, seed=number)) for number in range(start, stop)]


def write(path: Path, columns: dict[str, Any], metadata: dict[str, str] | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata(metadata)
    pq.write_table(table, path, **options)
    return path


def write_files(folder: Path, counts: tuple[int, ...] = (4, 3, 5), group: int = 2, **columns: Any) -> Path:
    """`train-0.parquet`, ... of images with labels."""
    start = 0
    for number, count in enumerate(counts):
        labels = pa.array([row % 3 for row in range(start, start + count)], pa.int16())
        write(
            folder / f"train-{number}.parquet",
            {"image": pa.array(pictures(start, start + count), pa.binary()), "label": labels} | columns,
            {"label_names": json.dumps(NAMES)},
            row_group_size=group,
        )
        start += count
    return folder


def opened(path: Path | str, **options: Any) -> ParquetCorpus:
    corpus = open_corpus(path, **options)
    assert isinstance(corpus, ParquetCorpus)
    return corpus


def test_rows_go_on_from_group_to_group_and_file_to_file(tmp_path: Path) -> None:
    corpus = opened(write_files(tmp_path))
    assert (corpus.kind, corpus.sample_kind, corpus.class_names) == ("parquet", "image", NAMES)
    assert np.asarray(corpus.hard_targets).tolist() == [row % 3 for row in range(12)]
    assert corpus.read_raws(np.array([11, 0, 5, 4, 0])) == [pictures(n, n + 1)[0] for n in (11, 0, 5, 4, 0)]
    assert [corpus.key(row) for row in (0, 3, 4, 6, 7, 11)] == [
        f"train-{name}" for name in ("0.parquet:0", "0.parquet:3", "1.parquet:0", "1.parquet:2", "2.parquet:0")
    ] + ["train-2.parquet:4"]
    assert corpus.decode(corpus.read_raw(3)).shape == (8, 8, 3)
    assert open_corpus(tmp_path / "train-{0..2}.parquet").fingerprint == corpus.fingerprint
    assert open_corpus(tmp_path / "train-1.parquet").num_samples == 3
    some = opened(tmp_path, files=["train-2.parquet", "train-0.parquet"])
    assert (some.num_samples, some.read_raw(0), some.read_raw(5)) == (9, corpus.read_raw(7), corpus.read_raw(0))


def test_keys_come_from_their_column(tmp_path: Path) -> None:
    columns = {"image": pa.array(pictures(0, 3), pa.binary())}
    texts = write(tmp_path / "a.parquet", columns | {"key": ["x/1", None, "\x1b[2J"]})
    assert [opened(texts).key(row) for row in range(3)] == ["x/1", "a.parquet:1", "\\x1b[2J"]
    numbers = write(tmp_path / "b.parquet", columns | {"key": [7, 8, 9]})
    assert [opened(numbers).key(row) for row in range(3)] == ["7", "8", "9"]
    others = write(tmp_path / "c.parquet", columns | {"key": [0.5, 1.5, 2.5]})
    assert opened(others).key(2) == "c.parquet:2"


@pytest.mark.parametrize("name", ["image", "img", "picture_of_it"])
def test_images_as_the_datasets_library_writes_them(tmp_path: Path, name: str) -> None:
    features = {name: {"_type": "Image"}, "fine_label": {"_type": "ClassLabel", "names": list(NAMES)}}
    images = [{"bytes": raw, "path": None} for raw in pictures(0, 3)]
    path = write(
        tmp_path / "a.parquet",
        {name: images, "fine_label": [2, 0, 1]},
        {"huggingface": json.dumps({"info": {"features": features}})},
    )
    corpus = opened(path)
    assert (corpus.image, corpus.class_names) == (f"{name}.bytes", NAMES)
    assert np.asarray(corpus.hard_targets).tolist() == [2, 0, 1]
    np.testing.assert_array_equal(corpus.decode(corpus.read_raw(1))[..., 0], random_pixels(8, 8, 3, seed=1)[..., 0])


@pytest.mark.parametrize(
    "type_", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary())], ids=["binary", "large", "dict"]
)
def test_bytes_may_be_of_any_binary_type(tmp_path: Path, type_: pa.DataType) -> None:
    corpus = opened(write(tmp_path / "a.parquet", {"image": pa.array(pictures(0, 3), pa.binary()).cast(type_)}))
    assert corpus.read_raw(2) == pictures(2, 3)[0]


def test_a_null_image_is_refused_alone_and_a_null_label_is_unknown(tmp_path: Path) -> None:
    raws = pictures(0, 4)
    plain = write(tmp_path / "a.parquet", {"image": pa.array([raws[0], None], pa.binary()), "label": [1, None]})
    struct = write(tmp_path / "b.parquet", {"image": [{"bytes": raws[0]}, None, {"bytes": None}], "label": [1, 0, 0]})
    for path, bad in ((plain, [1]), (struct, [1, 2])):
        corpus = opened(path)
        batch = read_batch(corpus, range(corpus.num_samples), default_preprocess(corpus, 8))
        assert list(batch.errors) == bad
        assert batch.errors[1] == "expected an image, got null; write one, or leave the row out"
    assert np.asarray(opened(plain).hard_targets).tolist() == [1, -1]


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    a, b = pictures(0, 2), pictures(2, 4)
    columns = {"front": pa.array(a, pa.binary()), "back": pa.array(b, pa.binary()), "x": [1, 0], "label": [2, 2]}
    path = write(tmp_path / "a.parquet", columns)
    corpus = opened(path, columns=Columns(image="back", label="x"))
    assert corpus.read_raw(0) == b[0]
    assert np.asarray(corpus.hard_targets).tolist() == [1, 0]
    front = opened(path, columns=Columns(image="front"), labels="none")
    assert (front.hard_targets, front.fingerprint == corpus.fingerprint) == (None, False)
    np.save(tmp_path / "y.npy", np.array([4, 5]))
    given = opened(path, columns=Columns(image="front"), labels=tmp_path / "y.npy")
    assert np.asarray(given.hard_targets).tolist() == [4, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected one column of encoded images, got 'front', 'back'; say which: --image-column"),
        ({"image": "side"}, r"expected a column 'side', got 'front', 'back', 'x', 'label', 'fine_label', 'word'; name"),
        ({"image": "x"}, r"expected encoded images in the column 'x', .*, got double; name another: --image-column"),
        (
            {"image": "front"},
            r"expected one column of class numbers, got 'label', 'fine_label'; say which: --label-col",
        ),
        (
            {"image": "front", "label": "x"},
            r"expected class numbers, integers, in the column 'x', got double; name another: --label-column",
        ),
        ({"image": "front", "label": "none"}, r"expected class numbers, integers, in the column 'none', got 'front'"),
    ],
)
def test_columns_that_can_t_be_told_or_used_are_refused(tmp_path: Path, options: dict[str, str], message: str) -> None:
    raws = pa.array(pictures(0, 1), pa.binary())
    path = write(
        tmp_path / "a.parquet",
        {"front": raws, "back": raws, "x": [0.5], "label": [1], "fine_label": [1], "word": ["a"]},
    )
    with pytest.raises(CorpusError, match=message):
        opened(path, columns=Columns(**options))


def test_options_that_would_be_ignored_are_usage_errors(tmp_path: Path) -> None:
    path = write_files(tmp_path / "files")
    np.save(tmp_path / "y.npy", np.zeros(12, np.int64))
    for labels in ("none", str(tmp_path / "y.npy")):
        with pytest.raises(
            ValueError, match=f"label_column: expected none beside labels '{labels}', got 'label'; leave"
        ):
            opened(path, labels=labels, columns=Columns(label="label"))
    for columns, name in ((Columns(label="y"), "label_column"), (Columns(image="y"), "image_column")):
        with pytest.raises(ValueError, match=f"{name}: expected Parquet files of images for 'y', got images; leave it"):
            open_corpus(write_image_folder(tmp_path / "images"), columns=columns)
        text = write(tmp_path / "t.parquet", {"text": ["some words"]})
        with pytest.raises(ValueError, match=f"{name}: expected Parquet files of images for 'y', got text; leave it"):
            open_corpus(text, sequence=BYTES, columns=columns)
    for name in ("image", "label"):
        with pytest.raises(
            ValueError, match=f"{name}_column: expected the name of a column, got nothing; leave it out"
        ):
            Columns(**{name: ""})


@pytest.mark.parametrize(
    ("columns", "metadata", "message"),
    [
        ({"a": [1]}, None, "expected one column of encoded images, got 'a'; give files that hold one"),
        ({"a": ["x"]}, None, "got 'a'; give files that hold one, or for text --sequence-length and --tokenizer"),
        ({"image": pa.array([], pa.binary())}, None, "expected at least one row, got none; give files with rows"),
        (
            {"image": [b"x"], "label": [-2]},
            None,
            r"column 'label': expected class numbers from 0 \(-1 for unknown\), got",
        ),
        (
            {"image": [b"x"], "label": [2**40]},
            None,
            r"column 'label': expected class numbers from 0 .*, got 1099511627776",
        ),
        (
            {"image": [b"x"], "label": [2]},
            {"label_names": "a,b"},
            "row 0: expected class numbers below 2, for which there are names, got 2; mend the column 'label', or",
        ),
    ],
)
def test_files_without_usable_rows_are_refused(
    tmp_path: Path, columns: dict[str, Any], metadata: dict[str, str] | None, message: str
) -> None:
    with pytest.raises(CorpusError, match=message):
        opened(write(tmp_path / "a.parquet", columns, metadata))


@pytest.mark.parametrize(
    ("columns", "metadata", "message"),
    [
        (
            {"img": [b"x"]},
            None,
            "expected images in the column 'image', as in 'a.parquet', got 'img'; give files that were",
        ),
        ({"image": [b"x"], "key": ["k"]}, None, "expected keys in the column None, as in 'a.parquet', got 'key'"),
        ({"image": [b"x"], "label": [1]}, None, "expected class numbers in the column None, .* got 'label'"),
    ],
)
def test_files_that_were_not_written_alike_are_refused(
    tmp_path: Path, columns: dict[str, Any], metadata: dict[str, str] | None, message: str
) -> None:
    write(tmp_path / "a.parquet", {"image": [b"x"]})
    write(tmp_path / "b.parquet", columns, metadata)
    with pytest.raises(CorpusError, match=message):
        opened(tmp_path)


def test_a_file_without_rows_among_others_is_passed_over(tmp_path: Path) -> None:
    write_files(tmp_path)
    labels = pa.array([], pa.int16())
    columns = {"image": pa.array([], pa.binary()), "label": labels}
    write(tmp_path / "train-1.parquet", columns, {"label_names": json.dumps(NAMES)})
    corpus = opened(tmp_path)
    assert [corpus.key(row) for row in (3, 4)] == ["train-0.parquet:3", "train-2.parquet:0"]
    part = corpus.part(3, 6)
    assert [part.read_raw(row) for row in (3, 4, 5)] == [corpus.read_raw(row) for row in (3, 4, 5)]


def test_a_part_carries_the_index_of_its_files_only(tmp_path: Path) -> None:
    corpus = opened(write_files(tmp_path, (6, 7, 8)))
    for start, stop in ((0, 1), (5, 7), (4, 21), (6, 13), (12, 14)):
        part = pickle.loads(pickle.dumps(corpus.part(start, stop)))
        np.testing.assert_array_equal(sample_digests(part, start, stop), sample_digests(corpus, start, stop))
        assert [part.key(row) for row in range(start, stop)] == [corpus.key(row) for row in range(start, stop)]
        found = hard_targets_at(part, np.arange(start, stop))
        assert np.array_equal(np.asarray(found), np.asarray(corpus.hard_targets)[start:stop])
    many = opened(write_files(tmp_path / "many", (2,) * 60))
    assert len(pickle.dumps(many.part(60, 61))) < 2000


def test_row_groups_are_read_once_while_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = opened(write_files(tmp_path, (4, 4)))
    monkeypatch.setattr(access, "_GROUPS", access._Kept[list[Any]](10**6))
    reads: list[str] = []
    leaf = access._leaf

    def counted(chunk: Any, column: str) -> Any:
        reads.append(column)
        return leaf(chunk, column)

    monkeypatch.setattr(access, "_leaf", counted)
    for _ in range(3):
        sample_digests(corpus, 0, 8)
    assert len(reads) == 4
    monkeypatch.setattr(access, "_GROUPS", access._Kept[list[Any]](1))
    reads.clear()
    for _ in range(2):
        sample_digests(corpus, 0, 8)
    assert len(reads) == 8


def test_texts_are_tokenised(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"text": ["some words", None, "more"], "caption": ["x", "y", "z"]}, row_group_size=1)
    write(tmp_path / "b.parquet", {"text": ["", "end"], "caption": ["v", "w"]})
    corpus = open_corpus(tmp_path, sequence=BYTES)
    assert isinstance(corpus, TokenCorpus)
    assert (corpus.kind, bytes(corpus.ids_T.astype(np.uint8)), corpus.num_documents) == (
        "parquet",
        b"some wordsmoreend",
        3,
    )
    assert pickle.loads(pickle.dumps(corpus)).fingerprint == corpus.fingerprint
    assert pickle.loads(pickle.dumps(corpus.part(1, 3))).read_raw(2) == corpus.read_raw(2)
    named = open_corpus(tmp_path, sequence=SequenceOptions(4, tokenizer="bytes", text_field="caption"))
    assert isinstance(named, TokenCorpus)
    assert bytes(named.ids_T.astype(np.uint8)) == b"xyzvw"


def test_texts_that_can_t_be_used_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"words": ["a"], "n": [1]})
    with pytest.raises(
        CorpusError, match="expected text in the column 'text', got the columns 'words', 'n'; say which"
    ):
        open_corpus(path, sequence=BYTES)
    with pytest.raises(CorpusError, match="expected text in the column 'n', got int64; say which column: --text-field"):
        open_corpus(path, sequence=SequenceOptions(4, tokenizer="bytes", text_field="n"))
    with pytest.raises(CorpusError, match="expected a tokenizer for the text, got none; give --tokenizer"):
        open_corpus(path, sequence=SequenceOptions(4))
    with pytest.raises(ValueError, match="labels: expected none for a corpus of text, got 'none'; leave it out"):
        open_corpus(path, sequence=BYTES, labels="none")
    with pytest.raises(
        CorpusError, match="expected at least 2 tokens, one to read and one to predict, got 1; give more"
    ):
        open_corpus(path, sequence=SequenceOptions(4, tokenizer="bytes", text_field="words"))


# Behind a URL


def test_files_behind_a_url_are_the_corpus_that_they_are_on_disk(s3: S3Server, tmp_path: Path) -> None:
    local, url = opened(write_files(tmp_path)), s3.url("data")
    for path in tmp_path.iterdir():
        open_place(url).put(path.name, path.read_bytes())
    for place in (url, f"{url}/train-*.parquet", s3.http(f"{url}/train-{{0..2}}.parquet")):
        remote = pickle.loads(pickle.dumps(opened(place)))
        assert (remote.fingerprint, remote.class_names) == (local.fingerprint, local.class_names)
        np.testing.assert_array_equal(sample_digests(remote, 0, 12), sample_digests(local, 0, 12))
    part = pickle.loads(pickle.dumps(remote.part(3, 8)))
    assert [sample_digest(part.read_raw(row)) for row in range(3, 8)] == sample_digests(local, 3, 8).tolist()
    write(tmp_path / "text" / "a.parquet", {"text": ["some words"]})
    open_place(url).put("text/a.parquet", (tmp_path / "text" / "a.parquet").read_bytes())
    assert open_corpus(f"{url}/text", sequence=BYTES).num_samples == 3


def test_only_what_is_read_of_a_large_file_moves(s3: S3Server, tmp_path: Path) -> None:
    raws = [np.random.default_rng(row).bytes(20_000) for row in range(100)]
    path = write(
        tmp_path / "a.parquet", {"image": pa.array(raws, pa.binary())}, row_group_size=10, use_dictionary=False
    )
    url = s3.url("a.parquet")
    open_place(url).put("", path.read_bytes())
    before = s3.ask()["bytes"]
    corpus = opened(url)
    opening = s3.ask()["bytes"] - before
    assert opening < 300_000
    assert corpus.read_raws(np.arange(20, 30)) == raws[20:30]
    assert s3.ask()["bytes"] - before - opening < 600_000


# What is hostile


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: b"x" * 100, "expected a Parquet file, got one that starts with 78 78 78 78; take another copy"),
        (lambda _: b"PAR1", "expected a Parquet file, got 4 bytes; take another copy"),
        (lambda data: data[:-20], "expected a Parquet file, got one that is cut off; take another copy"),
        (
            lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1",
            r"expected a footer of at most \d+ bytes, got one that claims 2147483647; it is damaged, take another copy",
        ),
        (
            lambda data: data[:-200] + bytes(192) + data[-8:],
            r"expected a whole Parquet file, got a damaged one, or one that pyarrow does not read \(.*\); take another",
        ),
    ],
)
def test_damaged_footers_are_refused_in_one_line(tmp_path: Path, change: Any, message: str) -> None:
    path = write_files(tmp_path, (4,)) / "train-0.parquet"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CorpusError, match=message) as caught:
        opened(path)
    assert "\n" not in str(caught.value)


def test_damaged_pages_are_refused_in_one_line(tmp_path: Path) -> None:
    raws = [np.random.default_rng(row).bytes(1000) for row in range(20)]
    path = write(
        tmp_path / "a.parquet", {"image": pa.array(raws, pa.binary())}, compression="zstd", use_dictionary=False
    )
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)
    path.write_bytes(data)
    corpus = opened(path)
    with pytest.raises(CorpusError, match="expected a whole Parquet file, got a damaged one") as caught:
        corpus.read_raw(0)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, SampleError)


def test_a_footer_that_claims_more_rows_than_the_file_can_hold_is_refused(tmp_path: Path) -> None:
    same = pa.DictionaryArray.from_arrays(pa.array(np.zeros(200_000, np.int32)), pa.array([b"x"], pa.binary()))
    path = write(tmp_path / "a.parquet", {"image": same})
    with pytest.raises(
        CorpusError, match=r"expected at most 8 rows a byte, got a footer that claims 200000 in \d+ bytes"
    ):
        opened(path)


def test_a_row_group_that_claims_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = opened(write_files(tmp_path, (4,)))
    monkeypatch.setattr(access, "MAX_GROUP_BYTES", 100)
    with pytest.raises(
        CorpusError, match=r"expected at most 100 bytes of 'image' in a row group, got one that claims \d+"
    ):
        corpus.read_raw(0)


def test_one_large_value_that_is_repeated_takes_the_memory_of_one(tmp_path: Path) -> None:
    large, count = b"x" * (40 << 20), 2000
    bomb = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([large], pa.binary()))
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array(["y" * (1 << 20)]))
    columns = {"image": bomb, "label": [0] * count, "text": text}
    write(tmp_path / "a.parquet", columns, compression="zstd", store_schema=False, dictionary_pagesize_limit=1 << 30)
    code = f"""
import pathlib, re
from storage.corpus import open_corpus, SequenceOptions
from storage.errors import CorpusError
from storage.corpus import text
import pyarrow.parquet
text.MAX_TOKENS = 2**25
def peak():  # KiB; ru_maxrss would count the parent's
    return int(re.search("VmHWM:[ \\t]+([0-9]+)", pathlib.Path("/proc/self/status").read_text())[1])
before = peak()
corpus = open_corpus({str(tmp_path / "a.parquet")!r})
assert all(len(raw) == {len(large)} for raw in corpus.read_raws(__import__("numpy").arange(3)))
try:
    open_corpus({str(tmp_path / "a.parquet")!r}, sequence=SequenceOptions(4, tokenizer="bytes"))
except CorpusError as error:
    assert "expected at most" in str(error), error
else:
    raise SystemExit("no limit")
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 700 << 10  # KiB; 80 GB without care


def test_image_bombs_are_refused_alone(tmp_path: Path) -> None:
    corpus = opened(write(tmp_path / "a.parquet", {"image": pa.array([png_bomb(), *pictures(0, 1)], pa.binary())}))
    batch = read_batch(corpus, [0, 1], default_preprocess(corpus, 8))
    assert list(batch.errors) == [0]
    assert "expected at most 89478485 pixels, got more" in batch.errors[0]


def test_without_pyarrow_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_files(tmp_path)
    monkeypatch.setattr(access, "_FOOTERS", access._Kept[Any](2))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        CorpusError, match=r"expected the library pyarrow, got an .*; pip install 'logitstore\[parquet\]'"
    ):
        opened(path)


def test_cifar100_is_read_as_it_comes(shared_data: Path) -> None:
    corpus = opened(shared_data / "cifar100" / "train-*.parquet", columns=Columns(label="fine_label"))
    assert (corpus.num_samples, corpus.image, corpus.key_column) == (50_000, "image", "key")
    assert corpus.class_names is not None
    assert (len(corpus.class_names), corpus.class_names[0]) == (100, "apple")
    assert np.bincount(np.asarray(corpus.hard_targets)).tolist() == [500] * 100
    assert corpus.decode(corpus.read_raw(49_999)).shape == (32, 32, 3)
    coarse = opened(shared_data / "cifar100" / "test-0.parquet", columns=Columns(label="coarse_label"))
    assert coarse.class_names is not None
    assert (coarse.num_samples, len(coarse.class_names)) == (10_000, 20)
    with pytest.raises(CorpusError, match="expected files of one split, got test, train; give a pattern for one of"):
        open_corpus(shared_data / "cifar100")
