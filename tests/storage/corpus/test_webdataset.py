import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.corpus import (
    default_preprocess,
    open_corpus,
    read_batch,
    sample_digest,
    sample_digests,
    tar_tables,
    webdataset,
)
from storage.corpus.part import hard_targets_at
from storage.corpus.protocol import SampleError
from storage.corpus.tar_members import Window, read_members
from storage.corpus.webdataset import WebDatasetCorpus
from storage.errors import CorpusError
from storage.remote import open_place
from tests.builders import image_bytes, random_pixels
from tests.s3 import S3Server
from tests.storage.corpus.tars import image_members, npy_bytes, write_tar, write_tars

PIXEL = image_bytes(random_pixels(2, 2))


def opened(path: Path | str, **options: Any) -> WebDatasetCorpus:
    corpus = open_corpus(path, **options)
    assert isinstance(corpus, WebDatasetCorpus)
    return corpus


def keys(corpus: WebDatasetCorpus) -> list[str]:
    return [corpus.key(row) for row in range(corpus.num_samples)]


def upload(folder: Path, url: str) -> None:
    for path in folder.iterdir():
        open_place(url).put(path.name, path.read_bytes())


# Headers


def hand_read(data: bytes, near: int = 1 << 16) -> list[tuple[str, bool, int, int]]:
    window = Window(lambda start, stop: data[start:stop], len(data), near, 512)
    return [(m.name.decode(), m.is_file, m.start, m.size) for m in read_members(window, "tar")]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 3000), st.sampled_from("fdlhs")), max_size=8),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.sampled_from([512, 2048, 1 << 16]),
)
def test_headers_are_read_as_tarfile_reads_them(members: list[tuple[int, int, str]], form: int, near: int) -> None:
    stream = io.BytesIO()
    types = {"f": tarfile.REGTYPE, "d": tarfile.DIRTYPE, "l": tarfile.SYMTYPE, "h": tarfile.LNKTYPE, "s": b"7"}
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for number, (length, size, what) in enumerate(members):
            name = "/".join(f"é{number}" + "n" * min(60, length) for _ in range(1 + length // 60))
            info = tarfile.TarInfo(name[:90] if form == tarfile.USTAR_FORMAT else name)
            info.type = types[what]
            info.size = size if what in "fs" else 0
            info.linkname = "target" * 30 if what in "lh" and form != tarfile.USTAR_FORMAT else ""
            tar.addfile(info, io.BytesIO(bytes(size)) if what in "fs" else None)
    with tarfile.open(fileobj=io.BytesIO(stream.getvalue())) as tar:
        expected = [(it.name, it.isreg(), it.offset_data, it.size) for it in tar.getmembers()]
    found = [(name.removesuffix("/"), *rest) for name, *rest in hand_read(stream.getvalue(), near)]
    assert found == expected


def test_a_size_in_base_256_and_an_archive_without_an_end_are_read() -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = 3
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + (3).to_bytes(11, "big")
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 256)
    assert hand_read(bytes(header) + b"abc") == [("a.jpg", True, 512, 3)]


def test_headers_of_large_members_are_read_without_the_members() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number in range(5):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = 1 << 20
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    data, moved = stream.getvalue(), []

    def read(start: int, stop: int) -> bytes:
        moved.append(stop - start)
        return data[start:stop]

    assert len(list(read_members(Window(read, len(data), 4096, 1024), "tar"))) == 5
    assert sum(moved) < 20_000


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=40), st.integers(0, 5000))
def test_a_damaged_tar_is_refused_or_read_but_nothing_else(noise: bytes, place: int) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.jpg", "é" * 80 + ".jpg"):
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(bytes(700)))
    data = bytearray(stream.getvalue())
    data[place : place + len(noise)] = noise
    with contextlib.suppress(CorpusError, UnicodeDecodeError):  # the latter of the test's own
        hand_read(bytes(data))


# Samples


