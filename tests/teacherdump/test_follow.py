"""A dump that follows a corpus: what arrives becomes the next store of a series."""

import json
import os
import shutil
import signal
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from storage.arrays import STATUS_OK, STATUS_UNDECODABLE
from storage.corpus import FileEntry
from storage.errors import CorpusError, CorpusMismatchError, DamageError, MismatchError, PathError, TeacherError
from storage.exclusive import sole_run
from storage.interruption import Interrupted, stop_requests
from storage.reader import open_one_store, open_store
from storage.scan import verify
from storage.series import Series
from storage.series_records import SERIES, CoveredFile, FilesRecord, files_name, keys_name
from storage.series_writer import SeriesWriter
from storage.writer import StoreWriter
from teacherdump.cli import main
from teacherdump.config import DumpConfig
from teacherdump.dedupe import Known
from teacherdump.follow import follow
from teacherdump.follow_files import Settling, changes, first_group
from teacherdump.follow_options import FollowOptions, FollowResult
from teacherdump.run import run
from tests.builders import image_bytes, random_pixels
from tests.s3 import S3Server
from tests.storage.corpus.tars import write_tar
from tests.teacherdump.conftest import save_weights

ARCH = "mlp:192-16-5"
QUICK = {"settle": 0.0, "poll": 0.02, "idle": 0.0}


class Killed(BaseException):
    """What ends a run at once, as a kill does."""


def write_images(folder: Path, start: int, stop: int) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(start, stop):
        (folder / f"{number:03d}.png").write_bytes(image_bytes(random_pixels(8, 8, 3, seed=number)))


