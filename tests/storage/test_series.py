"""A series of stores, read as one."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from storage.cli import main
from storage.errors import DamageError, FormatVersionError, MismatchError, NotSealedError, PathError
from storage.info import info, info_text
from storage.layout import Layout, from_ranges
from storage.reader import open_one_store, open_store
from storage.records import signed
from storage.scan import stats, verify
from storage.series import Series, is_series
from storage.series_layout import SeriesLayout
from storage.series_records import (
    SERIES,
    CoveredFile,
    FilesRecord,
    FolderRecords,
    SeriesRecord,
    files_name,
    left_out_places,
    read_files_record,
    read_series_record,
    series_digest,
)
from studenttrain.order import EpochOrder
from tests.series import write_member, write_series


@pytest.fixture(scope="module")
def series_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three members of 20, 3 and 16 rows in shards of 8; row 1 of the first and row 0 of the second are refused."""
    folder = tmp_path_factory.mktemp("series") / "series"
    write_series(folder, [20], refused=[1])
    write_member(folder, 1, 3, refused=[0])
    write_member(folder, 2, 16)
    return folder


layouts = st.lists(
    st.builds(
        lambda rows, chunk, chunks: Layout(rows, chunk * chunks, chunk),
        st.integers(1, 60),
        st.integers(1, 4),
        st.integers(1, 4),
    ),
    min_size=1,
    max_size=5,
)


@given(layouts)
def test_every_row_of_a_series_is_in_just_one_chunk_of_just_one_shard(members: list[Layout]) -> None:
    layout = SeriesLayout(tuple(members))
    rows: list[int] = []
    for shard in range(layout.num_shards):
        start, stop = layout.shard_bounds(shard)
        assert layout.shard_of(start) == layout.shard_of(stop - 1) == shard
        for chunk in range(layout.num_chunks(shard)):
            first, end = layout.chunk_bounds(shard, chunk)
            assert start <= first < end <= stop
            rows += range(first, end)
    assert rows == list(range(layout.num_rows))


@given(layouts, st.data())
def test_split_of_a_series_gives_each_row_of_a_range_once_with_its_shard(
    members: list[Layout], data: st.DataObject
) -> None:
    layout = SeriesLayout(tuple(members))
    start = data.draw(st.integers(0, layout.num_rows))
    stop = data.draw(st.integers(start, layout.num_rows))
    pieces = list(layout.split(start, stop))
    assert [row for _, first, end in pieces for row in range(first, end)] == list(range(start, stop))
    assert all(layout.shard_of(first) == shard == layout.shard_of(end - 1) for shard, first, end in pieces)


@given(layouts)
def test_numbers_never_change_when_a_member_is_added(members: list[Layout]) -> None:
    before, after = SeriesLayout(tuple(members)), SeriesLayout((*members, Layout(7, 4, 2)))
    assert after.num_rows == before.num_rows + 7
    assert [before.shard_bounds(shard) for shard in range(before.num_shards)] == [
        after.shard_bounds(shard) for shard in range(before.num_shards)
    ]


def test_a_series_layout_refuses_what_is_outside() -> None:
    layout = SeriesLayout((Layout(5, 4, 2), Layout(6, 4, 2)))
    with pytest.raises(ValueError, match="members: expected at least one"):
        SeriesLayout(())
    with pytest.raises(ValueError, match="shard: expected 0 to 3, got 4"):
        layout.shard_bounds(4)
    with pytest.raises(ValueError, match="row: expected 0 to 10, got 11"):
        layout.shard_of(11)
    with pytest.raises(ValueError, match=r"rows: expected a range inside \[0, 11\), got \[3, 12\)"):
        list(layout.split(3, 12))


@given(layouts, st.integers(0, 9))
def test_an_epoch_of_a_series_gives_each_row_once(members: list[Layout], epoch: int) -> None:
    layout = SeriesLayout(tuple(members))
    order = EpochOrder(layout, ((0, layout.num_shards),), 3, epoch, 4, 3)
    assert sorted(order.rows(0, order.num_rows).tolist()) == list(range(layout.num_rows))