def test_samples_are_members_that_share_their_path_up_to_the_first_dot(tmp_path: Path) -> None:
    members = [
        ("a/0.jpg", PIXEL),
        ("a/0.cls", b"4"),
        ("a/0.txt", b"words"),
        ("./b/1.PNG", PIXEL),
        ("b/1.cls", b" 2\n"),
        ("b/2.left.jpg", PIXEL),
        ("b/.hidden.jpg", PIXEL),
        ("nodot", b"x"),
    ]
    corpus = opened(write_tar(tmp_path / "x.tar", members))
    assert keys(corpus) == ["a/0", "b/1"]
    assert (corpus.kind, corpus.sample_kind, corpus.class_names, corpus.num_ignored) == ("webdataset", "image", None, 3)
    assert np.asarray(corpus.hard_targets).tolist() == [4, 2]
    assert corpus.read_raw(1) == PIXEL
    assert corpus.decode(corpus.read_raw(0)).shape == (2, 2, 1)


def test_members_of_a_sample_may_lie_apart(tmp_path: Path) -> None:
    members = [("0.jpg", PIXEL), ("1.jpg", PIXEL), ("1.cls", b"1"), ("0.cls", b"0")]
    corpus = opened(write_tar(tmp_path / "x.tar", members))
    assert np.asarray(corpus.hard_targets).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        ({"json": b'{"label": 3}'}, [3, 3]),
        ({"json": b'{"cls": 3, "caption": "dog"}'}, [3, 3]),
        ({"json": b'{"label": 3}', "cls": b"1"}, [1, 1]),
        ({"cls": b"-1"}, [-1, -1]),
        ({"json": b'{"label": true}'}, None),
        ({"json": b'{"label": 1e400}'}, None),
        ({"json": b"[" * 100_000}, None),
        ({"json": b'{"label": ' + b"9" * 5000 + b"}"}, None),
        ({"json": b"not JSON"}, None),
        ({"txt": b"3"}, None),
        ({}, None),
    ],
)
def test_classes_come_from_cls_or_json(tmp_path: Path, beside: dict[str, bytes], expected: list[int] | None) -> None:
    members = [(f"{n}.{extension}", data) for n in "01" for extension, data in ({"jpg": PIXEL} | beside).items()]
    corpus = opened(write_tar(tmp_path / "x.tar", members))
    found = corpus.hard_targets
    assert (None if found is None else found.tolist()) == expected


def test_one_sample_without_a_class_and_there_are_none(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("0.jpg", PIXEL), ("0.cls", b"1"), ("1.jpg", PIXEL), ("1.cls", b"1")])
    assert opened(tmp_path / "a.tar").hard_targets is not None
    write_tar(tmp_path / "b.tar", [("2.jpg", PIXEL)])
    assert opened(tmp_path).hard_targets is None


@pytest.mark.parametrize("text", [b"dog", b"1.5", b"-2", b"3000000000", b"", b"1" * 100])
def test_a_class_that_is_no_class_number_is_refused_and_can_be_ignored(tmp_path: Path, text: bytes) -> None:
    path = write_tar(tmp_path / "x.tar", [("0.jpg", PIXEL), ("0.cls", text)])
    with pytest.raises(
        CorpusError, match=r"expected a class number from 0 .* in '0.cls', got '.*'; mend it, or ignore"
    ):
        opened(path)
    assert opened(path, labels="none").hard_targets is None


def test_hard_targets_come_from_a_file_instead(tmp_path: Path) -> None:
    np.save(tmp_path / "y.npy", np.array([5, 6]))
    path = write_tar(tmp_path / "x.tar", [("0.jpg", PIXEL), ("1.jpg", PIXEL), ("0.cls", b"bad")])
    assert np.asarray(opened(path, labels=tmp_path / "y.npy").hard_targets).tolist() == [5, 6]


