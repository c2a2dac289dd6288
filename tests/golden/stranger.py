"""A stranger's reader: written from storage/FORMAT.md, with none of this project's code.

It reads stores with numpy, json, hashlib and zarr (or h5py).
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr
from numpy.typing import NDArray

Array = NDArray[Any]
GOLDEN = Path(__file__).parent
FORMAT = Path(__file__).parents[2] / "storage" / "FORMAT.md"
HEAD = ("weight.npy", "bias.npy")


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def checked(record: bytes) -> Any:
    value = json.loads(record)
    digest = value.pop("record_sha256")
    assert digest == hashlib.sha256(canonical(value)).hexdigest()
    assert record == canonical({**value, "record_sha256": digest}) + b"\n"
    return value


class Stranger:
    """Records, arrays and head of a store."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arrays: dict[str, Array] = {}
        self.head: tuple[Array, Array | None] | None = None
        if path.suffix == ".zarr":
            self.manifest_bytes = (path / "manifest.json").read_bytes()
            final = (path / "final.json").read_bytes()
            seals = [seal.read_bytes() for seal in sorted((path / "seals").iterdir())]
            group = zarr.open_group(path, mode="r")
            assert group.attrs["format"] == "logit-store"
            for name in checked(seals[0])["arrays"]:
                self.arrays[name] = np.asarray(group[name])
            heads = {name: path / "head" / name for name in HEAD}
            self.head_bytes = {name: file.read_bytes() for name, file in heads.items() if file.exists()}
        else:
            with h5py.File(path, "r") as file:
                self.manifest_bytes = file["records/manifest.json"][()].tobytes()
                final = file["records/final.json"][()].tobytes()
                seals = file["records/seals"][()].tobytes().splitlines(keepends=True)
                self.arrays = {name: file[name][()] for name in file if name != "records"}
                heads = file.get("records/head", {})
                self.head_bytes = {name: heads[name][()].tobytes() for name in HEAD if name in heads}
        self.manifest = json.loads(self.manifest_bytes)
        if self.head_bytes:
            weight, *bias = (np.load(io.BytesIO(data), allow_pickle=False) for data in self.head_bytes.values())
            self.head = (weight, bias[0] if bias else None)
        self.final = checked(final)
        self.seal_bytes = seals
        self.seals = [checked(seal) for seal in seals]

    @property
    def sealed(self) -> Array:
        """Rows of sealed shards."""
        return np.concatenate([np.arange(seal["start"], seal["stop"]) for seal in self.seals])

    @property
    def rows(self) -> Array:
        """Rows of sealed shards that have targets."""
        whole: Array = self.sealed[self.arrays["status"][self.sealed] == 0]
        return whole


def log_softmax(values_NC: Array) -> Array:
    values_NC = values_NC - values_NC.max(axis=1, keepdims=True)
    logprobs_NC: Array = values_NC - np.log(np.exp(values_NC).sum(axis=1, keepdims=True))
    return logprobs_NC


def snippets() -> Any:
    """The functions that the page shows, as they stand there."""
    names: dict[str, Any] = {"json": json, "hashlib": hashlib, "np": np}
    blocks = FORMAT.read_text().split("```python\n")[1:]
    assert len(blocks) == 6
    for block in blocks:
        exec(block.split("```")[0], names)
    return names