def write_tar_of(path: Path, start: int, stop: int) -> None:
    write_tar(
        path, [(f"{number:03d}.png", image_bytes(random_pixels(8, 8, 3, seed=number))) for number in range(start, stop)]
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(tmp_path_factory.mktemp("teacher") / "teacher.pt", ARCH)


@pytest.fixture
def incoming(tmp_path: Path) -> Path:
    """30 images, with more to come."""
    write_images(tmp_path / "incoming", 0, 30)
    return tmp_path / "incoming"


Config = Callable[..., DumpConfig]


@pytest.fixture
def config(teacher: Path, incoming: Path, tmp_path: Path) -> Config:
    """A dump of what arrives, in shards of 8 rows."""

    def build(**options: Any) -> DumpConfig:
        given: dict[str, Any] = {"models": (str(teacher),), "arch": ARCH, "data": str(incoming), "device": "cpu"}
        given |= {"out": str(tmp_path / "series"), "batch_size": 4, "shard_rows": 8, "chunk_rows": 4, "readers": 1}
        return DumpConfig(**given | options)

    return build


def followed(config: DumpConfig, say: Callable[[str], object] = lambda _: None, **options: Any) -> FollowResult:
    """A run that ends as soon as there is nothing new."""
    return follow(config, FollowOptions(**{**QUICK, **options}), say)


def members(path: str) -> list[int]:
    """Rows of each member of a series, all of them finalized."""
    with open_store(path) as series:
        assert isinstance(series, Series)
        assert series.finalized
        return [record.num_rows for record in series.files]


def content(path: str) -> str:
    with open_store(path) as store:
        assert store.content_digest is not None
        return store.content_digest


def test_what_is_there_becomes_stores_of_whole_files(config: Config) -> None:
    said: list[str] = []
    result = followed(config(), said.append, member_rows=20)
    assert said == ["000000.zarr: 20 files, 20 rows", "000001.zarr: 10 files, 10 rows"]
    assert members(config().out) == [20, 10]
    assert (result.num_members, result.num_rows, result.num_new_rows, result.limit) == (2, 30, 30, None)
    assert "dumped 30 rows in" in result.summary()
    assert "2 stores, 30 rows\nnothing new came; run the same command again to go on" in result.summary()
    assert verify(config().out).ok
    assert followed(config(), member_rows=20).num_new_rows == 0
    assert members(config().out) == [20, 10]


def test_a_series_says_what_one_store_of_all_files_says(config: Config, tmp_path: Path) -> None:
    followed(config(), member_rows=16)
    run(config(out=str(tmp_path / "one.zarr")))
    with open_store(config().out) as series, open_store(tmp_path / "one.zarr") as one:
        names = [spec.name for spec in one.manifest.arrays]
        found, expected = series.read(names, 0, 30), one.read(names, 0, 30)
    for name in names:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize("suffix", [".zarr", ".h5"])
def test_files_that_arrive_meanwhile_become_the_next_store(config: Config, incoming: Path, suffix: str) -> None:
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 1:
            write_images(incoming, 30, 37)
            (incoming / "999.png.part").write_bytes(b"not yet")

    followed(config(), say, suffix=suffix)
    assert said == [f"000000{suffix}: 30 files, 30 rows", f"000001{suffix}: 7 files, 7 rows"]
    assert members(config().out) == [30, 7]


def test_a_file_counts_once_it_has_not_changed_for_long_enough() -> None:
    now = [0.0]
    settling = Settling(10, lambda: now[0])

    def at(seconds: float, *entries: FileEntry) -> list[str]:
        now[0] = seconds
        return [entry.name for entry in settling.settled(entries)]

    small, large, again = FileEntry("a", 1, "1"), FileEntry("a", 2, "1"), FileEntry("a", 2, "2")
    assert at(0, small) == []
    assert at(9, small) == []
    assert at(9.5, large) == []
    assert at(19, large) == []
    assert at(19.4, again) == []
    assert at(29.4, again, FileEntry("b.tmp", 1, ""), FileEntry("c", 1, "")) == ["a"]
    assert settling.num_waiting == 2
    assert at(35) == []
    assert at(40, again) == []  # it was away, and is as good as new
    assert Settling(0).settled([small]) == [small]


def test_a_file_that_still_grows_is_waited_for(config: Config, incoming: Path) -> None:
    whole = image_bytes(random_pixels(8, 8, 3, seed=77))
    growing = incoming / "077.png"

    def write() -> None:
        for cut in (20, 60, 100):
            growing.write_bytes(whole[:cut])
            time.sleep(0.1)
        growing.write_bytes(whole)

    writer = threading.Thread(target=write)
    writer.start()
    result = followed(config(), settle=0.4)
    writer.join()
    assert (result.num_rows, result.num_refused) == (31, 0)


def test_members_are_cut_between_files() -> None:
    assert first_group([3, 3, 3], 7) == 2
    assert first_group([9, 3], 7) == 1
    assert first_group([], 7) == 0


@pytest.fixture
def killing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Ends a run at the n-th of the moments at which something durable was, or is about to be, written."""
    countdown = [0]

    def passing(method: Any) -> Any:
        def called(*args: Any, **options: Any) -> Any:
            for moment in range(2):
                countdown[0] -= 1
                if countdown[0] == 0:
                    raise Killed
                if moment == 0:
                    result = method(*args, **options)
            return result

        return called

    for owner, name in (
        (SeriesWriter, "add"),
        (SeriesWriter, "agree"),
        (StoreWriter, "write_shard"),
        (StoreWriter, "finalize"),
    ):
        monkeypatch.setattr(owner, name, passing(getattr(owner, name)))
    yield lambda moments: countdown.__setitem__(0, moments)
    countdown[0] = 0


def test_a_run_killed_at_any_moment_goes_on_to_the_same_series(
    config: Config, incoming: Path, tmp_path: Path, killing: Callable[[int], None]
) -> None:
    for number in range(12, 30):
        (incoming / f"{number:03d}.png").unlink()
    shutil.copyfile(incoming / "003.png", incoming / "011.png")  # so that something is left out
    options: dict[str, Any] = {"member_rows": 9, "dedupe": "digest"}
    followed(config(out=str(tmp_path / "undisturbed")), **options)
    expected = content(str(tmp_path / "undisturbed"))
    num_killed = 0
    for moment in (2, 4, 6, 9, 11):
        out = config(out=str(tmp_path / f"killed-{moment}"))
        killing(moment)
        try:
            followed(out, **options)
        except Killed:
            num_killed += 1
        killing(0)
        followed(out, **options)
        assert content(out.out) == expected, moment
    assert num_killed == 5


def test_limits_are_over_the_whole_run(config: Config) -> None:
    first = followed(config(limit_samples=24), member_rows=16)
    assert (first.num_new_rows, first.limit) == (24, "--limit-samples 24")
    assert "stopped by --limit-samples 24; run the same command again to go on" in first.summary()
    with open_store(config().out) as series:
        assert (series.num_sealed_rows, series.finalized) == (24, False)
    second = followed(config(limit_samples=3), member_rows=16)
    assert (second.num_new_rows, second.limit) == (6, "--limit-samples 3")  # whole shards
    assert members(config().out) == [16, 14]


def test_a_limit_that_a_store_ends_at_begins_no_other(config: Config) -> None:
    result = followed(config(limit_samples=16), member_rows=16)
    assert (result.num_new_rows, result.limit) == (16, "--limit-samples 16")
    assert members(config().out) == [16]


def test_a_limit_of_bytes_leaves_a_store_unbegun_that_it_has_no_room_for(config: Config) -> None:
    first = followed(config(), member_rows=16)
    shutil.rmtree(config().out)
    limit = first.num_new_bytes // 2 + 100
    result = followed(config(limit_bytes=limit), member_rows=16)
    assert result.limit == f"--limit-bytes {limit}"
    assert members(config().out) == [16]
    assert not (Path(config().out) / files_name(1)).exists()


def test_a_limit_of_hours_ends_a_run_that_waits(config: Config) -> None:
    result = followed(config(limit_hours=1.5 / 3600), idle=None)
    assert (result.limit, result.num_rows) == (f"--limit-hours {1.5 / 3600}", 30)


@pytest.mark.parametrize(
    ("name", "content", "status"),
    [
        ("damaged", b"\x89PNG of nothing", STATUS_UNDECODABLE),
        ("larger", image_bytes(random_pixels(9, 9, 3, seed=1)), STATUS_UNDECODABLE),
        ("grey", image_bytes(random_pixels(8, 8, 1, seed=1)), STATUS_OK),
    ],
)
def test_an_odd_image_that_arrives_alone_is_a_row_like_any_other(
    config: Config, incoming: Path, name: str, content: bytes, status: int
) -> None:
    followed(config())
    (incoming / f"{name}.png").write_bytes(content)
    result = followed(config())
    assert members(config().out) == [30, 1]
    assert result.num_refused == (status != STATUS_OK)
    with open_store(config().out) as series:
        assert series.read(["status"], 30, 31)["status"].tolist() == [status]
    write_images(incoming, 30, 33)
    assert followed(config()).num_rows == 34
    assert verify(config().out).ok


def test_images_none_of_which_can_be_read_begin_no_series(config: Config, incoming: Path) -> None:
    for path in incoming.iterdir():
        path.write_bytes(b"\x89PNG of nothing")
    with pytest.raises(CorpusError, match="expected samples that can be read, got none"):
        followed(config())


def test_an_idle_run_ends(config: Config, incoming: Path) -> None:
    for path in incoming.iterdir():
        path.unlink()
    start = time.monotonic()
    result = followed(config(), idle=0.3)
    assert 0.3 <= time.monotonic() - start < 5
    assert (result.num_members, result.num_rows) == (0, 0)
    assert not Path(config().out).exists()


def test_samples_whose_bytes_were_there_before_are_left_out(config: Config, incoming: Path, tmp_path: Path) -> None:
    shutil.copyfile(incoming / "001.png", incoming / "028.png")  # inside the first store
    (incoming / "005.png").write_bytes(b"broken")
    (incoming / "006.png").write_bytes(b"broken")
    said: list[str] = []
    followed(config(), said.append, dedupe="digest")
    assert "000000.zarr: 30 files, 28 rows, 2 samples left out, whose digest was there before" in said
    write_images(incoming, 30, 32)
    shutil.copyfile(incoming / "002.png", incoming / "032.png")
    shutil.copyfile(incoming / "030.png", incoming / "033.png")
    result = followed(config(), said.append, dedupe="digest")
    assert said[-1] == "000001.zarr: 4 files, 2 rows, 2 samples left out, whose digest was there before"
    assert (result.num_new_rows, result.num_left_out, result.num_members) == (2, 2, 2)
    assert members(config().out) == [28, 2]
    shutil.copyfile(incoming / "002.png", incoming / "034.png")
    result = followed(config(), said.append, dedupe="digest")
    assert "000002.zarr: 1 file, 0 rows, 1 samples left out" in said[-1]
    assert "no store is needed" in said[-1]
    assert not (Path(config().out) / "000002.zarr").exists()
    assert followed(config(), dedupe="digest").num_left_out == 0  # they were seen
    write_images(incoming, 35, 36)
    followed(config(), dedupe="digest")
    assert members(config().out) == [28, 2, 1]
    with open_store(config().out) as series:
        digests = series.read(["sample_digest"], 0, 31)["sample_digest"]
    assert len(np.unique(digests)) == 31


def test_samples_whose_key_was_there_before_are_left_out(config: Config, tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    write_tar_of(tars / "a.tar", 0, 10)
    write_tar_of(tars / "b.tar", 6, 14)
    followed(config(data=str(tars)), dedupe="key", member_rows=10)
    assert members(config().out) == [10, 4]
    write_tar_of(tars / "c.tar", 13, 20)
    followed(config(data=str(tars)), dedupe="key", member_rows=10)
    assert members(config().out) == [10, 4, 6]
    with open_store(config().out) as series:
        assert len(np.unique(series.read(["sample_digest"], 0, 20)["sample_digest"])) == 20


def test_what_is_known_is_found_among_any_hashes() -> None:
    known = Known()
    hashes = np.array([5, 0, 9, 5, 2**64 - 1, 0], np.uint64)
    assert known.repeated(hashes).tolist() == [3]  # 0 stands for what could not be read
    known.add([hashes, np.array([7], np.uint64)])
    assert len(known) == 5
    assert known.repeated(np.array([9, 8, 7, 0, 8, 2**64 - 1], np.uint64)).tolist() == [0, 2, 4, 5]


def test_samples_are_compared_as_they_were_before(config: Config, incoming: Path) -> None:
    followed(config(), dedupe="digest")
    with pytest.raises(MismatchError, match=r"expected samples compared as .* \(--dedupe: digest\), got not at all"):
        followed(config())
    (Path(config().out) / keys_name(0)).write_bytes(b"other")
    with pytest.raises(DamageError, match=r"000000.keys.npy: expected the hashes of 30 samples, got others or none"):
        followed(config(), dedupe="digest")


def test_a_second_run_on_a_series_is_refused(config: Config) -> None:
    followed(config())
    with sole_run(config().out), pytest.raises(PathError, match="another teacherdump run is writing this store"):
        followed(config())
    writer = SeriesWriter(config().out)
    other = SeriesWriter(config().out)
    other.add(FilesRecord(1, (CoveredFile("x", 1, ""),), 1))
    with pytest.raises(PathError, match="another teacherdump run --follow writes this series; stop one of them"):
        writer.add(FilesRecord(1, (CoveredFile("y", 1, ""),), 1))


def test_a_folder_of_something_else_is_refused(config: Config, tmp_path: Path) -> None:
    run(config(out=str(tmp_path / "one.zarr")))
    with pytest.raises(PathError, match="expected a series of stores, an empty folder or nothing, got a store"):
        followed(config(out=str(tmp_path / "one.zarr")))
    with pytest.raises(PathError, match=r"got a folder with '000\.png'"):
        followed(config(out=config().data))
    (tmp_path / "empty").mkdir()
    followed(config(out=str(tmp_path / "empty")))
    before = sorted(path.name for path in (tmp_path / "empty").iterdir())
    with pytest.raises(PathError):  # a run without --follow writes no store into a series
        run(config(out=str(tmp_path / "empty")))
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == before


def test_other_settings_are_refused_before_another_store_is_begun(config: Config, incoming: Path) -> None:
    followed(config())
    write_images(incoming, 30, 33)
    for options in ({"encoding": "topk", "k": 2}, {"temperatures": (3.0,)}, {"shard_rows": 12}, {"precision": "bf16"}):
        with pytest.raises(MismatchError, match="expected a run that goes on with this series, got other settings"):
            followed(config(**options))
        assert members(config().out) == [30]
    with pytest.raises(MismatchError, match=r"expected members in .zarr, as the series has them, got .h5"):
        followed(config(), suffix=".h5")
    followed(config())
    assert members(config().out) == [30, 3]


def test_a_wrong_option_can_be_mended_while_nothing_is_sealed(
    config: Config, killing: Callable[[int], None], tmp_path: Path
) -> None:
    killing(5)  # before the first shard is written
    with pytest.raises(Killed):
        followed(config(temperatures=(3.0,)), dedupe="key")
    killing(0)
    assert (Path(config().out) / SERIES).exists()
    followed(config())
    with open_store(config().out) as series:
        assert series.manifest.temperatures == (1.0, 2.0, 4.0)
    with pytest.raises(TeacherError):
        followed(config(out=str(tmp_path / "new"), arch="mlp:192-3-5"))
    followed(config(out=str(tmp_path / "new")))


def test_layout_and_batch_size_stay_as_they_were_chosen_for_the_first_store(
    config: Config, incoming: Path, tmp_path: Path
) -> None:
    free: dict[str, Any] = {"shard_rows": None, "chunk_rows": None, "batch_size": None}
    followed(config(**free))
    write_images(incoming, 30, 33)
    followed(config(**free))
    manifests = []
    for member in range(2):
        with open_one_store(Path(config().out) / f"{member:06d}.zarr") as store:
            manifests.append(store.manifest)
    assert manifests[0].shard_rows == manifests[1].shard_rows > 1000  # for stores of 131,072 rows
    assert manifests[0].provenance["batch_size"] == manifests[1].provenance["batch_size"]


def test_a_file_that_changed_or_vanished_is_told_once(config: Config, incoming: Path) -> None:
    followed(config())
    (incoming / "003.png").unlink()
    (incoming / "004.png").write_bytes(b"longer" * 1000)
    os.utime(incoming / "005.png", (1, 1))
    said: list[str] = []
    followed(config(), said.append, idle=0.2)
    assert len(said) == 3
    assert said[0].startswith("note: '003.png' is gone since it was dumped into 000000.zarr; it is not dumped again")
    assert said[1].startswith("note: '004.png' has 6000 bytes, not ")
    assert said[2].startswith("note: '005.png' was written again since it was dumped into 000000.zarr")
    assert members(config().out) == [30]


def test_an_unfinished_store_whose_file_changed_is_not_gone_on_with(config: Config, incoming: Path) -> None:
    followed(config(limit_samples=8))
    os.utime(incoming / "007.png", (1, 1))  # the same bytes for all that is known
    kept = (incoming / "009.png").read_bytes()
    (incoming / "009.png").unlink()
    with pytest.raises(CorpusMismatchError, match=r"expected the files that it was begun with, but '009.png' is gone"):
        followed(config())
    (incoming / "009.png").write_bytes(kept)
    followed(config())
    assert members(config().out) == [30]
    record = FilesRecord(0, (CoveredFile("a", 1, "1"), CoveredFile("b", 1, "1")), 2)
    entries = [FileEntry("a", 1, "1"), FileEntry("b", 1, "2")]
    assert [change.is_harmful for change in changes([record], entries)] == [False]


def test_an_unfinished_store_with_other_samples_in_its_files_is_refused(config: Config, tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    write_tar_of(tars / "a.tar", 0, 20)
    followed(config(data=str(tars), limit_samples=8))
    size = (tars / "a.tar").stat().st_size
    write_tar_of(tars / "a.tar", 0, 19)
    with (tars / "a.tar").open("ab") as file:
        file.truncate(size)
    with pytest.raises(CorpusMismatchError, match="expected 20 samples in its files, as it was begun with, got 19"):
        followed(config(data=str(tars)))


def test_a_tar_that_stops_between_two_members_is_left_out_until_it_is_whole(config: Config, tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    write_tar_of(tars / "a.tar", 0, 5)
    write_tar_of(tmp_path / "b.tar", 5, 10)
    whole = (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "b.tar") as tar:
        third = tar.getmembers()[2].offset
    (tars / "b.tar").write_bytes(whole[:third])
    said: list[str] = []
    assert followed(config(data=str(tars)), said.append).num_rows == 5
    assert "'b.tar' is left out until it changes: expected the block of zeros that ends a tar" in said[0]
    (tars / "b.tar").write_bytes(whole)
    assert followed(config(data=str(tars))).num_rows == 10


def test_a_file_that_can_t_be_opened_is_left_out_until_it_changes(config: Config, tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    write_tar_of(tars / "a.tar", 0, 5)
    (tars / "b.tar").write_bytes(b"no tar" * 200 + bytes(512))
    said: list[str] = []
    result = followed(config(data=str(tars)), said.append)
    assert said[0].startswith("note: 'b.tar' is left out until it changes: corpus file '")
    assert len(said) == 2
    assert "1 file not usable" in result.summary()
    write_tar_of(tars / "b.tar", 5, 9)
    followed(config(data=str(tars)))
    assert members(config().out) == [5, 4]


def test_files_of_two_kinds_are_refused(config: Config, incoming: Path) -> None:
    write_tar_of(incoming / "a.tar", 0, 5)
    with pytest.raises(CorpusError, match="expected files of one kind, got images and webdataset; say which"):
        followed(config())
    followed(config(corpus_kind="images"))
    assert members(config().out) == [30]
    followed(config())  # the kind is that of the series
    assert members(config().out) == [30]


def test_a_folder_in_which_nothing_stays_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(*args: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("teacherdump.follow.find_files", look)
    with pytest.raises(CorpusError, match="got files that went away at each of 5 looks"):
        followed(config())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_that_waits(config: Config, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacherdump.follow.time.sleep", lambda _: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match=r"interrupted: 1 store, 30 rows in .*; run the same command again") as it:
        followed(config(), idle=None)
    assert it.value.exit_code == 128 + number


def test_a_signal_while_a_store_is_dumped_ends_it_with_whole_shards(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = StoreWriter.write_shard

    def write_shard(self: StoreWriter, shard: int, *args: Any) -> Any:
        if shard == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
        return write(self, shard, *args)

    monkeypatch.setattr(StoreWriter, "write_shard", write_shard)
    with pytest.raises(Interrupted, match=r"rows are sealed in .*000000.zarr") as it:
        followed(config(batch_size=1))
    assert it.value.exit_code == 143
    monkeypatch.undo()
    followed(config())
    assert members(config().out) == [30]


def test_one_who_waits_for_signals_inside_another_passes_them_on() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests() as outer:
        with stop_requests() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert (inner.signal, outer.signal) == (signal.SIGTERM, signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) == before  # a second one acts as ever
        with stop_requests() as late:
            assert late.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"settle": -1}, "settle: expected seconds, at least 0, got -1"),
        ({"idle": float("inf")}, "idle: expected seconds, at least 0, got inf"),
        ({"poll": 0}, "poll: expected seconds above 0, got 0"),
        ({"member_rows": 0}, "member_rows: expected at least 1, got 0"),
        ({"dedupe": "name"}, "dedupe: expected key or digest, got 'name'"),
        ({"suffix": ".npy"}, "member_format: expected .zarr or .h5, got '.npy'"),
    ],
)
def test_options_that_can_not_be_are_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        FollowOptions(**options)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"labels": "labels.npy"}, "labels: expected none with --follow"),
        ({"array": "x"}, "array: expected none with --follow"),
        ({"corpus_kind": "idx"}, "corpus_kind: expected images, webdataset, parquet with --follow"),
        ({"sequence_length": 16}, "sequence_length: expected none with --follow"),
        ({"out": "x.h5"}, "out: expected a folder for a series of stores, got 'x.h5'"),
        ({"retry_quarantined": "old.zarr"}, "retry_quarantined: expected no --follow beside it"),
    ],
)
def test_options_that_a_growing_corpus_has_no_use_for_are_refused(
    config: Config, options: dict[str, Any], error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        followed(config(**options))


def arguments(config: DumpConfig) -> list[str]:
    words = ["run", "--model", config.models[0], "--arch", ARCH, "--data", config.data, "--out", config.out]
    return [*words, "--device", "cpu", "--batch-size", "4", "--shard-rows", "8", "--chunk-rows", "4"]


def test_the_command_follows(config: Config) -> None:
    words = [*arguments(config()), "--follow", "--settle", "0", "--poll", "0.05", "--idle", "0", "--member-rows", "20"]
    result = CliRunner().invoke(main, [*words, "--member-format", "h5", "--dedupe", "digest"])
    assert result.exit_code == 0, result.output
    assert "2 stores, 30 rows" in result.stdout
    assert members(config().out) == [20, 10]
    result = CliRunner().invoke(main, [*words, "--member-format", "h5", "-q"])
    assert result.exit_code == 1
    assert "expected samples compared as for the stores that are there" in result.output
    result = CliRunner().invoke(main, [*arguments(config()), "--poll", "3"])
    assert result.exit_code == 2
    assert "poll: expected --follow beside it, got 3.0 alone" in result.output


def test_a_series_at_a_url_is_followed_and_read_like_one_in_a_folder(
    config: Config, incoming: Path, s3: S3Server, tmp_path: Path
) -> None:
    out = config(out=s3.url("series"))
    followed(out, member_rows=20, dedupe="digest")
    write_images(incoming, 30, 32)
    followed(out, member_rows=20, dedupe="digest")
    assert members(out.out) == [20, 10, 2]
    assert verify(out.out).ok
    followed(config(), member_rows=20, dedupe="digest")
    with open_store(config().out) as here, open_store(out.out) as there:
        names = ["values", "sample_digest"]
        one, two = here.read(names, 0, 32), there.read(names, 0, 32)
        for name in names:
            np.testing.assert_array_equal(one[name], two[name])
    write_images(incoming, 32, 44)
    followed(config(out=out.out, limit_samples=8), member_rows=20, dedupe="digest")
    with open_store(out.out) as there, open_store(s3.http(out.out)) as over_http:
        assert there.num_sealed_rows == 40
        assert over_http.num_sealed_rows == 32  # nothing lists there what is sealed of the last store
        np.testing.assert_array_equal(over_http.read(["values"], 0, 32)["values"], two["values"])


def test_records_hold_no_path_of_the_corpus(config: Config, incoming: Path) -> None:
    followed(config())
    for path in Path(config().out).glob("*.json"):
        assert str(incoming.parent) not in path.read_text()
        assert json.loads(path.read_text())["record_sha256"]
