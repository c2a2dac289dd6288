"""Refused rows: listed, limited, and tried again in a new version that shares what did not change."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from storage.cli import main as logitstore
from storage.console import progress
from storage.errors import AlarmError, DamageError, MismatchError, NotSealedError, OutOfSpaceError, PathError
from storage.reader import open_store
from storage.scan import verify
from storage.writer import StoreWriter
from teacherdump.cli import main as teacherdump
from teacherdump.config import DumpConfig
from teacherdump.dump import dump_shard
from teacherdump.run import run
from teacherdump.source import open_source, prepare

Build = Callable[..., DumpConfig]
REFUSED = [5, 70, 71, 199]


class Moody(nn.Module):
    """A linear teacher that gives NaN to marked inputs, while it is in the mood."""

    is_moody = True

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 5)

    def forward(self, inputs_N: Tensor) -> Tensor:
        logits_NC: Tensor = self.linear(inputs_N)
        return torch.where((inputs_N[:, :1] > 99) & Moody.is_moody, torch.nan, logits_NC)


@pytest.fixture
def moody(
    config: Build, tmp_path: Path, rows: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """A run of the moody teacher, with any option changed."""
    making = type(os)("moods")
    making.__dict__["make"] = Moody
    monkeypatch.setitem(__import__("sys").modules, "moods", making)
    monkeypatch.setattr(Moody, "is_moody", True)
    torch.manual_seed(0)
    torch.save(Moody().state_dict(), tmp_path / "moody.pt")
    rows[REFUSED, 0] = 100
    np.savez(tmp_path / "corpus.npz", x=rows)

    def dump(**options: Any) -> Any:
        return run(config(models=(str(tmp_path / "moody.pt"),), arch="moods:make", **options))

    return dump


def info(*args: str) -> Result:
    return CliRunner().invoke(logitstore, ["info", *args])


# Listed


def test_info_lists_refused_rows_with_their_keys_and_reasons(moody: Callable[..., Any]) -> None:
    path = moody().path
    lines = info(path, "--quarantine").stdout.splitlines()
    assert lines[-4:] == [f"  row {row}  {row}: logits are not finite: NaN" for row in REFUSED]
    found = json.loads(info(path, "--quarantine", "--json").stdout)
    assert found["quarantine"][0] == {"row": 5, "key": "5", "reason": "logits are not finite: NaN"}
    assert len(found["quarantine"]) == found["num_quarantined"] == 4
    assert "quarantine" not in json.loads(info(path, "--json").stdout)


def test_info_says_that_no_row_is_refused(config: Build) -> None:
    assert info(run(config()).path, "--quarantine").stdout.splitlines()[-1] == "  no row is without targets"


# Limited


def test_a_run_stops_before_the_shard_that_tips_is_sealed(moody: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(
        AlarmError,
        match=r"--max-quarantined 0.01: expected at most 1.00% of the rows refused, got 3 of 128, the first of them "
        r"row 5 \('5'\): logits are not finite: NaN; row 70 .* --retry-quarantined",
    ):
        moody(max_quarantined=0.01)
    with open_store(tmp_path / "out.zarr") as store:
        assert store.sealed_shards() == (0, 1, 2)  # 96 rows are no base for a share; the next shard makes 128
        assert len(store.quarantine()) == 3


def test_a_run_under_its_limit_of_refused_rows_is_not_stopped(moody: Callable[..., Any]) -> None:
    assert moody(max_quarantined=0.024).num_refused == 4


def test_no_row_at_all_may_be_refused(moody: Callable[..., Any]) -> None:
    with pytest.raises(AlarmError, match="--max-quarantined 0: "):
        moody(max_quarantined=0.0, shard_rows=112)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_can_not_be_is_refused(config: Build, share: float) -> None:
    with pytest.raises(ValueError, match="max_quarantined: expected a share from 0 to 1, got"):
        config(max_quarantined=share)


# Tried again


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("zarr", {}),
        ("h5", {}),
        ("zarr", {"encoding": "topk", "k": 2}),
        ("zarr", {"encoding": "sample", "draws": 20, "temperatures": (1.0,)}),
        ("h5", {"values": "uint8", "compressor": "zstd"}),
    ],
)
def test_a_retry_gives_what_an_undisturbed_run_gives(
    moody: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, options: dict[str, Any]
) -> None:
    old = moody(out=str(tmp_path / f"old.{suffix}"), **options)
    monkeypatch.setattr(Moody, "is_moody", False)
    whole = moody(out=str(tmp_path / "whole.zarr"), **options)
    new = moody(out=str(tmp_path / f"new.{suffix}"), retry_quarantined=old.path, **options)
    assert (new.content_digest, new.num_refused) == (whole.content_digest, 0)
    assert f"retried 4 rows of {old.path}: 4 came back" in new.summary()
    assert verify(new.path).ok
    assert verify(old.path).content_digest == old.content_digest != new.content_digest
    with open_store(new.path) as store:
        assert store.manifest.provenance["retried_from"] == old.content_digest


def test_untouched_shards_are_the_same_files(
    moody: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = moody(out=str(tmp_path / "old.zarr"))
    monkeypatch.setattr(Moody, "is_moody", False)
    moody(out=str(tmp_path / "new.zarr"), retry_quarantined=old.path)
    old_files, new_files = (tmp_path / name / "values" / "c" for name in ("old.zarr", "new.zarr"))
    same = [(old_files / f"{shard}/0").samefile(new_files / f"{shard}/0") for shard in range(7)]
    assert same == [False, True, False, True, True, True, False]
    shutil.rmtree(tmp_path / "old.zarr")
    assert verify(tmp_path / "new.zarr").ok


def test_where_no_links_can_be_shards_are_copied(
    moody: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = moody(out=str(tmp_path / "old.zarr"))
    monkeypatch.setattr(Moody, "is_moody", False)
    whole = moody(out=str(tmp_path / "whole.zarr"))
    link = os.link

    def no_links(source: Any, target: Any, **options: Any) -> None:
        if "old.zarr" in str(source):
            raise OSError(18, "Invalid cross-device link")
        link(source, target, **options)

    monkeypatch.setattr(os, "link", no_links)
    assert moody(out=str(tmp_path / "new.zarr"), retry_quarantined=old.path).content_digest == whole.content_digest
    assert (tmp_path / "new.zarr" / "values" / "c" / "1" / "0").stat().st_nlink == 1


def test_rows_that_stay_refused_say_why(moody: Callable[..., Any], tmp_path: Path) -> None:
    old = moody(out=str(tmp_path / "old.zarr"))
    new = moody(out=str(tmp_path / "new.zarr"), retry_quarantined=old.path)
    assert "0 came back, 4 did not: row 5 (5): logits are not finite: NaN; row 70" in new.summary()
    assert "and 1 more (logitstore info --quarantine)" in new.summary()
    assert new.content_digest == old.content_digest  # it says the same


def test_a_store_without_refused_rows_is_left_alone(config: Build, tmp_path: Path) -> None:
    old = run(config(out=str(tmp_path / "old.zarr")))
    result = run(config(out=str(tmp_path / "new.zarr"), retry_quarantined=old.path))
    assert result.summary() == f"nothing to retry: {old.path} has targets for every row; nothing was written"
    assert not list(tmp_path.glob("new*"))


def test_a_sample_that_kills_is_not_tried(
    moody: Callable[..., Any], config: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Moody, "is_moody", False)
    job = prepare(open_source(config(models=(str(tmp_path / "moody.pt"),), arch="moods:make")), lambda _: None)
    killed = {40: "the worker that ran this sample died, 2 times"}
    with (
        StoreWriter.open(tmp_path / "old.zarr", job.manifest) as writer,
        progress(200, "rows", "dumping", quiet=True) as bar,
    ):
        for shard in range(7):
            dump_shard(job, writer, shard, bar, killed)
        writer.finalize()
    result = moody(out=str(tmp_path / "new.zarr"), retry_quarantined=str(tmp_path / "old.zarr"))
    assert "has no refused row but those that kill what runs them; nothing was written" in result.summary()
    with StoreWriter.open(tmp_path / "two.zarr", job.manifest) as writer:
        for shard in range(7):
            dump_shard(job, writer, shard, bar, {**killed, 41: "the disk was away", 39: "the disk was away"})
        writer.finalize()
    result = moody(out=str(tmp_path / "new.zarr"), retry_quarantined=str(tmp_path / "two.zarr"))
    assert "3 rows" in result.summary()
    assert "2 came back, 1 did not: row 40 (40): the worker that ran this sample died, 2 times" in result.summary()
    with open_store(tmp_path / "old.zarr") as store:
        assert store.content_digest == result.content_digest


def test_a_retry_that_was_stopped_goes_on(
    moody: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = moody(out=str(tmp_path / "old.zarr"))
    monkeypatch.setattr(Moody, "is_moody", False)
    whole = moody(out=str(tmp_path / "whole.zarr"))
    options = {"out": str(tmp_path / "new.zarr"), "retry_quarantined": old.path}
    with monkeypatch.context() as patch:
        patch.setattr(
            "teacherdump.dump.write_shard",
            lambda writer, shard: (_ for _ in ()).throw(OutOfSpaceError(f"{writer.store.path}: {shard.shard}")),
        )
        with pytest.raises(OutOfSpaceError, match=r"new\.zarr: 0"):
            moody(**options, wait_for_room=0.0)
    from storage import versions

    share, calls = versions.share_shard, [0]

    def fail_later(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(5, "Input/output error")
        return share(*args)

    with monkeypatch.context() as patch:
        patch.setattr("teacherdump.retry.share_shard", fail_later)
        with pytest.raises(OSError, match="Input/output error"):
            moody(**options)
    with open_store(tmp_path / "new.zarr") as store:
        assert store.sealed_shards() == (0, 1, 2)
    assert moody(**options).content_digest == whole.content_digest
    again = moody(**options)
    assert (again.num_new_rows, again.content_digest) == (0, whole.content_digest)


def test_a_store_finalized_at_a_part_stays_one(
    moody: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = moody(out=str(tmp_path / "old.zarr"), limit_samples=96)
    CliRunner().invoke(logitstore, ["finalize", old.path, "--partial"])
    monkeypatch.setattr(Moody, "is_moody", False)
    new = moody(out=str(tmp_path / "new.zarr"), retry_quarantined=old.path)
    assert (new.num_sealed_rows, new.num_refused) == (96, 0)
    assert new.content_digest is not None


def test_a_damaged_shard_is_not_taken_over(
    moody: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = moody(out=str(tmp_path / "old.zarr"))
    monkeypatch.setattr(Moody, "is_moody", False)
    damaged = tmp_path / "old.zarr" / "values" / "c" / "1" / "0"
    data = bytearray(damaged.read_bytes())
    data[20] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(DamageError, match="shard 1"):
        moody(out=str(tmp_path / "new.zarr"), retry_quarantined=old.path)


# Refused


def test_what_is_no_retry_of_a_store_is_refused(
    moody: Callable[..., Any], config: Build, tmp_path: Path, rows: np.ndarray[Any, Any]
) -> None:
    old = str(tmp_path / "old.zarr")
    moody(out=old, limit_samples=32)
    new = {"out": str(tmp_path / "new.zarr"), "retry_quarantined": old}
    with pytest.raises(NotSealedError, match="expected a finalized store, got one that is not; finish the dump"):
        moody(**new)
    moody(out=old)
    with pytest.raises(PathError, match="expected another path than --out, got the same"):
        moody(out=f"{tmp_path}/./old.zarr", retry_quarantined=old)
    with pytest.raises(MismatchError, match="expected the settings that it was made with, got others: encoding"):
        moody(**new, encoding="topk", k=2)
    with pytest.raises(MismatchError, match=r"got others: teacher\."):
        run(config(**new))
    moody(out=str(tmp_path / "other.zarr"))
    with pytest.raises(MismatchError, match=r"expected nothing, or this retry begun, got a store that is none of"):
        moody(out=str(tmp_path / "other.zarr"), retry_quarantined=old)
    np.savez(tmp_path / "corpus.npz", x=rows[:190])
    np.save(tmp_path / "labels.npy", np.zeros(190, np.int64))
    with pytest.raises(
        MismatchError, match=r"A file that was mended, and is of another size now, makes another corpus"
    ):
        moody(**new)
    assert not (tmp_path / "new.zarr").exists()


@pytest.mark.parametrize(
    "option",
    [{"limit_samples": 5}, {"no_alarms": ("flat",)}, {"max_quarantined": 0.5}, {"workers": 2}, {"limit_hours": 2.0}],
)
def test_options_that_a_retry_would_ignore_are_refused(config: Build, option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}: expected none with retry_quarantined, got .*; leave it out"):
        config(retry_quarantined="old.zarr", **option)


def test_a_retry_from_the_command_line_says_what_it_did(
    moody: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = moody(out=str(tmp_path / "old.zarr"))
    monkeypatch.setattr(Moody, "is_moody", False)
    args = [
        "run",
        "--model",
        str(tmp_path / "moody.pt"),
        "--arch",
        "moods:make",
        "--data",
        str(tmp_path / "corpus.npz"),
    ]
    args += ["--labels", str(tmp_path / "labels.npy"), "--device", "cpu", "--out", str(tmp_path / "new.zarr")]
    result = CliRunner().invoke(teacherdump, [*args, "--retry-quarantined", old.path])
    assert result.exit_code == 0, result.output
    assert "retrying 4 rows of" in result.stderr
    assert "4 came back" in result.stdout


@pytest.mark.slow
def test_stores_in_one_bucket_share_shards_without_their_bytes_coming_here(
    moody: Callable[..., Any], s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from storage.backends import RemoteBackend

    url = s3.url("quarantine")
    old = moody(out=f"{url}/old.zarr")
    monkeypatch.setattr(Moody, "is_moody", False)
    whole = moody(out=str(tmp_path / "whole.zarr"))
    with monkeypatch.context() as patch:
        patch.setattr(RemoteBackend, "write_object", lambda *_: pytest.fail("an object came here"))
        new = moody(out=f"{url}/new.zarr", retry_quarantined=old.path)
    assert new.content_digest == whole.content_digest
    local = moody(out=str(tmp_path / "new.zarr"), retry_quarantined=old.path)
    assert local.content_digest == whole.content_digest
