"""The run log: whole lines, nothing secret, and never in the way of the run."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.errors import AlarmError, OutOfSpaceError
from storage.interruption import Interrupted
from storage.reader import open_store
from teacherdump.config import DumpConfig
from teacherdump.run import run
from teacherdump.run_log import RunLog, append_whole, log_path

Build = Callable[..., DumpConfig]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_writes_a_line_a_shard_and_one_at_each_end(config: Build, tmp_path: Path) -> None:
    result = run(config())
    start, *shards, end = lines_of(tmp_path / "out.zarr.log.jsonl")
    assert (start["event"], start["shards_ahead"], start["rows_ahead"]) == ("start", 7, 200)
    assert start["settings"]["encoding"]["name"] == "dense"
    assert start["settings"]["batch_size"] == 10
    with open_store(result.path) as store:
        assert start["settings"]["teacher"] == store.manifest.teacher
        for line in shards:
            seal = store.seal(line["shard"])
            assert (line["start"], line["stop"], line["rows"]) == (seal.start, seal.stop, seal.stop - seal.start)
            assert line["bytes"] == sum(value["num_bytes"] for value in seal.objects.values())
    assert [line["event"] for line in shards] == ["shard"] * 7
    assert all(line["rows_per_s"] > 0 and line["mean_entropy"] > 0 for line in shards)
    assert {line["worker"] for line in shards} == {"local"}
    assert (end["event"], end["outcome"], end["rows"], end["refused"]) == ("end", "finished", 200, 0)
    assert end["digest"] == result.content_digest


def test_a_log_at_a_url_is_refused(config: Build) -> None:
    with pytest.raises(
        ValueError, match=r"run_log: expected a path on this machine, got a URL, s3:\.\.\.; give a path"
    ):
        config(run_log="s3://bucket/run.jsonl")


def test_runs_add_to_the_log_and_say_how_they_ended(config: Build, tmp_path: Path) -> None:
    run(config(limit_samples=64))
    run(config())
    run(config())
    found = [(line["event"], line.get("outcome")) for line in lines_of(tmp_path / "out.zarr.log.jsonl")]
    first = [("start", None), ("shard", None), ("shard", None), ("end", "limit")]
    assert found == [*first, ("start", None), *[("shard", None)] * 5, ("end", "finished")]


def test_no_key_of_a_sample_and_no_path_of_the_corpus_is_in_the_log(
    config: Build, images: Path, saving: dict[str, Any], tmp_path: Path
) -> None:
    broken = sorted(images.rglob("*.jpg"))[3]
    broken.write_bytes(b"no image")
    path = saving["weights"](tmp_path / "cnn.pt", "cnn:3-4-2")
    log = tmp_path / "run.jsonl"
    options = {"models": (str(path),), "arch": "cnn:3-4-2", "data": str(images), "labels": None, "image_size": (8, 8)}
    assert run(config(**options, run_log=str(log))).num_refused == 1
    assert sum(line.get("refused", 0) for line in lines_of(log) if line["event"] == "shard") == 1
    for secret in (broken.name, "cat/", str(images), str(tmp_path)):
        assert secret not in log.read_text()


def test_an_error_is_in_the_log_by_its_kind_alone(config: Build, tmp_path: Path) -> None:
    run(config(limit_samples=96))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("teacherdump.dump.shard_alarm", lambda *_: (_ for _ in ()).throw(AlarmError("row 5 (secret)")))
        with pytest.raises(AlarmError):
            run(config())
    end = lines_of(tmp_path / "out.zarr.log.jsonl")[-1]
    assert (end["outcome"], end["error"]) == ("error", "AlarmError")
    assert "secret" not in json.dumps(end)


def test_a_run_that_seals_nothing_leaves_no_log_unless_it_was_asked_for(config: Build, tmp_path: Path) -> None:
    broken = {"wait_for_room": 0.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("teacherdump.dump.write_shard", lambda *_: (_ for _ in ()).throw(OutOfSpaceError("full")))
        with pytest.raises(OutOfSpaceError):
            run(config(**broken))
        assert not (tmp_path / "out.zarr.log.jsonl").exists()
        with pytest.raises(OutOfSpaceError):
            run(config(**broken, run_log=str(tmp_path / "asked.jsonl")))
    start, end = lines_of(tmp_path / "asked.jsonl")
    assert (start["event"], end["outcome"], end["error"]) == ("start", "error", "OutOfSpaceError")


def test_a_log_can_be_left_out(config: Build, tmp_path: Path) -> None:
    run(config(run_log="none"))
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_store_at_a_url_has_no_log_unless_it_is_asked_for(config: Build) -> None:
    assert log_path(config(out="s3://bucket/x.zarr")) is None
    assert log_path(config(out="s3://bucket/x.zarr", run_log="x.jsonl")) == Path("x.jsonl")


def test_a_run_that_can_not_write_its_log_says_so_once_and_goes_on(config: Build, tmp_path: Path) -> None:
    said: list[str] = []
    result = run(config(run_log=str(tmp_path / "nowhere" / "run.jsonl")), said.append)
    assert result.content_digest is not None
    assert [text for text in said if "run log" in text] == [
        f"note: the run log can't be written: {tmp_path}/nowhere/run.jsonl: No such file or directory; going on without"
    ]


def test_lines_that_found_no_room_come_later(config: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    log, folder = RunLog(tmp_path / "late" / "run.jsonl", said.append), tmp_path / "late"
    log.event("first")
    log.event("second")
    folder.mkdir()
    log.end("finished")
    assert [line["event"] for line in lines_of(folder / "run.jsonl")] == ["first", "second", "end"]
    assert len(said) == 1


def test_a_line_that_a_kill_cut_off_is_ended_first(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_bytes(b'{"event": "sha')
    append_whole(tmp_path / "run.jsonl", b"{}\n")
    assert (tmp_path / "run.jsonl").read_bytes() == b'{"event": "sha\n{}\n'


def test_an_interrupted_run_says_so_in_its_log(config: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from teacherdump import dump as dump_module

    write, calls = dump_module.write_shard, [0]

    def interrupt(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            signal.raise_signal(signal.SIGINT)
        return write(*args)

    monkeypatch.setattr(dump_module, "write_shard", interrupt)
    with pytest.raises(Interrupted):
        run(config())
    assert lines_of(tmp_path / "out.zarr.log.jsonl")[-1]["outcome"] == "interrupted"