def test_rows_of_a_series_are_those_of_its_members_in_order(series_folder: Path) -> None:
    names = ["values", "sample_digest", "status"]
    parts = []
    for member in range(3):
        with open_one_store(series_folder / f"{member:06d}.zarr") as store:
            parts.append(store.read(names, 0, store.manifest.num_rows))
    with open_store(series_folder) as series:
        assert series.manifest.num_rows == 39
        assert series.layout.num_shards == 6
        assert series.sealed_shards() == (0, 1, 2, 3, 4, 5)
        for start, stop in ((0, 39), (5, 22), (20, 23), (22, 24), (7, 7)):
            found = series.read(names, start, stop)
            for name in names:
                np.testing.assert_array_equal(found[name], np.concatenate([part[name] for part in parts])[start:stop])
        out = {"values": np.empty((39, 4), np.float32)}
        series.read(["values"], 0, 39, out)
        np.testing.assert_array_equal(out["values"], np.concatenate([part["values"] for part in parts]))


def test_scattered_rows_of_a_series_are_those_that_are_read_in_order(series_folder: Path) -> None:
    with open_store(series_folder) as series:
        whole = series.read(["values"], 0, 39)["values"]
        ranges = [(0, 4), (16, 20), (20, 23), (27, 31), (31, 33)]
        rows = np.concatenate([np.arange(*pair) for pair in ranges])
        positions = np.random.default_rng(0).permutation(len(rows))
        out = np.empty((len(rows), 4), np.float32)
        series.read_scattered("values", ranges, out, positions)
        np.testing.assert_array_equal(out[positions], whole[rows])


def test_seals_and_quarantine_of_a_series_have_its_own_numbers(series_folder: Path) -> None:
    with open_store(series_folder) as series:
        assert [entry.row for entry in series.quarantine()] == [1, 20]
        assert series.num_quarantined == 2
        seal = series.seal(3)
        assert (seal.shard, seal.start, seal.stop, [entry.row for entry in seal.quarantine]) == (3, 20, 23, [20])
        assert series.check_shard(3) == seal
        series.check_objects(seal)
        with pytest.raises(ValueError, match="names: expected one of"):
            series.read(["nothing"], 0, 39)


def test_a_series_is_opened_again_where_it_is_unpickled(series_folder: Path) -> None:
    with open_store(series_folder) as series, pickle.loads(pickle.dumps(series)) as again:
        assert isinstance(again, Series)
        assert again.content_digest == series.content_digest


def test_the_digest_of_a_series_is_made_of_those_of_its_members(series_folder: Path) -> None:
    digests = []
    for member in range(3):
        with open_one_store(series_folder / f"{member:06d}.zarr") as store:
            digests.append(str(store.content_digest))
    with open_store(series_folder) as series:
        assert isinstance(series, Series)
        assert series.content_digest == series_digest(digests)
        assert series.digest_of(2) == series_digest(digests[:2])
        assert series.digest_of(4) is None


