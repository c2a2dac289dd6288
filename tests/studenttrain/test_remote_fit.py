"""A student that streams from a URL is the one that reads the same store from a disk."""

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from storage.corpus import open_corpus
from storage.errors import RemoteError
from storage.remote import open_place
from studenttrain.config import FitConfig
from studenttrain.train import fit
from tests.s3 import S3Server
from tests.studenttrain.runs import STUDENT, write_blobs, write_targets

NUM_ROWS = 96


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a chunk of 8 rows, windows of 24 rows, so that a small store has many."""
    monkeypatch.setattr("studenttrain.stream.choose_block_rows", lambda _: 8)
    monkeypatch.setattr("studenttrain.stream.choose_window_blocks", lambda *_: 3)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_blobs(tmp_path / "corpus.npz", NUM_ROWS)


@pytest.fixture
def local(tmp_path: Path, data: Path) -> Path:
    return write_targets(tmp_path / "targets.zarr", open_corpus(data), refused=(7, 50))


@pytest.fixture
def url(s3: S3Server, local: Path) -> str:
    """The same store at a URL: its files, as objects."""
    url = s3.url("targets.zarr")
    place = open_place(url)
    for path in sorted(path for path in local.rglob("*") if path.is_file()):
        place.put(path.relative_to(local).as_posix(), path.read_bytes())
    return url


def trained(data: Path, targets: str | Path, out: Path, **options: object) -> dict[str, bytes]:
    """Weights of a student, by name."""
    given = {"epochs": 2, "batch_size": 10, "device": "cpu", **options}
    config = FitConfig(str(targets), str(data), STUDENT, str(out), **given)  # type: ignore[arg-type]
    fit(config, quiet=True)
    return {name: values.tobytes() for name, values in load_file(out / "student.safetensors").items()}


def test_the_student_is_the_same_from_a_disk_from_s3_over_http_and_out_of_a_cache(
    s3: S3Server, data: Path, local: Path, url: str, tmp_path: Path, no_report: None
) -> None:
    expected = trained(data, local, tmp_path / "disk")
    before = s3.ask(cut=4, fail=2, contains="/c/")  # a connection that breaks is not fatal, wherever it does
    assert trained(data, s3.http(url), tmp_path / "http", cache=str(tmp_path / "cache")) == expected
    after = s3.ask(contains="")
    assert (after["cut"] - before["cut"], after["failed"] - before["failed"]) == (4, 2)
    place = open_place(url)
    place.delete_all([entry.key for entry in place.list() if "/c/" in entry.key])
    assert trained(data, url, tmp_path / "s3", cache=str(tmp_path / "cache"), cache_size="1MB") == expected


def test_a_server_that_is_gone_ends_the_training_with_one_line(
    s3: S3Server, data: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGITSTORE_RETRY_S", "0.2")
    s3.ask(fail=10**6, contains="/c/")
    with pytest.raises(RemoteError, match=r"expected an answer, got 50[03] .* for \d s; check the URL and the network"):
        trained(data, url, tmp_path / "run")
    s3.ask(fail=0, contains="")


def test_a_cache_that_would_be_ignored_is_an_error(data: Path, local: Path, tmp_path: Path) -> None:
    options = {"data": str(data), "student": STUDENT, "out": str(tmp_path / "run"), "epochs": 1}
    with pytest.raises(ValueError, match=r"cache: expected targets at a URL, got .*, which are here; leave the cache"):
        FitConfig(targets=str(local), cache=str(tmp_path / "cache"), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cache_size: expected --cache beside it, got none; give the cache's folder"):
        FitConfig(targets="s3://bucket/x", cache_size="1GB", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^cache_size: expected bytes such as 500MB or 2GiB, got 'much'"):
        FitConfig(targets="s3://bucket/x", cache="x", cache_size="much", **options)  # type: ignore[arg-type]


def test_a_run_or_a_cache_at_a_url_is_refused(tmp_path: Path) -> None:
    options = {"targets": "s3://bucket/x", "data": "x", "student": STUDENT, "epochs": 1}
    for out in ("s3://bucket/run", "s3:/bucket/run"):
        with pytest.raises(
            ValueError, match=r"out: expected a path on this machine, got a URL, s3:\.\.\.; give a path"
        ):
            FitConfig(out=out, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cache: expected a path on this machine, got a URL, s3:\.\.\.; give a path"):
        FitConfig(out=str(tmp_path / "run"), cache="s3://bucket/cache", **options)  # type: ignore[arg-type]
