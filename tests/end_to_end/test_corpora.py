"""The road from tars and Parquet files, on disk and by URL: one store of each, and students that read either."""

import json
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from storage.remote import open_place
from studenttrain.cli import main as studenttrain
from studenttrain.models import build_model
from teacherdump.cli import main as teacherdump
from tests.builders import image_bytes, random_pixels
from tests.s3 import S3Server
from tests.storage.corpus.tars import write_tar

ARCH = "mlp:192-16-3"
DUMP = ("--arch", ARCH, "--no-alarm", "all", "--shard-rows", "16", "--batch-size", "8", "-q")
FIT = ("--student", ARCH, "--epochs", "1", "--device", "cpu", "-q")
NUM_ROWS = 50


def call(program: click.Command, *words: object, expected: int = 0) -> str:
    """What a command prints."""
    done = CliRunner().invoke(program, [str(word) for word in words])
    assert done.exit_code == expected, (done.output, done.exception)
    return done.output


def digest(store: Path) -> str:
    found: str = json.loads((store / "final.json").read_text())["content_digest"]
    return found


@pytest.fixture(autouse=True)
def plain_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the seconds that drawing and exporting a program take: neither is what is tested."""
    monkeypatch.setattr("studenttrain.ending.write_report", lambda folder, _: folder / "report.html")
    monkeypatch.setattr("torch.export.save", lambda *_: None)
    monkeypatch.setattr("torch.export.export", lambda *_, **__: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.manual_seed(0)
    torch.save(build_model(ARCH).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as two tars, one of them damaged in row 3, and as two Parquet files."""
    folder = tmp_path_factory.mktemp("data")
    raws = [image_bytes(random_pixels(8, 8, 3, seed=number)) for number in range(NUM_ROWS)]
    raws[3] = raws[3][:40]
    for number, rows in enumerate((range(30), range(30, NUM_ROWS))):
        members = []
        for row in rows:
            members += [(f"{row:03d}.png", raws[row]), (f"{row:03d}.cls", str(row % 3).encode())]
        write_tar(folder / "tars" / f"train-{number}.tar", members)
        columns = {
            "picture": pa.array([raws[row] for row in rows], pa.binary()),
            "mask": pa.array([b""] * len(rows), pa.binary()),
            "class": [row % 3 for row in rows],
        }
        (folder / "parquet").mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), folder / "parquet" / f"train-{number}.parquet", row_group_size=7)
    return folder


def upload(folder: Path, url: str) -> None:
    for path in folder.iterdir():
        open_place(url).put(path.name, path.read_bytes())


@pytest.mark.parametrize(
    ("kind", "options"),
    [("tars", ()), ("parquet", ("--image-column", "picture", "--label-column", "class"))],
)
def test_a_store_is_the_same_whether_its_corpus_is_on_disk_or_at_a_url(
    s3: S3Server, teacher: Path, data: Path, tmp_path: Path, kind: str, options: tuple[str, ...]
) -> None:
    url, suffix = s3.url(kind), {"tars": "tar", "parquet": "parquet"}[kind]
    upload(data / kind, url)
    places = (data / kind, f"{url}/train-*.{suffix}", s3.http(f"{url}/train-{{0..1}}.{suffix}"))
    for number, place in enumerate(places):
        out = tmp_path / f"{number}.zarr"
        printed = call(teacherdump, "run", "--model", teacher, "--data", place, "--out", out, *options, *DUMP)
        assert f"{NUM_ROWS} of {NUM_ROWS} rows sealed, 1 refused" in printed
    assert len({digest(tmp_path / f"{number}.zarr") for number in range(3)}) == 1
    weights = []
    for number, place in enumerate((data / kind, url) if kind == "tars" else (url,)):
        out = tmp_path / f"run-{number}"
        call(studenttrain, "fit", "--targets", tmp_path / "0.zarr", "--data", place, "--out", out, *options, *FIT)
        weights.append((out / "student.safetensors").read_bytes())
    assert len(set(weights)) == 1
    printed = call(studenttrain, "eval", "--checkpoint", tmp_path / "run-0", "--data", url, *options, "--json")
    assert json.loads(printed)["num_samples"] == NUM_ROWS - 1
    audited = ("--model", teacher, "--arch", ARCH, "--data", url, "--targets", tmp_path / "1.zarr", *options, "-q")
    assert "faithful" in call(teacherdump, "audit", *audited)


def test_the_columns_of_validation_are_those_of_training(teacher: Path, data: Path, tmp_path: Path) -> None:
    columns = ("--image-column", "picture", "--label-column", "class")
    train, store = data / "parquet" / "train-0.parquet", tmp_path / "a.zarr"
    call(teacherdump, "run", "--model", teacher, "--data", train, "--out", store, *columns, *DUMP)
    fit = ("fit", "--targets", store, "--data", train, "--out", tmp_path / "run", *columns, *FIT)
    assert "validation: top-1" in call(studenttrain, *fit, "--val-data", data / "parquet" / "train-1.parquet")
    others = (*fit, "--out", tmp_path / "other", "--val-data", data / "tars" / "train-1.tar")
    assert "validation: top-1" in call(studenttrain, *others)


def test_columns_where_there_are_none_are_usage_errors(teacher: Path, data: Path, tmp_path: Path) -> None:
    run = ("run", "--model", teacher, "--out", tmp_path / "a.zarr", *DUMP)
    printed = call(teacherdump, *run, "--data", data / "tars", "--label-column", "class", expected=2)
    assert "label_column: expected Parquet files of images for 'class', got webdataset; leave it out" in printed
    columns = {"left": pa.array([b"x"]), "right": pa.array([b"x"])}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    printed = call(teacherdump, *run, "--data", tmp_path / "a.parquet", expected=1)
    assert "expected one column of encoded images, got 'left', 'right'; say which: --image-column" in printed
    fit = ("fit", "--targets", tmp_path / "a.zarr", "--out", tmp_path / "run", *FIT, "--image-column", "picture")
    assert "image_column: expected --data beside it, got none" in call(studenttrain, *fit, expected=2)
