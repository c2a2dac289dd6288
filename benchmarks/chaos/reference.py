"""What the store must be in the end: two undisturbed runs in one process, on a local disk, without any proxy."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from storage.arrays import Arrays
from storage.console import progress
from storage.reader import open_store
from storage.writer import StoreWriter
from teacherdump.config import DumpConfig
from teacherdump.dump import dump_shard
from teacherdump.run import run
from teacherdump.source import open_source, prepare

LEFT_OUT = "left out"


@dataclass(frozen=True, eq=False)
class Reference:
    """What an undisturbed run gives.

    Attributes:
        content_digest: of the store in which the deadly sample was left out, and nothing else.
        deadly_row: the row of that sample.
        refused: kind of what is wrong, by row; with the deadly one.
        arrays: of an undisturbed run over a teacher that spares itself, in which the deadly sample has a target.
    """

    content_digest: str
    deadly_row: int
    refused: Mapping[int, str]
    arrays: Arrays


def make_reference(config: DumpConfig, kinds: Mapping[str, str], folder: Path) -> Reference:
    """Run the teacher undisturbed, once over everything and once without the deadly sample.

    Args:
        config: of the run that is going to be disturbed; its store is not looked at.
        kinds: what is wrong with a sample, by the stem of its key.
        folder: where two stores may lie.

    Raises:
        AssertionError: the two differ in more than the deadly sample's row.
    """
    folder.mkdir(parents=True)
    with environment_of(CHAOS_SPARE="1", CHAOS_PAUSE_S="0"):
        spared = replace(config, out=str(folder / "spared.zarr"))
        run(spared)
        source = open_source(replace(config, out=str(folder / "without.zarr")))
        rows = {source.corpus.key(row): row for row in range(source.corpus.num_samples)}
        refused = {row: kinds[stem_of(key)] for key, row in rows.items() if stem_of(key) in kinds}
        (deadly_row,) = (row for row, kind in refused.items() if kind == "deadly")
        job = prepare(source, lambda _: None)
        with (
            StoreWriter.open(source.config.out, job.manifest) as writer,
            progress(writer.layout.num_rows, "rows", "reference", quiet=True) as bar,
        ):
            for shard in writer.owed_shards():
                dump_shard(job, writer, shard, bar, {deadly_row: LEFT_OUT})
            digest = writer.finalize()
            without = read_all(source.config.out)
    arrays = read_all(spared.out)
    differing = differing_rows(arrays, without)
    assert set(differing) <= {deadly_row}, f"expected no other row than {deadly_row} to differ, got {differing}"
    return Reference(digest, deadly_row, refused, arrays)


def stem_of(key: str) -> str:
    """The name of a sample without folder and suffix, as both kinds of corpus have it in their keys."""
    return key.rpartition("/")[2].partition(".")[0]


def read_all(path: str) -> Arrays:
    """Every array of a store, all rows."""
    with open_store(path) as store:
        return store.read([spec.name for spec in store.manifest.arrays], 0, store.layout.num_rows)


def differing_rows(one: Arrays, other: Arrays) -> list[int]:
    """Rows in which any array differs by a bit."""
    assert set(one) == set(other)
    rows: set[int] = set()
    for name, values in one.items():
        num_rows = len(values)
        differs_NB = values.view(np.uint8).reshape(num_rows, -1) != other[name].view(np.uint8).reshape(num_rows, -1)
        rows.update(np.flatnonzero(differs_NB.any(axis=1)).tolist())
    return sorted(rows)


@contextlib.contextmanager
def environment_of(**values: str) -> Iterator[None]:
    """The environment of this process with some variables set."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
