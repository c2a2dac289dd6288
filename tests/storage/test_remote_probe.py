"""Runs that begin the same store at the same moment, or were killed as they began it, hold up nobody."""

from storage.backends import backend_for
from storage.remote import open_place
from storage.writer import StoreWriter
from tests.contracts.small import small_manifest, write
from tests.s3 import S3Server


def test_a_probe_that_a_kill_left_behind_is_passed_over_and_cleared_away(s3: S3Server) -> None:
    url = s3.url("out.zarr")
    place = open_place(url)
    place.put("zarr.json.0123.probe", b"1")
    with StoreWriter.open(url, small_manifest()) as writer:
        assert place.get("zarr.json.0123.probe") == b"1"  # it may be another run's, at this moment
        write(writer)
        writer.finalize()
    assert not [entry.key for entry in place.list() if "probe" in entry.key]


def test_a_store_that_another_run_began_just_now_is_gone_on_with(s3: S3Server) -> None:
    url, manifest = s3.url("out.zarr"), small_manifest()
    late = backend_for(url)
    assert not late.exists()
    with StoreWriter.open(url, manifest) as writer:
        write(writer, 0)
        late.create(manifest)
        assert not late.put_record("manifest.json", b"another")
        assert writer.store.check_shard(0).shard == 0
    late.close()