def test_arrays_are_samples_too(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(">f4")
    members = [(f"{n}.npy", npy_bytes(np.asfortranarray(row) if n % 2 else row)) for n, row in enumerate(rows)]
    corpus = opened(write_tar(tmp_path / "x.tar", members))
    assert corpus.sample_kind == "array"
    preprocess = default_preprocess(corpus)
    assert preprocess.shape == (2, 3)
    np.testing.assert_array_equal(read_batch(corpus, range(5), preprocess).inputs, rows)


def test_an_array_of_another_shape_is_refused_alone(tmp_path: Path) -> None:
    members = [("0.npy", npy_bytes(np.zeros(3))), ("1.npy", npy_bytes(np.zeros(4)))]
    corpus = opened(write_tar(tmp_path / "x.tar", members))
    batch = read_batch(corpus, [0, 1], default_preprocess(corpus))
    assert batch.errors == {1: "expected a row of shape (3,), got (4,); mend the sample"}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.jpg", PIXEL), ("0.png", PIXEL)], "expected one image a sample, got a second one for '0': '0.png'; give"),
        ([("0.jpg", PIXEL), ("0.jpg", PIXEL)], "expected one image a sample, got a second one for '0': '0.jpg'; give"),
        ([("0.npy", b""), ("0.npy", b"")], "expected one array a sample, got a second one for '0': '0.npy'; give each"),
        (
            [("0.jpg", PIXEL), ("1.npy", b"")],
            r"expected samples of one kind, got images \('0'\) and arrays \('1'\); give tars of one kind",
        ),
        (
            [("0.txt", b"x"), ("1.left.jpg", b"x")],
            r"expected samples \(NAME.jpg, .png, .webp or .npy\), got 2 other member\(s\), for example '0.txt'; give",
        ),
        ([], r"expected samples \(NAME.jpg, .png, .webp or .npy\), got 0 other member\(s\); give tars of samples"),
    ],
)
def test_tars_that_do_not_make_samples_are_refused(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    with pytest.raises(CorpusError, match=message):
        opened(write_tar(tmp_path / "x.tar", members))


def test_tars_of_two_kinds_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("0.jpg", PIXEL)])
    write_tar(tmp_path / "b.tar", [("0.npy", npy_bytes(np.zeros(3)))])
    with pytest.raises(CorpusError, match=r"b.tar': expected samples of one kind, got arrays after images in .*a.tar'"):
        opened(tmp_path)


# Files


def test_rows_go_on_from_tar_to_tar(tmp_path: Path) -> None:
    corpus = opened(write_tars(tmp_path))
    assert keys(corpus) == [f"{number:06d}" for number in range(12)]
    raws = corpus.read_raws(np.array([11, 0, 5, 4, 0]))
    assert raws == [image_bytes(random_pixels(8, 8, 3, seed=number)) for number in (11, 0, 5, 4, 0)]
    assert open_corpus(tmp_path / "train-{000..002}.tar").fingerprint == corpus.fingerprint
    assert open_corpus(str(tmp_path / "*.tar")).fingerprint == corpus.fingerprint
    assert open_corpus(tmp_path / "train-000.tar").num_samples == 4


def test_an_empty_tar_among_others_has_no_rows(tmp_path: Path) -> None:
    write_tars(tmp_path)
    write_tar(tmp_path / "train-001.tar", [])
    corpus = opened(tmp_path)
    assert keys(corpus) == [f"{number:06d}" for number in (0, 1, 2, 3, 7, 8, 9, 10, 11)]
    assert corpus.part(2, 7).read_raw(5) == corpus.read_raw(5)


def test_the_fingerprint_tells_other_names_sizes_and_members_apart(tmp_path: Path) -> None:
    prints = {opened(write_tars(tmp_path / "a")).fingerprint, opened(write_tars(tmp_path / "same")).fingerprint}
    assert len(prints) == 1
    (tmp_path / "a" / "train-002.tar").rename(tmp_path / "a" / "train-003.tar")
    prints.add(opened(tmp_path / "a").fingerprint)
    prints.add(opened(tmp_path / "a", files=["train-000.tar", "train-001.tar"]).fingerprint)
    prints.add(opened(tmp_path / "a", files=["train-001.tar", "train-000.tar"]).fingerprint)
    data = (tmp_path / "same" / "train-000.tar").read_bytes()
    info = tarfile.TarInfo("000009.png")
    info.size = len(PIXEL)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        info.size = tar.getmembers()[0].size
    changed = bytearray(data)
    changed[:512] = info.tobuf(tarfile.USTAR_FORMAT)
    (tmp_path / "same" / "train-000.tar").write_bytes(changed)
    prints.add(opened(tmp_path / "same", labels="none").fingerprint)
    assert len(prints) == 5


def test_hard_targets_are_no_part_of_the_fingerprint(tmp_path: Path) -> None:
    prints = set()
    for label in (b"1", b"2"):
        prints.add(opened(write_tar(tmp_path / "x.tar", [("0.jpg", PIXEL), ("0.cls", label)])).fingerprint)
    assert len(prints) == 1


