"""Whatever is done to a store, in whatever order, the ones on disk do as the one in memory does."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from storage.backends import Backend
from storage.errors import NotSealedError, PathError
from storage.reader import Store
from storage.writer import StoreWriter
from tests.contracts.small import (
    ENCODINGS,
    LATER,
    assert_same,
    compressor_of,
    create,
    make_backend,
    names_of,
    shard_arrays,
    small_manifest,
)

FIELDS: dict[str, dict[str, Any]] = {name: {"encoding": encoding} for name, encoding in ENCODINGS.items()} | LATER


class Crashed(BaseException):
    """The writer was killed."""


class Stores(RuleBasedStateMachine):
    """One writer for each of three stores, in step."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.writers: dict[str, StoreWriter] = {}

    @initialize(
        num_rows=st.integers(1, 30),
        chunk_rows=st.integers(1, 4),
        chunks=st.integers(1, 3),
        name=st.sampled_from(sorted(FIELDS)),
        is_compressed=st.booleans(),
    )
    def create(self, num_rows: int, chunk_rows: int, chunks: int, name: str, is_compressed: bool) -> None:
        self.kinds = ("memory", "zarr-zstd", "hdf5-none") if is_compressed else ("memory", "zarr-none", "hdf5-zstd")
        self.fields: dict[str, Any] = {
            "num_rows": num_rows,
            "chunk_rows": chunk_rows,
            "shard_rows": chunk_rows * chunks,
        } | FIELDS[name]
        self.backends = {kind: make_backend(kind, self.folder) for kind in self.kinds}
        self.reopen()

    def manifest_of(self, kind: str) -> Any:
        return small_manifest(**self.fields, compressor=compressor_of(kind))

    @rule()
    def reopen(self) -> None:
        for writer in self.writers.values():
            writer.close()
        with mock.patch.object(os, "fsync"):
            self.writers = {kind: create(self.backends[kind](), self.manifest_of(kind)) for kind in self.kinds}

    def shard(self, number: int) -> int:
        return number % self.writers["memory"].layout.num_shards

    @rule(number=st.integers(0, 99), seed=st.integers(0, 3))
    def write(self, number: int, seed: int) -> None:
        shard = self.shard(number)
        outcomes = set()
        for writer in self.writers.values():
            arrays, quarantine = shard_arrays(writer.manifest, shard, seed)
            with mock.patch.object(os, "fsync"):
                try:
                    writer.write_shard(shard, arrays, quarantine)
                    outcomes.add("written")
                except PathError:
                    outcomes.add("refused")
        assert len(outcomes) == 1
        assert (outcomes == {"refused"}) == self.writers["memory"].finalized

    @precondition(lambda self: not self.writers["memory"].finalized)
    @rule(number=st.integers(0, 99), seed=st.integers(4, 6), seal_fails=st.booleans())
    def crash_before_the_seal(self, number: int, seed: int, seal_fails: bool) -> None:
        shard = self.shard(number)

        def killed(self: Backend, *_: Any) -> Any:
            raise Crashed

        step = "put_record" if seal_fails else "shard_objects"
        for writer in self.writers.values():
            arrays, quarantine = shard_arrays(writer.manifest, shard, seed)
            with (
                mock.patch.object(os, "fsync"),
                mock.patch.object(type(writer.store.backend), step, killed),
                contextlib.suppress(Crashed),
            ):
                writer.write_shard(shard, arrays, quarantine)
        self.reopen()

    @rule(partial=st.booleans())
    def finalize(self, partial: bool) -> None:
        digests = set()
        for writer in self.writers.values():
            with mock.patch.object(os, "fsync"):
                try:
                    digests.add(writer.finalize(partial))
                except NotSealedError:
                    digests.add("not sealed")
        assert len(digests) == 1

    @rule(first=st.integers(0, 99), second=st.integers(0, 99), is_fresh=st.booleans())
    def read(self, first: int, second: int, is_fresh: bool) -> None:
        num_rows = self.fields["num_rows"]
        start, stop = sorted((first % (num_rows + 1), second % (num_rows + 1)))
        found = []
        for kind in self.kinds:
            store = Store(self.backends[kind]()) if is_fresh else self.writers[kind].store
            try:
                found.append(store.read(names_of(store.manifest), start, stop))
            except NotSealedError:
                found.append({})
            if is_fresh and kind != "memory":
                store.close()
        assert_same(found[1], found[0])
        assert_same(found[2], found[0])

    @invariant()
    def all_say_the_same(self) -> None:
        if not self.writers:
            return
        model = self.writers["memory"]
        for writer in self.writers.values():
            assert writer.sealed_shards() == model.sealed_shards()
            assert writer.owed_shards() == model.owed_shards()
            assert writer.finalized == model.finalized
            assert writer.store.num_sealed_rows == model.store.num_sealed_rows
            assert writer.store.quarantine() == model.store.quarantine()

    def teardown(self) -> None:
        for writer in self.writers.values():
            writer.close()
        shutil.rmtree(self.folder)


TestStores = Stores.TestCase
TestStores.settings = settings(
    max_examples=12, stateful_step_count=14, deadline=None, suppress_health_check=list(HealthCheck)
)
