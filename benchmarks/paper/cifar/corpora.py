"""The corpora of the experiment, cut from CIFAR-100: Parquet files in the run's folder.

    python -m benchmarks.paper.cifar.corpora --cifar DIR --run RUN

    train.parquet     45,000 training rows: what the generalist learns from
    held.parquet      5,000 training rows that no model learns from: every setting is chosen by them
    seen.parquet      5,000 of the rows of train.parquet: how a model does on what it has learnt from
    transfer.parquet  what is labelled once and what everything else learns from: the rows of train.parquet, each as it
                      is and in crops and flips, so that stored targets and augmentation go together

The test rows choose nothing.
"""

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.paper.cifar.images import crop_and_flip, pad, read_images

NUM_HELD_PER_CLASS = 50
_GROUP_ROWS = 5000


def rows_per_class(classes_N: NDArray[np.int64], per_class: int, seed: int) -> NDArray[np.int64]:
    """Ascending rows, `per_class` of every class, drawn by a seed.

    Raises:
        ValueError: a class has no more than that.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(classes_N):
        rows = np.flatnonzero(classes_N == label)
        if len(rows) <= per_class:
            raise ValueError(f"class {label}: expected more than {per_class} rows, got {len(rows)}; take fewer")
        chosen.append(rng.choice(rows, per_class, replace=False))
    return np.sort(np.concatenate(chosen))


def split_cifar(cifar: Path, run: Path, per_class: int = NUM_HELD_PER_CLASS, seed: int = 0) -> None:
    """Write train, held and seen, each at once; where they are, they stay.

    Raises:
        FileNotFoundError: the folder has no training rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if all((run / f"{name}.parquet").exists() for name in ("train", "held", "seen")):
        return
    files = sorted(cifar.glob("train-*.parquet"))
    if not files:
        raise FileNotFoundError(f"{cifar}: expected train-*.parquet, got none; give the folder of CIFAR-100")
    table: Any = pa.concat_tables([pq.read_table(file) for file in files])
    is_held = np.zeros(table.num_rows, bool)
    is_held[rows_per_class(table.column("fine_label").to_numpy(), per_class, seed)] = True
    train = table.filter(pa.array(~is_held))
    seen = train.take(pa.array(rows_per_class(train.column("fine_label").to_numpy(), per_class, seed)))
    run.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("held", table.filter(pa.array(is_held))), ("seen", seen)):
        _write(part, run / f"{name}.parquet")


def write_transfer(run: Path, num_copies: int, seed: int = 0) -> None:
    """Write the transfer rows, at once; where they are, they stay.

    Args:
        run: folder of train.parquet.
        num_copies: rows for each training row, the first the image as it is.
        seed: of crops and flips.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if (run / "transfer.parquet").exists():
        return
    table: Any = pq.read_table(run / "train.parquet")
    images, _ = read_images(run / "train.parquet")
    padded = pad(images)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for copy in range(num_copies):
        moved = crop_and_flip(padded, generator) if copy else images
        columns = {name: table.column(name) for name in ("fine_label", "coarse_label")}
        columns["key"] = pa.array([f"{key}/{copy}" for key in table.column("key").to_pylist()])
        columns["image"] = pa.array([_png(image) for image in moved.permute(0, 2, 3, 1).numpy()], pa.binary())
        parts.append(pa.table(columns, metadata=table.schema.metadata))
    _write(pa.concat_tables(parts), run / "transfer.parquet")


def main() -> None:
    """Write the corpora."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="folder of train-*.parquet and test-0.parquet")
    parser.add_argument("--run", type=Path, required=True, help="where they go")
    parser.add_argument("--copies", type=int, default=3, help="transfer rows for each training row")
    args = parser.parse_args()
    split_cifar(args.cifar, args.run)
    write_transfer(args.run, args.copies)


def _png(image_HWC: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image_HWC)).save(stream, "png", compress_level=1)
    return stream.getvalue()


def _write(table: Any, path: Path) -> None:
    import pyarrow.parquet as pq

    unfinished = path.with_suffix(".partial")
    pq.write_table(table, unfinished, row_group_size=_GROUP_ROWS)
    unfinished.replace(path)


if __name__ == "__main__":
    main()