def test_splits_that_are_given_as_one_corpus_are_refused(tmp_path: Path) -> None:
    for name in ("train-0.tar", "val-0.tar"):
        write_tar(tmp_path / name, [("0.jpg", PIXEL)])
    with pytest.raises(CorpusError, match=r"expected files of one split, got train, val; give a pattern .*'.*/val\*'"):
        opened(tmp_path)
    assert opened(tmp_path, files=["val-0.tar", "train-0.tar"]).num_samples == 2


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_packed_tar_is_refused_whatever_its_name(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.jpg", PIXEL)])
    path.write_bytes(pack(path.read_bytes()))
    with pytest.raises(CorpusError, match=r"expected a plain .tar, .* got one that is packed with .*; unpack it to a"):
        opened(tmp_path / "x.tar")


def test_damage_is_named_with_file_and_offset_and_what_is_before_it_can_be_kept(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", image_members(0, 3), tarfile.USTAR_FORMAT)
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2]
    whole = path.read_bytes()
    for damaged in (whole[: third.offset_data + 10], whole[: third.offset + 5], whole[: third.offset] + b"x" * 5000):
        path.write_bytes(damaged)
        with pytest.raises(
            CorpusError, match=rf"x.tar': expected .* at byte {third.offset}, got .*; the 2 members befo"
        ):
            opened(path)
        os.truncate(path, third.offset)
        assert opened(path).num_samples == 2
    path.write_bytes(b"something")
    with pytest.raises(
        CorpusError, match="expected a header of 512 bytes at byte 0, got 9 bytes: it is no tar, damaged"
    ):
        opened(path)


def test_a_tar_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "TABLE_BYTES", 0)
    corpus = pickle.loads(pickle.dumps(opened(write_tars(tmp_path))))
    size = (tmp_path / "train-001.tar").stat().st_size
    os.truncate(write_tar(tmp_path / "train-001.tar", image_members(20, 21)), size)
    assert corpus.key(0) == "000000"
    with pytest.raises(
        CorpusError, match=r"train-001.tar': expected the members that it had when it was opened, got oth"
    ):
        corpus.key(5)
    (tmp_path / "train-002.tar").unlink()
    with pytest.raises(CorpusError, match=r"train-002.tar': expected a file that can be read, got 'No such file"):
        corpus.key(10)


def test_tables_that_do_not_fit_are_read_again(tmp_path: Path) -> None:
    corpus = opened(write_tars(tmp_path, [5] * 10))
    table = corpus.tables.table(0)
    small = tar_tables.ReadTables(corpus.files, corpus.shards, 2 * table.num_bytes)
    for index in (*range(10), *range(10)):
        assert small.table(index).digest() == corpus.shards.digests[index]
    assert small.table(9) is small.table(9)
    assert small._num_bytes <= 2 * table.num_bytes


def test_a_part_carries_the_index_of_its_rows_only(tmp_path: Path) -> None:
    corpus = opened(write_tars(tmp_path, [50, 50, 50], size=2))
    for start, stop in ((0, 1), (49, 51), (30, 150), (50, 100)):
        part = pickle.loads(pickle.dumps(corpus.part(start, stop)))
        np.testing.assert_array_equal(sample_digests(part, start, stop), sample_digests(corpus, start, stop))
        assert [part.key(row) for row in range(start, stop)] == keys(corpus)[start:stop]
        found = hard_targets_at(part, np.arange(start, stop))
        assert np.array_equal(np.asarray(found), np.asarray(corpus.hard_targets)[start:stop])
    one, all_rows = len(pickle.dumps(corpus.part(60, 61))), len(pickle.dumps(corpus.part(0, 150)))
    assert one < 2500 < all_rows


def test_progress_is_told_of_each_file(tmp_path: Path) -> None:
    class Told:
        count = 0

        def advance(self, count: int) -> None:
            self.count += count

    told = Told()
    open_corpus(write_tars(tmp_path), progress=told)
    assert told.count == 3


# Behind a URL


