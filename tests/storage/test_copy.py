"""A store is copied to another place as it is, in as many attempts as it takes, and never over something else."""

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
from click.testing import CliRunner

from storage.cli import main
from storage.encodings import Dense, TopK
from storage.errors import DamageError, MismatchError, NotSealedError, PathError, RemoteError
from storage.reader import open_store
from storage.scan import copy, verify
from storage.writer import StoreWriter
from tests.s3 import S3Server
from tests.storage.scan_stores import manifest_of, shard_of, write_store
from tests.storage.soft_targets import hidden_encoding, sequences_of


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its name in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path, offset: int = 7) -> None:
    """Change a bit."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


def stop_after(num_calls: int) -> Callable[[int], None]:
    """A callback that raises, as a kill would, when it is called once more than so often."""
    calls = []

    def progress(count: int) -> None:
        calls.append(count)
        if len(calls) > num_calls:
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_store(tmp_path / "a.zarr", manifest_of())


# The same, byte for byte


@pytest.mark.parametrize(
    "fields",
    [
        {"encoding": TopK(3), "compressor": "zstd"},
        {"encoding": hidden_encoding(5, 4, has_bias=True), "sequences": sequences_of(3)},
    ],
)
def test_a_copy_of_a_zarr_store_is_the_same_byte_for_byte(fields: dict[str, object], tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of(**fields))  # type: ignore[arg-type]
    counted: list[int] = []
    result = copy(source, tmp_path / "b.zarr", progress=counted.append)
    assert files_of(tmp_path / "b.zarr") == files_of(source)
    assert sum(counted) == 2 * 22
    with open_store(source) as store:
        assert result.content_digest == result.source_digest == store.content_digest
    assert result.num_sealed_rows == 22


def test_a_copy_of_a_final_hdf5_file_is_the_same_byte_for_byte(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.h5", manifest_of())
    result = copy(source, tmp_path / "b.h5")
    assert (tmp_path / "b.h5").read_bytes() == source.read_bytes()
    assert result.num_moved == source.stat().st_size
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("b.h5")] == ["b.h5"]
    assert copy(source, tmp_path / "b.h5").num_moved == 0


def test_a_copy_goes_from_zarr_to_hdf5_and_back_with_the_same_content_digest(source: Path, tmp_path: Path) -> None:
    there = copy(source, tmp_path / "b.h5")
    back = copy(tmp_path / "b.h5", tmp_path / "c.zarr")
    with open_store(source) as store:
        assert there.content_digest == back.content_digest == store.content_digest
    assert verify(tmp_path / "c.zarr").ok


def test_a_store_that_was_finalized_without_some_rows_is_copied_without_them(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of(), shards=2)
    result = copy(source, tmp_path / "b.zarr")
    assert (result.num_sealed_rows, result.num_rows) == (16, 22)
    assert files_of(tmp_path / "b.zarr") == files_of(source)


# In several attempts


@pytest.mark.parametrize("target", ["b.zarr", "b.h5"])
@pytest.mark.parametrize("num_calls", range(6))
def test_a_copy_that_was_stopped_goes_on(source: Path, target: str, num_calls: int, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        copy(source, tmp_path / target, num_workers=1, progress=stop_after(num_calls))
    counted: list[int] = []
    copy(source, tmp_path / target, progress=counted.append)
    assert sum(counted) == 2 * 22
    assert verify(tmp_path / target).ok
    assert verify(tmp_path / target).warnings == ()
    if target == "b.zarr":
        assert files_of(tmp_path / target) == files_of(source)


@pytest.mark.parametrize("num_calls", range(0, 20, 4))
def test_a_copy_that_was_stopped_in_the_middle_of_a_shard_leaves_nothing_unsealed_behind(
    source: Path, num_calls: int, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        copy(source, tmp_path / "b.zarr", num_workers=1, moved=stop_after(num_calls))
    with open_store(tmp_path / "b.zarr") as begun:
        assert len(begun.sealed_shards()) == num_calls // 8  # objects, of which a shard has eight
    copy(source, tmp_path / "b.zarr")
    assert files_of(tmp_path / "b.zarr") == files_of(source)


def test_a_copy_of_an_hdf5_file_that_was_cut_off_goes_on_where_it_stopped(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.h5", manifest_of())
    with pytest.raises(KeyboardInterrupt):
        copy(source, tmp_path / "b.h5", moved=stop_after(0))
    assert not (tmp_path / "b.h5").exists()
    (partial,) = tmp_path.glob("b.h5.*.partial")
    os.truncate(partial, 3000)
    assert copy(source, tmp_path / "b.h5").num_moved == source.stat().st_size - 3000
    assert (tmp_path / "b.h5").read_bytes() == source.read_bytes()
    assert not partial.exists()


def test_a_begun_copy_of_an_hdf5_file_that_was_damaged_meanwhile_is_begun_anew(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.h5", manifest_of())
    with pytest.raises(KeyboardInterrupt):
        copy(source, tmp_path / "b.h5", moved=stop_after(0))
    (partial,) = tmp_path.glob("b.h5.*.partial")
    flip(partial, 2000)
    with pytest.raises(DamageError, match=r"expected the bytes of '.*a.h5', got others; run the same command again"):
        copy(source, tmp_path / "b.h5")
    copy(source, tmp_path / "b.h5")
    assert (tmp_path / "b.h5").read_bytes() == source.read_bytes()


# A source that grows


@pytest.mark.parametrize(
    ("first", "second"), [("a.zarr", "b.zarr"), ("a.zarr", "b.h5"), ("a.h5", "b.zarr"), ("a.h5", "b.h5")]
)
def test_a_growing_store_is_mirrored_and_finalized_when_it_is(first: str, second: str, tmp_path: Path) -> None:
    source, target, manifest = tmp_path / first, tmp_path / second, manifest_of()
    write_store(source, manifest, shards=1, finalize=False)
    result = copy(source, target)
    assert (result.num_sealed_rows, result.content_digest) == (8, None)
    with StoreWriter.open(source, manifest) as writer:
        writer.write_shard(2, *shard_of(manifest, 2))
    assert copy(source, target).num_sealed_rows == 8 + 6
    with open_store(source) as one, open_store(target) as two:
        assert one.sealed_shards() == two.sealed_shards() == (0, 2)
    with StoreWriter.open(source, manifest) as writer:
        writer.write_shard(1, *shard_of(manifest, 1))
        digest = writer.finalize()
    assert copy(source, target).content_digest == digest
    assert verify(target).ok
    if first == second == "a.zarr":
        assert files_of(target) == files_of(source)


def test_a_store_without_a_sealed_shard_is_not_copied(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of(), shards=0, finalize=False)
    with pytest.raises(NotSealedError, match="expected a sealed shard, got none yet; wait until one is sealed"):
        copy(source, tmp_path / "b.zarr")
    assert not (tmp_path / "b.zarr").exists()


def test_a_mirror_that_was_finalized_by_itself_takes_no_more(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of(), shards=1, finalize=False)
    copy(source, tmp_path / "b.zarr")
    with StoreWriter.open(tmp_path / "b.zarr", manifest_of()) as writer:
        writer.finalize(partial=True)
    write_store(source, manifest_of())
    with pytest.raises(PathError, match=r"expected a copy that goes on, got one that is finalized without shard [12]"):
        copy(source, tmp_path / "b.zarr")


def test_a_dump_that_went_on_in_the_mirror_is_not_mixed_with_another(tmp_path: Path) -> None:
    manifest = manifest_of()
    source = write_store(tmp_path / "a.zarr", manifest, shards=1, finalize=False)
    copy(source, tmp_path / "b.zarr")
    with StoreWriter.open(tmp_path / "b.zarr", manifest) as writer:
        arrays, quarantine = shard_of(manifest, 1)
        arrays["entropy"][0] += 1
        writer.write_shard(1, arrays, quarantine)
    write_store(source, manifest)
    with pytest.raises(MismatchError, match=r"expected shard 1 as '.*a.zarr' has it, got other targets; give another"):
        copy(source, tmp_path / "b.zarr")


# What is refused


@pytest.mark.parametrize("suffix", ["zarr", "h5"])
def test_nothing_is_copied_over_another_store(suffix: str, tmp_path: Path) -> None:
    source = write_store(tmp_path / f"a.{suffix}", manifest_of())
    for name in ("b.zarr", "b.h5"):
        other = write_store(tmp_path / name, manifest_of(encoding=Dense("float32")))
        with pytest.raises(MismatchError, match=r"expected nothing, or this c[a-z]+( begun)?, got another store; give"):
            copy(source, other)
    begun = write_store(tmp_path / "c.h5", manifest_of(), shards=1, finalize=False)
    with pytest.raises(MismatchError, match=r"expected nothing, or this c[a-z]+( begun)?, got"):
        copy(source, begun)
    (tmp_path / "d.zarr").mkdir()
    (tmp_path / "d.zarr" / "photo.jpg").write_bytes(b"x")
    with pytest.raises(PathError, match="expected nothing, or a logit store, got something else"):
        copy(source, tmp_path / "d.zarr")
    with pytest.raises(PathError, match="expected a path outside"):
        copy(source, source)


def test_a_damaged_object_is_not_copied(source: Path, tmp_path: Path) -> None:
    flip(source / "values" / "c" / "1" / "0")
    with pytest.raises(DamageError, match="'values', shard 1: expected the sealed digest of values/c/1/0 to hold, got"):
        copy(source, tmp_path / "b.zarr")
    assert not list(tmp_path.glob("b.zarr/values/c/1/*"))
    with open_store(tmp_path / "b.zarr") as begun:
        assert not begun.finalized


def test_a_missing_or_longer_object_is_not_copied(source: Path, tmp_path: Path) -> None:
    path = source / "values" / "c" / "1" / "0"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DamageError, match=r"values/c/1/0: expected at most \d+ bytes, got"):
        copy(source, tmp_path / "b.zarr")
    path.unlink()
    with pytest.raises(DamageError, match="array 'values', shard 1: expected its object, got none"):
        copy(source, tmp_path / "b.zarr")


def test_damaged_metadata_is_not_copied(source: Path, tmp_path: Path) -> None:
    path = source / "lse" / "zarr.json"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(DamageError, match=r"lse/zarr.json: expected the metadata that the store was made with, got"):
        copy(source, tmp_path / "b.zarr")


def test_a_damaged_hdf5_file_is_not_copied(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.h5", manifest_of())
    with h5py.File(source, "r+") as file:
        file["lse"][0] = 3
    with pytest.raises(DamageError, match=r"a.h5: expected the digest of the whole file to hold, got another"):
        copy(source, tmp_path / "b.h5")
    assert not (tmp_path / "b.h5").exists()


# At a URL


def test_a_store_goes_to_a_bucket_and_back_and_stays_the_same(source: Path, s3: S3Server, tmp_path: Path) -> None:
    url = s3.url("a.zarr")
    there = copy(source, url)
    copy(url, tmp_path / "b.zarr")
    copy(s3.http(url), tmp_path / "c.zarr")
    assert files_of(tmp_path / "b.zarr") == files_of(tmp_path / "c.zarr") == files_of(source)
    assert (
        there.content_digest
        == copy(url, s3.url("d.zarr")).content_digest
        == copy(url, tmp_path / "e.h5").content_digest
    )
    assert copy(source, url).num_moved == 0


def test_a_growing_store_is_mirrored_to_a_bucket_though_the_server_fails_now_and_then(
    source: Path, s3: S3Server, tmp_path: Path
) -> None:
    begun, url = write_store(tmp_path / "g.zarr", manifest_of(), shards=2, finalize=False), s3.url("g.zarr")
    s3.ask(fail=3, status=503)
    assert copy(begun, url).num_sealed_rows == 16
    write_store(begun, manifest_of())
    s3.ask(cut=2)
    assert copy(begun, url).content_digest == copy(source, tmp_path / "b.zarr").content_digest
    assert verify(url).ok


def test_a_url_that_can_not_be_a_store_is_refused(source: Path, s3: S3Server, tmp_path: Path) -> None:
    for one, two in ((source, s3.url("x.h5")), (s3.url("x.h5"), tmp_path / "b.zarr")):
        with pytest.raises(PathError, match="expected a Zarr store at a URL, got the name of an HDF5 file"):
            copy(one, two)
    with pytest.raises(RemoteError, match="expected a storage that can be written, got HTTP, which is for reading"):
        copy(source, s3.http(s3.url("b.zarr")))
    url = s3.url("c.zarr")
    copy(source, url)
    with pytest.raises(PathError, match="expected a path outside"):
        copy(url, f"{url}/inside.zarr")


# The command


def test_the_command_says_what_was_copied_and_the_digest(source: Path, tmp_path: Path) -> None:
    with open_store(source) as store:
        digest = store.content_digest
    result = CliRunner().invoke(main, ["copy", str(source), str(tmp_path / "b.zarr")])
    assert result.exit_code == 0
    assert "b.zarr: 22 rows, " in result.stdout
    assert f"content digest {digest}, as {source} has it" in result.stdout


def test_the_command_says_that_a_growing_store_may_be_copied_again(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of(), shards=2, finalize=False)
    result = CliRunner().invoke(main, ["copy", str(source), str(tmp_path / "b.zarr")])
    assert result.exit_code == 0
    assert "b.zarr: 16 of 22 rows, " in result.stdout
    assert "run the same command again to take what is sealed since" in result.stdout


def test_a_source_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["copy", str(tmp_path / "a.zarr"), str(tmp_path / "b.zarr")])
    assert result.exit_code == 1
    assert "a.zarr: expected a logit store, got no such path" in result.stderr
