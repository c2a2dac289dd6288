"""A dump into a store at a URL: the digest of a local one, also by two runs at once."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from storage.errors import MismatchError, PathError
from storage.reader import open_store
from storage.remote import open_place
from storage.scan import verify
from teacherdump.config import DumpConfig
from teacherdump.run import run
from tests.s3 import S3Server
from tests.teacherdump.small_dumps import source_options

ROOT = Path(__file__).parents[2]


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """100 rows, two of them refused, in 7 shards."""
    return source_options(tmp_path, "classes") | {"shard_rows": 16, "chunk_rows": 4, "temperatures": (1.0,)}


def command_of(options: dict[str, Any], out: str) -> list[str]:
    words = [sys.executable, "-c", "from teacherdump.cli import main; main()", "run", "--out", out]
    words += ["--model", options["models"][0]]
    for name in ("arch", "device", "batch_size", "data", "labels", "shard_rows", "chunk_rows"):
        words += [f"--{name.replace('_', '-')}", str(options[name])]
    return [*words, "--temperature", "1"]


def test_a_dump_to_a_url_has_the_digest_of_a_local_one_and_goes_on(
    s3: S3Server, options: dict[str, Any], tmp_path: Path
) -> None:
    expected = run(DumpConfig(**options, out=str(tmp_path / "local.zarr"))).content_digest
    url = s3.url("store.zarr")
    first = run(DumpConfig(**options, out=url, limit_samples=30))
    assert (first.num_sealed_rows, first.content_digest) == (32, None)
    with pytest.raises(MismatchError, match=r"encoding.name: the store .*; use the same settings, or another path$"):
        run(DumpConfig(**options, out=url, encoding="topk", k=3))
    s3.ask(fail=3, cut=1, status=500)
    assert run(DumpConfig(**options, out=url)).content_digest == expected
    assert verify(url).ok
    assert run(DumpConfig(**options, out=s3.http(url))).num_new_rows == 0


def test_a_store_with_nothing_sealed_is_gone_on_with_and_not_discarded(
    s3: S3Server, options: dict[str, Any], tmp_path: Path
) -> None:
    url = s3.url("store.zarr")
    run(DumpConfig(**options, out=str(tmp_path / "local.zarr"), limit_samples=1))
    place, folder = open_place(url), tmp_path / "local.zarr"
    for path in sorted(path for path in folder.rglob("*.json") if path.is_file() and path.parent.name != "seals"):
        place.put(path.relative_to(folder).as_posix(), path.read_bytes())
    with pytest.raises(MismatchError, match="nothing of it is sealed: if no other run is writing it, its objects may"):
        run(DumpConfig(**options, out=url, encoding="topk", k=3))
    assert run(DumpConfig(**options, out=url)).content_digest is not None
    with pytest.raises(PathError, match="expected a Zarr store at a URL, got the name of an HDF5 file"):
        run(DumpConfig(**options, out=s3.url("store.h5")))


def test_two_drivers_on_one_store_end_with_one_correct_store(
    s3: S3Server, options: dict[str, Any], tmp_path: Path
) -> None:
    url = s3.url("store.zarr")
    torch.set_num_threads(1)  # as the drivers do: last bits depend on it
    drivers = [
        subprocess.Popen(
            command_of(options, url),
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [driver.communicate(timeout=240) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], said
    with open_store(url) as store:
        digest = store.content_digest
    assert digest == run(DumpConfig(**options, out=str(tmp_path / "local.zarr"))).content_digest
    result = verify(url)
    assert (result.damage, result.warnings) == ((), ())
    assert all(f"content digest {digest}" in out for out, _ in said)
    assert not [text for pair in said for text in pair if "SecretThatIsNowhere" in text]
