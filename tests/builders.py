"""Small corpora and stores on disk, for the tests of every part."""

import gzip
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from storage.corpus import Corpus, sample_digests
from storage.encodings import Dense
from storage.manifest import Manifest
from storage.writer import StoreWriter

Array = NDArray[Any]


def random_pixels(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    """Random bytes of a shape."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def image_bytes(pixels: Array, suffix: str = ".png", **options: Any) -> bytes:
    """An image file of pixels (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); options go to Pillow's `save`."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    buffer = io.BytesIO()
    formats = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
    Image.fromarray(pixels).save(buffer, formats[suffix.lower()], **options)
    return buffer.getvalue()


def write_image_folder(
    folder: Path,
    per_class: int = 3,
    class_names: Sequence[str] = ("ant", "bee", "cat"),
    size: tuple[int, int] = (8, 8),
    suffix: str = ".png",
    channels: int = 3,
) -> Path:
    """A folder of random images, `CLASS/000.png`, ...; flat, `000.png`, ..., where there are no class names."""
    for number, name in enumerate(class_names or [""]):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            pixels = random_pixels(*size, channels, seed=1000 * number + index)
            (folder / name / f"{index:03d}{suffix}").write_bytes(image_bytes(pixels, suffix))
    return folder


def idx_bytes(values: Array) -> bytes:
    """An IDX file of unsigned bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes()


def write_idx(
    folder: Path,
    num_samples: int = 20,
    num_classes: int = 10,
    size: tuple[int, int] = (6, 5),
    compressed: bool = True,
    name: str = "train",
) -> Path:
    """`NAME-images-idx3-ubyte(.gz)` with its labels beside it; the path of the images."""
    folder.mkdir(parents=True, exist_ok=True)
    images = random_pixels(num_samples, *size)
    labels = np.random.default_rng(1).integers(0, num_classes, num_samples, dtype=np.uint8)
    suffix = ".gz" if compressed else ""
    paths = [folder / f"{name}-images-idx3-ubyte{suffix}", folder / f"{name}-labels-idx1-ubyte{suffix}"]
    for path, values in zip(paths, (images, labels), strict=True):
        data = idx_bytes(values)
        path.write_bytes(gzip.compress(data) if compressed else data)
    return paths[0]


def write_npz(
    path: Path, num_samples: int = 20, num_features: int = 6, num_classes: int = 4, has_labels: bool = True
) -> Path:
    """A .npz with `x`, float32 (num_samples, num_features), and hard targets `y`."""
    generator = np.random.default_rng(2)
    arrays: dict[str, Any] = {"x": generator.normal(size=(num_samples, num_features)).astype(np.float32)}
    if has_labels:
        arrays["y"] = generator.integers(0, num_classes, num_samples)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


def write_store(
    path: Path,
    corpus: Corpus,
    num_classes: int = 10,
    shard_rows: int = 8,
    preprocess: Mapping[str, Any] | None = None,
    shards: Sequence[int] | None = None,
    finalize: bool = False,
) -> Path:
    """A store of random logits for a corpus, with its digests and hard targets.

    Args:
        path: `.zarr` or `.h5`.
        corpus: what its rows are made from.
        num_classes: classes of the logits; at least as many as the corpus has.
        shard_rows: rows of a shard, an even number.
        preprocess: for the manifest.
        shards: those that are sealed; None seals all.
        finalize: whether it is finalized; then all shards must be sealed.
    """
    names = corpus.class_names
    manifest = Manifest(
        num_rows=corpus.num_samples,
        num_classes=num_classes if names is None else len(names),
        shard_rows=shard_rows,
        chunk_rows=shard_rows // 2,
        encoding=Dense("float32"),
        temperatures=(1.0,),
        teacher={"digest": "0" * 64, "kind": "weights", "arch": "mlp:1-1", "precision": "fp32"},
        corpus={"kind": corpus.kind, "fingerprint": corpus.fingerprint, "num_samples": corpus.num_samples},
        preprocess=preprocess or {},
        class_names=names,
        has_hard_targets=corpus.hard_targets is not None,
        compressor="none",
        provenance={},
    )
    generator = np.random.default_rng(3)
    with StoreWriter.open(path, manifest) as writer:
        for shard in range(manifest.layout.num_shards):
            start, stop = manifest.layout.shard_bounds(shard)
            logits_NC = generator.normal(size=(stop - start, manifest.num_classes)).astype(np.float32)
            arrays = {spec.name: spec.full(stop - start) for spec in manifest.arrays}
            arrays |= manifest.encoding.encode(logits_NC, manifest.temperatures)
            arrays["status"][:] = 0
            arrays["sample_digest"][:] = sample_digests(corpus, start, stop)
            if corpus.hard_targets is not None:
                arrays["hard_target"][:] = corpus.hard_targets[start:stop]
                arrays["hard_target_logprob"][:] = -1
            if shards is None or shard in shards:
                writer.write_shard(shard, arrays)
        if finalize:
            writer.finalize()
    return path
