"""A part of a store is audited against its own samples of the whole corpus, and its draws against their own numbers."""

from pathlib import Path
from typing import Any

import pytest

from storage.reader import open_store
from storage.scan import Selection, copy
from teacherdump.audit import AuditOptions, audit, config_for
from teacherdump.config import DumpConfig
from teacherdump.run import run
from tests.teacherdump.small_dumps import source_options


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("classes", {"encoding": "sample", "draws": 9}),
        ("sequences", {"encoding": "topk", "k": 20, "store_tokens": False, "sequence_length": 16}),
    ],
)
def test_a_part_of_a_store_is_faithful_to_its_samples_of_the_whole_corpus(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    given, path, part = source_options(tmp_path, kind), tmp_path / "a.zarr", tmp_path / "part.zarr"
    run(DumpConfig(**given, **options, out=str(path), shard_rows=16, temperatures=(1.0,)))
    copy(path, part, Selection(rows=(21, 42)))
    with open_store(part) as store:
        config = config_for(store.manifest, out=str(part), **given)
    result = audit(part, config, AuditOptions(21))
    assert result.num_rows == 21
    assert result.num_scored > 0
    assert result.reasons == ()
    assert result.failures == ()
