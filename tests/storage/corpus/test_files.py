import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from storage.corpus import (
    FileEntry,
    default_preprocess,
    list_files,
    open_corpus,
    read_batch,
    sample_digests,
    without_rows,
)
from storage.corpus.access import LocalFiles
from storage.corpus.part import hard_targets_at
from storage.corpus.patterns import expand_braces, matcher
from storage.errors import CorpusError, PathError
from storage.remote import open_place
from tests.builders import write_idx, write_image_folder, write_npz
from tests.s3 import S3Server


def names(entries: list[FileEntry]) -> list[str]:
    return [entry.name for entry in entries]


def touch(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b"x" * len(file))
    return folder


# Patterns


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("t-{8..11}.tar", ["t-8.tar", "t-9.tar", "t-10.tar", "t-11.tar"]),
        ("t-{008..010}.tar", ["t-008.tar", "t-009.tar", "t-010.tar"]),
        ("{b,a}{1..2}", ["b1", "b2", "a1", "a2"]),
        ("{a,b{1..2}}.tar", ["a.tar", "b1.tar", "b2.tar"]),
        ("{x}.tar", ["{x}.tar"]),
        ("{x}-{1,2}", ["{x}-1", "{x}-2"]),
        ("open{1,2", ["open{1,2"]),
        ("{,a}", ["", "a"]),
    ],
)
def test_braces_stand_for_names_in_the_order_in_which_they_are_written(pattern: str, expected: list[str]) -> None:
    assert list(expand_braces(pattern)) == expected


@pytest.mark.parametrize("pattern", ["t-{3..1}.tar", "t-{0..99999999}.tar"])
def test_a_range_that_runs_backwards_or_never_ends_is_refused(pattern: str) -> None:
    with pytest.raises(CorpusError, match=r"expected a range of 1 to 2000000 ascending numbers, got {.*}; write the"):
        list(expand_braces(pattern))


def test_wildcards_stay_inside_a_folder() -> None:
    assert matcher("*.tar").fullmatch("a-1.tar")
    assert not matcher("*.tar").fullmatch("a/b.tar")
    assert matcher("[!a]-[0-3].tar").fullmatch("b-2.tar")
    assert not matcher("[!a]-[0-3].tar").fullmatch("a-2.tar")
    with pytest.raises(CorpusError, match="expected a pattern, got one whose brackets stand for nothing"):
        matcher("[z-a].tar")


# Files


def test_the_files_of_a_folder_come_sorted_with_size_and_version(tmp_path: Path) -> None:
    touch(tmp_path, "b.tar", "sub/a.TAR", "a.tar", "x.txt", ".hidden.tar", ".cache/c.tar", "c.tar.partial")
    found = list_files(tmp_path, "webdataset")
    assert names(found) == ["a.tar", "b.tar", "sub/a.TAR"]
    assert [entry.num_bytes for entry in found] == [5, 5, 9]
    os.utime(tmp_path / "a.tar", ns=(1, 1))
    assert list_files(tmp_path, "webdataset")[0].version == "1"


def test_a_folder_in_which_nothing_is_yet_has_no_files(tmp_path: Path) -> None:
    for kind in ("images", "webdataset", "parquet"):
        assert list_files(tmp_path, kind) == []


def test_patterns_name_files(tmp_path: Path) -> None:
    touch(tmp_path, "t-1.tar", "t-2.tar", "t-10.tar", "sub/t-3.tar", "u-1.tar")
    assert names(list_files(tmp_path / "t-{1..2}.tar", "webdataset")) == ["t-1.tar", "t-2.tar"]
    assert names(list_files(str(tmp_path / "t-*.tar"), "webdataset")) == ["t-1.tar", "t-10.tar", "t-2.tar"]
    assert names(list_files(tmp_path / "{u,t}-?.tar", "webdataset")) == ["u-1.tar", "t-1.tar", "t-2.tar"]
    assert names(list_files(tmp_path / "*" / "*.tar", "webdataset")) == ["sub/t-3.tar"]
    assert names(list_files(tmp_path / "x-*.tar", "webdataset")) == []
    assert names(list_files(tmp_path / "t-1.tar", "webdataset")) == ["t-1.tar"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    touch(tmp_path, "t-[1].tar", "t-1.tar")
    assert names(list_files(tmp_path / "t-[1].tar", "webdataset")) == ["t-[1].tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("t-{1..3}.tar", "expected the file 't-3.tar', which it names, got nothing there; check the pattern"),
        ("{t-1,t-*}.tar", "expected each file once, got 't-1.tar' twice; name it once"),
        ("{.,a}./t-1.tar", r"expected names below a folder, got '../t-1.tar'; leave '..' out"),
        ("none/*.tar", "expected a pattern inside a folder, got no folder"),
        ("none.tar", "expected a file or folder, got nothing there; check the path"),
    ],
)
def test_patterns_that_name_nothing_or_twice_are_refused(tmp_path: Path, pattern: str, message: str) -> None:
    touch(tmp_path, "t-1.tar", "t-2.tar", "a/x.tar")
    with pytest.raises(CorpusError, match=message):
        list_files(f"{tmp_path}/{pattern}", "webdataset")


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "outside.tar", "data/inside.tar")
    (tmp_path / "data" / "ok.tar").symlink_to(tmp_path / "data" / "inside.tar")
    assert names(list_files(tmp_path / "data", "webdataset")) == ["inside.tar", "ok.tar"]
    (tmp_path / "data" / "link.tar").symlink_to("../outside.tar")
    for path in (tmp_path / "data", tmp_path / "data" / "*.tar"):
        with pytest.raises(
            CorpusError, match=r"expected links that stay inside the folder, got 'link.tar', which leads"
        ):
            list_files(path, "webdataset")