def test_tars_behind_a_url_are_the_corpus_that_they_are_on_disk(s3: S3Server, tmp_path: Path) -> None:
    local, url = opened(write_tars(tmp_path)), s3.url("tars")
    upload(tmp_path, url)
    paths = [url, f"{url}/train-*.tar", f"{url}/train-{{000..002}}.tar", s3.http(f"{url}/train-{{000..002}}.tar")]
    for path in paths:
        remote = pickle.loads(pickle.dumps(opened(path)))
        assert (remote.fingerprint, remote.path, remote.num_ignored) == (local.fingerprint, path, 0)
        np.testing.assert_array_equal(np.asarray(remote.hard_targets), np.asarray(local.hard_targets))
        np.testing.assert_array_equal(sample_digests(remote, 0, 12), sample_digests(local, 0, 12))
    part = pickle.loads(pickle.dumps(remote.part(3, 8)))
    assert [sample_digest(part.read_raw(row)) for row in range(3, 8)] == sample_digests(local, 3, 8).tolist()
    with pytest.raises(CorpusError, match=r"expected the file 'train-003.tar', which it names, got nothing there"):
        opened(f"{url}/train-{{002..003}}.tar")


def test_a_tar_behind_a_url_is_read_in_order_once(s3: S3Server, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", image_members(0, 200, [1] * 200, size=24))
    url = s3.url("tars")
    upload(tmp_path, url)
    corpus = opened(f"{url}/a.tar")
    useful = sum(len(corpus.read_raw(row)) for row in range(200))
    before = s3.ask()
    sample_digests(corpus, 0, 200)
    after = s3.ask()
    assert (after["bytes"] - before["bytes"]) / useful < 2  # headers, padding and classes of small members
    assert after["requests"] - before["requests"] < 8


def test_connections_that_are_cut_and_servers_that_fail_cost_no_row(s3: S3Server, tmp_path: Path) -> None:
    local, url = opened(write_tars(tmp_path)), s3.url("tars")
    upload(tmp_path, url)
    for faults in ({"cut": 2}, {"fail": 2, "status": 503}):
        s3.ask(method="GET", **faults)
        remote = opened(f"{url}/train-{{000..002}}.tar")
        assert remote.fingerprint == local.fingerprint
        s3.ask(method="GET", **faults)
        np.testing.assert_array_equal(sample_digests(remote, 0, 12), sample_digests(local, 0, 12))


# What is hostile


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_members_that_are_no_plain_files_below_the_folder_are_no_samples(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(PIXEL)
    path = tmp_path / "tars" / "x.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name in ("../secret.jpg", "a/../../secret.jpg", "/etc/passwd.jpg", str(tmp_path / "secret.jpg")):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
        tar.addfile(link("1.jpg", "../secret.jpg"))
        tar.addfile(link("2.jpg", "/etc/passwd"))
        tar.addfile(link("3.jpg", "../secret.jpg", tarfile.LNKTYPE))
        for number, kind_ in enumerate((tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)):
            tar.addfile(link(f"device{number}.jpg", "", kind_))
        info = tarfile.TarInfo("good.jpg")
        info.size = len(PIXEL)
        tar.addfile(info, io.BytesIO(PIXEL))
    there = sorted(tmp_path.rglob("*"))
    corpus = opened(path)
    assert (keys(corpus), corpus.num_ignored) == (["good"], 10)
    sample_digests(corpus, 0, 1)
    assert sorted(tmp_path.rglob("*")) == there


@pytest.mark.parametrize("size", [10**15, 2**62, 8**11 - 1])
def test_a_member_that_claims_more_than_the_file_is_refused(tmp_path: Path, size: int) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = size
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        (tmp_path / "x.tar").write_bytes(info.tobuf(form) + bytes(2048))
        with pytest.raises(
            CorpusError, match=rf"expected {size} bytes of a member at byte \d+, got \d+ bytes: it is no"
        ):
            opened(tmp_path / "x.tar")


def test_a_member_that_is_larger_than_any_sample_is_refused_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.tar"
    info = tarfile.TarInfo("big.jpg")
    info.size = 600 << 20
    with path.open("wb") as file:
        file.write(info.tobuf())
        file.seek(512 + info.size)
        small = tarfile.TarInfo("small.jpg")
        small.size = len(PIXEL)
        file.write(small.tobuf() + PIXEL)
    corpus = opened(path)
    digests = sample_digests(corpus, 0, 2)
    assert digests.tolist() == [0, sample_digest(PIXEL)]
    with pytest.raises(
        SampleError, match=r"expected at most 536870912 bytes, got a member of 629145600; make the sample"
    ):
        corpus.read_raw(0)


def gnu_long(size: int) -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gnu_long(2 << 20) + bytes(4 << 20), "expected at most 1048576 bytes of a long name at byte 0"),
        (lambda: pax(b"99 path=a\n"), "expected a pax header of 'LENGTH KEY=VALUE' lines at byte 0, got another"),
        (lambda: pax(b"x path=a\n"), "expected a pax header of 'LENGTH KEY=VALUE' lines at byte 0, got another"),
        (lambda: pax(b"0 path=a\n"), "expected a pax header of 'LENGTH KEY=VALUE' lines at byte 0, got another"),
        (lambda: pax(b"11 size=-5\n"), "expected a number of bytes in a pax header at byte 0, got another text"),
        (lambda: pax(b"30 size=" + b"9" * 21 + b"\n"), "expected a number of bytes in a pax header at byte 0"),
        (lambda: negative(), "expected the size of a member at byte 0, got no number"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, make: Callable[[], bytes], message: str) -> None:
    (tmp_path / "x.tar").write_bytes(make())
    with pytest.raises(CorpusError, match=message):
        opened(tmp_path / "x.tar")


def pax(records: bytes) -> bytes:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    return info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0") + tarfile.TarInfo("a.jpg").tobuf()


def negative() -> bytes:
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 12
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 256)
    return bytes(header)


