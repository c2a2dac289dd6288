"""Old stores still open, and still say what they said."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from storage.reader import open_store
from storage.records import content_digest
from storage.writer import StoreWriter

GOLDEN = Path(__file__).parent
DIGESTS = {
    "v1.0/dense.zarr": "9a4a3d4fc78e93ba6e342ff6740fe512e860ec3347cb8ece9b5c203bc5c3783f",
    "v1.0/topk.zarr": "a8a2899880fd268a48ae4489fef3543dab300e4b1eb03196d74078d049557071",
    "v1.0/dense.h5": "1f35a84a9d753dd4fc9077d1b844c4f322baaf63aea2f76637d04f4e43c35c6e",
    "v1.0/topk.h5": "f3ec3ac05eda997f916b4ac8004e997ce5553105eaf997d0b8a3a844778d66a0",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_a_golden_store_opens_and_says_what_it_said(name: str) -> None:
    with open_store(GOLDEN / name) as store:
        assert store.content_digest == DIGESTS[name]
        seals = [store.check_shard(shard) for shard in store.sealed_shards()]
        store.backend.check_final()
        assert content_digest(store.manifest, seals) == DIGESTS[name]
        assert [entry.row for entry in store.quarantine()] == [5, 17]
        start, stop = store.layout.shard_bounds(2)
        arrays = store.read([spec.name for spec in store.manifest.arrays], start, stop)
        whole = arrays["status"] == 0
        logprobs = store.manifest.encoding.logprobs(arrays, 4.0, store.manifest.temperatures)
        np.testing.assert_allclose(np.exp(logprobs[whole]).sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("name", DIGESTS)
def test_a_golden_store_can_be_resumed_by_its_own_manifest(name: str, tmp_path: Path) -> None:
    copy = tmp_path / Path(name).name
    if (GOLDEN / name).is_dir():
        shutil.copytree(GOLDEN / name, copy)
    else:
        shutil.copy(GOLDEN / name, copy)
    with open_store(copy) as store:
        manifest = store.manifest
    with StoreWriter.open(copy, manifest) as writer:
        assert writer.owed_shards() == ()
        assert writer.finalize() == DIGESTS[name]


def test_golden_stores_are_small() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.rglob("v*/**/*") if path.is_file()) < 100_000