def test_only_kinds_of_many_files_are_listed(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="kind: expected images or webdataset or parquet, whose corpora are many files"
    ):
        list_files(tmp_path, "arrays")


def test_bytes_are_read_in_ranges_and_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(10)))
    files = LocalFiles(tmp_path)
    assert files.read_ranges("a", [(2, 4), (0, 0), (9, 10)]) == [b"\x02\x03", b"", b"\x09"]
    with pytest.raises(
        CorpusError, match="expected bytes 8 to 11, got a file of 10; it was cut off since it was opened"
    ):
        files.read_ranges("a", [(8, 12)])
    with pytest.raises(CorpusError, match="expected a file that can be read, got 'No such file or directory'"):
        files.read_ranges("b", [(8, 12)])


# A corpus of some files


def test_a_corpus_of_some_images_keeps_their_order_and_the_classes_of_all(tmp_path: Path) -> None:
    whole = open_corpus(write_image_folder(tmp_path))
    some = open_corpus(tmp_path, files=["cat/001.png", "ant/000.png"])
    assert [some.key(row) for row in range(some.num_samples)] == ["cat/001.png", "ant/000.png"]
    assert (some.class_names, np.asarray(some.hard_targets).tolist()) == (whole.class_names, [2, 0])
    assert some.read_raw(0) == whole.read_raw(7)
    assert some.fingerprint not in (whole.fingerprint, open_corpus(tmp_path, files=["ant/000.png"]).fingerprint)
    everything = [whole.key(row) for row in range(whole.num_samples)]
    assert open_corpus(tmp_path, files=everything).fingerprint == whole.fingerprint