def test_sparse_files_are_no_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("hole.jpg")
        info.size, info.pax_headers = 3, {"GNU.sparse.realsize": "1000000000000"}
        tar.addfile(info, io.BytesIO(b"abc"))
        info = tarfile.TarInfo("a.jpg")
        info.size = len(PIXEL)
        tar.addfile(info, io.BytesIO(PIXEL))
    corpus = opened(tmp_path / "x.tar")
    assert (keys(corpus), corpus.num_ignored) == (["a"], 1)


def test_keys_can_t_carry_escape_sequences(tmp_path: Path) -> None:
    corpus = opened(write_tar(tmp_path / "x.tar", [("a\x1b[2J\nb.jpg", PIXEL), ("é日.jpg", PIXEL)]))
    assert keys(corpus) == ["a\\x1b[2J\\nb", "é日"]


def png_bomb() -> bytes:
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_bombs_pickles_and_arrays_that_claim_too_much_are_refused_alone(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.system, (f"touch {tmp_path}/ran",)

    stream = io.BytesIO()
    np.save(stream, np.array([Evil()], object), allow_pickle=True)
    claims = io.BytesIO()
    np.lib.format.write_array_header_1_0(claims, {"descr": "<f8", "fortran_order": False, "shape": (10**12, 10**3)})
    nested = b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + (b"(" * 9000)
    long = b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little") + b"{"
    bad = [stream.getvalue(), pickle.dumps(Evil()), claims.getvalue(), nested, long, b"", npy_bytes(np.array(["a"]))]
    members = [(f"{number}.npy", raw) for number, raw in enumerate(bad)] + [("z.npy", npy_bytes(np.zeros(3)))]
    corpus = opened(write_tar(tmp_path / "arrays.tar", members))
    batch = read_batch(corpus, range(8), default_preprocess(corpus))
    assert sorted(batch.errors) == list(range(7))
    assert "pickled Python objects, which are not read" in batch.errors[0]
    assert "expected 8000000000000000 bytes for the shape" in batch.errors[2]
    assert not (tmp_path / "ran").exists()
    write_tar(tmp_path / "images.tar", [("0.png", png_bomb()), ("1.png", image_bytes(random_pixels(4, 4, 3)))])
    corpus = opened(tmp_path / "images.tar")
    batch = read_batch(corpus, [0, 1], default_preprocess(corpus, 4))
    assert list(batch.errors) == [0]
    assert "expected at most 89478485 pixels, got more" in batch.errors[0]


def test_a_large_json_beside_an_image_is_not_read(tmp_path: Path) -> None:
    text = json.dumps({"label": 1, "more": "x" * (1 << 20)}).encode()
    corpus = opened(write_tar(tmp_path / "x.tar", [("0.jpg", PIXEL), ("0.json", text)]))
    assert corpus.hard_targets is None