def test_refresh_sees_what_was_added_and_sealed(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series", [20])
    with open_store(folder) as series:
        assert isinstance(series, Series)
        series.refresh()
        assert series.manifest.num_rows == 20
        write_member(folder, 1, 20, shards=[], finalize=False)  # begun, nothing sealed
        series.refresh()
        assert series.manifest.num_rows == 20
        shutil.rmtree(folder / "000001.zarr")
        write_member(folder, 1, 20, shards=[1], finalize=False)
        series.refresh()
        assert (series.manifest.num_rows, series.sealed_shards()) == (40, (0, 1, 2, 4))
        assert (series.finalized, series.content_digest, series.num_finalized) == (False, None, 1)
        write_member(folder, 1, 20)
        write_member(folder, 2, 4)
        assert series.sealed_shards() == (0, 1, 2, 3, 4, 5)  # of the members that are known
        series.refresh()
        assert (series.manifest.num_rows, series.sealed_shards()) == (44, (0, 1, 2, 3, 4, 5, 6))
        assert series.content_digest is not None


def test_files_that_hold_nothing_new_take_a_number_but_no_rows(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series", [20])
    nothing = FilesRecord(1, (CoveredFile("again.npz", 7, "1"),), 0, ((0, 20),), "key")
    FolderRecords(folder).put_new(files_name(1), nothing.to_bytes())
    with open_store(folder) as series:
        write_member(folder, 2, 3)
        series.refresh()
        assert series.manifest.num_rows == 23
    assert verify(folder).ok


@pytest.mark.parametrize("suffix", [".zarr", ".h5"])
def test_a_series_grows_while_its_members_are_written(tmp_path: Path, suffix: str) -> None:
    folder = write_series(tmp_path / "series", [20], suffix=suffix, shards=[0], finalize=False)
    with open_store(folder) as series:
        first = series.read(["values"], 0, 8)["values"]
        write_member(folder, 0, 20, suffix=suffix)
        write_member(folder, 1, 20, suffix=suffix)
        series.refresh()
        assert series.sealed_shards() == (0, 1, 2, 3, 4, 5)
        np.testing.assert_array_equal(series.read(["values"], 0, 40)["values"][:8], first)


def test_info_says_that_it_is_a_series(series_folder: Path) -> None:
    figures = info(series_folder)
    assert [member["num_rows"] for member in figures["members"]] == [20, 3, 16]
    assert (figures["num_rows"], figures["num_quarantined"], figures["num_shards"]) == (39, 2, 6)
    text = info_text(figures)
    assert "a series of 3 stores, each finalized; more may follow" in text
    assert "members   3 files of the corpus" in text


def test_info_names_the_member_that_is_not_finished(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series", [20])
    write_member(folder, 1, 20, shards=[0], finalize=False, left_out=((3, 5),))
    text = info_text(info(folder))
    assert "000001.zarr is not finished: the same teacherdump run --follow goes on with it" in text
    assert "2 files of the corpus, 2 samples left out" in text


def test_stats_of_a_series_are_those_of_its_rows(series_folder: Path) -> None:
    figures = stats(series_folder)
    parts = [stats(series_folder / f"{member:06d}.zarr") for member in range(3)]
    assert figures.num_sealed_rows == 39
    assert list(figures.top1_counts) == np.sum([part.top1_counts for part in parts], axis=0).tolist()
    assert sorted((item.num_rows, item.row) for item in figures.refused) == [(2, 1)]
    assert figures.bytes_by_array["values"] == sum(part.bytes_by_array["values"] for part in parts)


def test_verify_checks_every_member_of_a_series(series_folder: Path, tmp_path: Path) -> None:
    good = verify(series_folder)
    with open_store(series_folder) as series:
        assert (good.ok, good.content_digest, good.num_rows) == (True, series.content_digest, 39)
    assert (good.num_shards, good.num_sealed_rows, good.missing_rows) == (6, 39, ())
    folder = tmp_path / "series"
    shutil.copytree(series_folder, folder)
    shard = folder / "000002.zarr" / "values" / "c" / "1" / "0"
    shard.write_bytes(shard.read_bytes()[:-30] + bytes(30))
    bad = verify(folder)
    assert {damage.shard for damage in bad.damage} == {5}
    assert "000002.zarr" in bad.damage[0].message
    result = CliRunner().invoke(main, ["verify", str(folder)])
    assert result.exit_code == 1, result.output


def test_verify_says_what_is_wrong_with_the_records_of_a_series(series_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "series"
    shutil.copytree(series_folder, folder)
    record = folder / files_name(1)
    record.write_bytes(record.read_bytes().replace(b"1001", b"1002"))
    assert "expected its checksum to hold" in verify(folder).damage[0].message
    with pytest.raises(DamageError, match="expected its checksum to hold"):
        open_store(folder)
    (folder / SERIES).write_bytes(b"{}")
    assert "nothing else could be checked" in verify(folder).notes[0]


def test_a_member_that_is_missing_is_damage(series_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "series"
    shutil.copytree(series_folder, folder)
    shutil.rmtree(folder / "000001.zarr")
    with pytest.raises(
        DamageError, match=r"000001.zarr: expected a finalized store, since member 2 is there behind it"
    ):
        open_store(folder)
    assert not verify(folder).ok


def test_a_member_that_vanishes_while_the_series_is_read_is_damage(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series", [20])
    write_member(folder, 1, 20, shards=[0], finalize=False)
    with open_store(folder) as series:
        shutil.rmtree(folder / "000001.zarr")
        with pytest.raises(DamageError, match="expected 2 members, as before, got 1"):
            series.refresh()


def test_members_must_be_of_one_teacher_and_as_large_as_their_record_says(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "other", [20])
    write_member(folder, 1, 20, teacher="1")
    with pytest.raises(MismatchError, match=r"expected a member of the series .*: teacher: the series has"):
        open_store(folder)
    assert "teacher: the series has" in verify(folder).damage[0].message
    folder = write_series(tmp_path / "short", [20])
    path = write_member(folder, 1, 20)
    (folder / files_name(1)).unlink()
    FolderRecords(folder).put_new(files_name(1), FilesRecord(1, (), 21).to_bytes())
    with pytest.raises(MismatchError, match=f"{path}: expected 21 rows, as the record of its files says, got 20"):
        open_store(folder)


def test_a_series_with_nothing_sealed_says_to_wait(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series", [20], shards=[], finalize=False)
    with pytest.raises(NotSealedError, match="expected a series with a sealed shard, got none yet; wait until"):
        open_store(folder)
    assert verify(folder).notes == ("no member is there yet",) or verify(folder).ok


def test_where_one_store_is_needed_a_series_is_refused(series_folder: Path, tmp_path: Path) -> None:
    expected = "expected one store, got a series of 3; give one of its members, such as .*000000.zarr"
    with pytest.raises(PathError, match=expected):
        open_one_store(series_folder)
    with open_store(series_folder) as series, pytest.raises(PathError, match=expected):
        _ = series.backend
    for arguments in (["finalize", series_folder], ["convert", series_folder, tmp_path / "new.zarr"]):
        before = sorted(path.name for path in series_folder.iterdir())
        result = CliRunner().invoke(main, [str(word) for word in arguments])
        assert result.exit_code == 1, result.output
        assert "expected one store, got a series of 3" in result.output
        assert sorted(path.name for path in series_folder.iterdir()) == before
    with pytest.raises(PathError, match="got no such path"):
        open_one_store(tmp_path / "nothing")


def test_a_store_is_no_series(series_folder: Path) -> None:
    assert is_series(series_folder)
    assert not is_series(series_folder / "000000.zarr")
    with open_store(series_folder / "000000.zarr") as store:
        store.refresh()
        assert store.members == (store,)


def test_records_come_back_as_they_were_written() -> None:
    files = (CoveredFile("a/b.tar", 12, "34"), CoveredFile("é\udc80.tar", 0, ""))
    record = FilesRecord(4, files, 5, ((0, 2), (3, 4)), "digest")
    again = FilesRecord.from_bytes(record.to_bytes(), "here", 4)
    assert again == record
    assert (again.num_left_out, again.num_samples, left_out_places(again)) == (3, 8, [0, 1, 3])
    assert from_ranges(again.left_out) == [0, 1, 3]
    shared = SeriesRecord(".h5", {"num_classes": 3})
    assert SeriesRecord.from_bytes(shared.to_bytes(), "here") == shared


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"member": 5}, "expected the files of member 4, got others"),
        ({"num_rows": -1}, "expected the files of member 4, got others"),
        ({"left_out": [[3, 2]]}, "expected the files of member 4, got others"),
        ({"left_out": [[-1, 2]]}, "expected the files of member 4, got others"),
        ({"files": [["../x", 1, ""]]}, "expected files of the corpus, got '../x', which is elsewhere"),
        ({"files": [["/etc/x", 1, ""]]}, "expected files of the corpus, got '/etc/x', which is elsewhere"),
        ({"files": [["x"]]}, "expected a record of files, got"),
        ({"more": 1}, "expected a record of files, got"),
    ],
)
def test_a_record_of_files_that_can_not_be_is_refused(change: dict[str, object], error: str) -> None:
    value = json.loads(FilesRecord(4, (CoveredFile("x", 1, ""),), 5).to_bytes()) | change
    del value["record_sha256"]
    with pytest.raises(DamageError, match=error):
        FilesRecord.from_bytes(signed(value), "here", 4)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"format": "logit-store"}, "expected the format 'logit-series'"),
        ({"suffix": "/../../x"}, "expected members in .zarr or .h5, got others"),
        ({"shared": 3}, "expected members in .zarr or .h5, got others"),
        ({"format_version": "2.0"}, r"expected format version 1.0, got 2.0; install a newer release"),
        ({"suffix": None}, "expected members in .zarr or .h5"),
    ],
)
def test_a_series_record_that_can_not_be_is_refused(change: dict[str, object], error: str) -> None:
    value = json.loads(SeriesRecord(".zarr", {}).to_bytes()) | change
    del value["record_sha256"]
    with pytest.raises((DamageError, FormatVersionError), match=error):
        SeriesRecord.from_bytes(signed(value), "here")
    del value["suffix"]
    value |= {"format": "logit-series", "format_version": "1.0"}
    with pytest.raises(DamageError, match="expected a series record, got none of 'suffix'"):
        SeriesRecord.from_bytes(signed(value), "here")


def test_a_record_larger_than_any_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / SERIES).open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(DamageError, match="expected at most"):
        read_series_record(FolderRecords(tmp_path), tmp_path)


def test_records_of_a_folder_are_created_once_and_can_be_removed(tmp_path: Path) -> None:
    records = FolderRecords(tmp_path)
    assert records.get("x") is None
    assert records.put_new("x", b"1")
    assert not records.put_new("x", b"2")
    records.put("x", b"3")
    assert records.get("x") == b"3"
    records.delete("x")
    records.delete("x")
    assert read_files_record(records, tmp_path, 0) is None
    assert dataclasses.is_dataclass(records)