def test_files_that_are_not_there_or_named_twice_are_refused(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    with pytest.raises(CorpusError, match=r"expected the file 'ant/9.png', got none of that name in .*; put it back"):
        open_corpus(tmp_path, files=["ant/9.png"])
    for files in (["ant/000.png"] * 2, []):
        with pytest.raises(ValueError, match="files: expected names, each once, got"):
            open_corpus(tmp_path, files=files)
    with pytest.raises(ValueError, match="files: expected a corpus of images or webdataset or parquet files, got idx"):
        open_corpus(write_idx(tmp_path / "idx"), files=["a"])


# Without some rows


@pytest.mark.parametrize("kind", ["images", "arrays"])
def test_rows_are_left_out_and_those_behind_them_move_up(tmp_path: Path, kind: str) -> None:
    if kind == "images":
        corpus = open_corpus(write_image_folder(tmp_path, per_class=4))
    else:
        corpus = open_corpus(write_npz(tmp_path / "a.npz", num_samples=12))
    out = {0, 3, 4, 7, 11}
    kept = np.delete(np.arange(12), sorted(out))
    view = pickle.loads(pickle.dumps(without_rows(corpus, out)))
    assert (view.num_samples, view.kind, view.class_names) == (7, corpus.kind, corpus.class_names)
    assert [view.key(row) for row in range(7)] == [corpus.key(row) for row in kept.tolist()]
    np.testing.assert_array_equal(view.hard_targets, np.asarray(corpus.hard_targets)[kept])
    np.testing.assert_array_equal(sample_digests(view, 0, 7), sample_digests(corpus, 0, 12)[kept])
    rows_N = np.array([6, 0, 3])
    batch = read_batch(view, rows_N, default_preprocess(view))
    np.testing.assert_array_equal(batch.inputs, read_batch(corpus, kept[rows_N], default_preprocess(corpus)).inputs)
    for start in range(7):
        for stop in range(start + 1, 8):
            part = pickle.loads(pickle.dumps(view.part(start, stop)))
            assert [part.key(row) for row in range(start, stop)] == [
                corpus.key(row) for row in kept[start:stop].tolist()
            ]
            np.testing.assert_array_equal(sample_digests(part, start, stop), sample_digests(view, start, stop))
            np.testing.assert_array_equal(
                hard_targets_at(part, np.array([start])), view.hard_targets[start : start + 1]
            )


def test_a_corpus_without_rows_is_another_corpus_and_without_none_the_same(tmp_path: Path) -> None:
    corpus = open_corpus(write_npz(tmp_path / "a.npz"))
    assert without_rows(corpus, set()) is corpus
    prints = {corpus.fingerprint, *(without_rows(corpus, rows).fingerprint for rows in ({1}, {2}, {1, 2}))}
    assert len(prints) == 4


def test_rows_that_are_not_there_and_sequences_can_t_be_left_out(tmp_path: Path) -> None:
    corpus = open_corpus(write_npz(tmp_path / "a.npz", num_samples=3))
    with pytest.raises(ValueError, match="rows: expected 0 to 2, got 1 to 3"):
        without_rows(corpus, {1, 3})
    with pytest.raises(CorpusError, match="expected a sample that is kept, got none; give another corpus"):
        without_rows(corpus, {0, 1, 2})


# Behind a URL


def test_images_behind_a_url_are_the_corpus_that_they_are_on_disk(s3: S3Server, tmp_path: Path) -> None:
    local = open_corpus(write_image_folder(tmp_path, per_class=2))
    url = s3.url("images")
    place = open_place(url)
    for row in range(local.num_samples):
        place.put(local.key(row), local.read_raw(row))
    place.put("notes.txt", b"x")
    place.put(".hidden/a.png", b"x")
    remote = pickle.loads(pickle.dumps(open_corpus(url + "/")))
    assert (remote.path, remote.num_ignored) == (url, 1)
    assert (remote.fingerprint, remote.class_names) == (local.fingerprint, local.class_names)
    np.testing.assert_array_equal(sample_digests(remote, 0, 6), sample_digests(local, 0, 6))
    assert names(list_files(url, "images")) == [local.key(row) for row in range(6)]
    assert remote.part(2, 4).read_raw(3) == local.read_raw(3)
    place.delete(local.key(5))
    assert sample_digests(remote, 5, 6).tolist() == [0]
    with pytest.raises(
        CorpusError, match="expected a file over HTTP, which can't list what is in a folder, got a folder"
    ):
        list_files(s3.http(url), "images")


def test_files_behind_a_url_are_found_by_patterns(s3: S3Server) -> None:
    url = s3.url("data")
    place = open_place(url)
    for name in ("t-1.tar", "t-2.tar", "sub/t-3.tar", "x.txt"):
        place.put(name, name.encode())
    assert names(list_files(url, "webdataset")) == ["sub/t-3.tar", "t-1.tar", "t-2.tar"]
    assert list_files(url, "webdataset")[0].version != ""
    assert names(list_files(f"{url}/t-{{1..2}}.tar", "webdataset")) == ["t-1.tar", "t-2.tar"]
    assert names(list_files(f"{url}/*/t-*.tar", "webdataset")) == ["sub/t-3.tar"]
    assert list_files(f"{url}/t-2.tar", "webdataset") == [FileEntry("t-2.tar", 7, "")]
    assert names(list_files(s3.http(f"{url}/t-{{1..2}}.tar"), "webdataset")) == ["t-1.tar", "t-2.tar"]
    with pytest.raises(CorpusError, match=r"expected the file 't-3.tar', which it names, got nothing there"):
        list_files(f"{url}/t-{{1..3}}.tar", "webdataset")
    with pytest.raises(CorpusError, match=r"expected names over HTTP, .* got a wildcard; name the files, as in train-"):
        list_files(s3.http(f"{url}/t-*.tar"), "webdataset")


def test_a_url_with_credentials_is_refused_and_not_repeated() -> None:
    for url in ("https://host/x.tar?sig=hunter2", "s3://user:hunter2@bucket/x.tar", "https://host/x.tar#hunter2"):
        with pytest.raises(PathError) as caught:
            open_corpus(url)
        assert "hunter2" not in str(caught.value)
