"""Old stores still open, and still say what they said."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from storage.encodings import Hidden
from storage.reader import open_store
from storage.records import MANIFEST, content_digest, manifest_bytes
from storage.scan import verify
from storage.sequences import flatten_positions
from storage.writer import StoreWriter

GOLDEN = Path(__file__).parent
DIGESTS = {
    "v1.0/dense.zarr": "9a4a3d4fc78e93ba6e342ff6740fe512e860ec3347cb8ece9b5c203bc5c3783f",
    "v1.0/topk.zarr": "a8a2899880fd268a48ae4489fef3543dab300e4b1eb03196d74078d049557071",
    "v1.0/dense.h5": "1f35a84a9d753dd4fc9077d1b844c4f322baaf63aea2f76637d04f4e43c35c6e",
    "v1.0/topk.h5": "f3ec3ac05eda997f916b4ac8004e997ce5553105eaf997d0b8a3a844778d66a0",
    "v1.1/topk.zarr": "739bacf831da9c4f70683b764e8a4b8fbb1825d8d8287e2336634ffde1a04b70",
    "v1.1/topk.h5": "8071b30a9acbb795a52d825ce7dc362f3e3cb32bdfc9b1d4c259357c3219f327",
    "v1.1/sample.zarr": "4124a7e01918b35a09bea3d20a01b694b83e9907100a1fda584623fbf118dd91",
    "v1.1/sample.h5": "25b8d4a6f01fd78ead95dd4df6de96a49679a0ba208159e1bb210ce5537e197d",
    "v1.1/hidden.zarr": "35abdd77b2df0d9420d33c35ddd97cdb29fe94bd1448976d52b7a284cd10d7da",
    "v1.1/hidden.h5": "28e2a97a129697b98b34bae0453ae04693e4e51bee55c5931b9d399b48702ce2",
}
REFUSED = {"v1.0": [5, 17], "v1.1": [1, 4]}
# sha256 of every file of version 1.0, its path and its bytes, in the order of the paths: they are never made again
FILES_OF_1_0 = "235ed291842b4e7a9a12ad4e76b26bd819b6a4e644137b54b0f7b46f51e8b7d9"


def test_the_golden_stores_of_version_1_0_are_those_that_were_released() -> None:
    state = hashlib.sha256()
    for path in sorted((GOLDEN / "v1.0").rglob("*")):
        if path.is_file():
            state.update(path.relative_to(GOLDEN).as_posix().encode() + b"\n" + path.read_bytes())
    assert state.hexdigest() == FILES_OF_1_0


@pytest.mark.parametrize("name", DIGESTS)
def test_a_golden_store_opens_and_says_what_it_said(name: str) -> None:
    with open_store(GOLDEN / name) as store:
        manifest = store.manifest
        assert store.content_digest == DIGESTS[name]
        assert f"v{manifest.format_version}" == name.split("/", maxsplit=1)[0]
        seals = [store.check_shard(shard) for shard in store.sealed_shards()]
        store.backend.check_final()
        assert content_digest(manifest, seals) == DIGESTS[name]
        sealed = [row for seal in seals for row in range(seal.start, seal.stop)]
        assert [entry.row for entry in store.quarantine()] == [row for row in REFUSED[name[:4]] if row in sealed]
        start, stop = store.layout.shard_bounds(manifest.layout.num_shards - 1)
        arrays = store.read([spec.name for spec in manifest.arrays], start, stop)
        whole = {row: values[arrays["status"] == 0] for row, values in arrays.items()}
        flat = flatten_positions(manifest.sequences, whole)
        temperature = manifest.temperatures[-1]
        if isinstance(manifest.encoding, Hidden):
            logprobs = manifest.encoding.logprobs(flat, temperature, manifest.temperatures, store.head())
        else:
            logprobs = manifest.encoding.logprobs(flat, temperature, manifest.temperatures)
        np.testing.assert_allclose(np.exp(logprobs).sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("name", DIGESTS)
def test_nothing_is_damaged_in_a_golden_store(name: str) -> None:
    result = verify(GOLDEN / name)
    assert (result.damage, result.warnings) == ((), ())


@pytest.mark.parametrize("name", DIGESTS)
def test_a_golden_store_can_be_resumed_by_its_own_manifest(name: str, tmp_path: Path) -> None:
    copy = tmp_path / Path(name).name
    if (GOLDEN / name).is_dir():
        shutil.copytree(GOLDEN / name, copy)
    else:
        shutil.copy(GOLDEN / name, copy)
    with open_store(copy) as store:
        manifest = store.manifest
        assert manifest_bytes(manifest) == store.backend.get_record(MANIFEST)
    with StoreWriter.open(copy, manifest) as writer:
        assert writer.owed_shards() == ()
        assert writer.finalize() == DIGESTS[name]


def test_golden_stores_are_small() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.rglob("v*/**/*") if path.is_file()) < 200_000
