"""A batch as a store of each encoding: written, read back, decoded, and its bytes counted on the disk.

Legend: N sequences, P positions, Q = P + 1 tokens, R = N * P flat rows, C vocabulary entries.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.rate_distortion.text import LENGTH, VOCABULARY
from storage.arrays import STATUS_OK, Array
from storage.encodings import Encoding, HeadArrays, Hidden, Sample
from storage.encodings.sample import uniforms
from storage.head import head_digest
from storage.manifest import Manifest, store_arrays
from storage.reader import open_store
from storage.sequences import Sequences
from storage.writer import StoreWriter
from studenttrain.gpt import GPT
from studenttrain.targets import SoftTargets, build_targets, target_arrays, target_head
from teacherdump.plan import choose_layout
from teacherdump.sparsify import REFUSAL, TeacherRows, build_sparsify

TEMPERATURES = (1.0,)
SEQUENCES = Sequences(num_positions=LENGTH, has_tokens=True, tokenizer=None, num_padded=0)
LARGE_DUMP = 60_000  # sequences: what the chunks of a real dump are chosen for
COMMON = frozenset(
    {"status", "sample_digest", "max_logit", "lse", "entropy", "hard_target_logprob", "token_ids", "position_ids"}
)


@dataclass(frozen=True)
class Batch:
    """What the teacher says of some held-out sequences.

    Attributes:
        sequences_NQ: token ids, int64.
        logits_RC: of the teacher, float32.
        hidden_RW: that they were made from.
        teacher: who said it.
    """

    sequences_NQ: Tensor  # noqa: N815
    logits_RC: Tensor  # noqa: N815
    hidden_RW: Tensor  # noqa: N815
    teacher: GPT

    @classmethod
    @torch.no_grad()
    def of(cls, teacher: GPT, sequences_NQ: Tensor) -> "Batch":
        """The batch of some sequences, each one document."""
        hidden_RW = teacher.hidden(sequences_NQ[:, :-1]).flatten(0, 1)
        return cls(sequences_NQ, teacher.output_head().logits(hidden_RW), hidden_RW, teacher)


@dataclass(frozen=True)
class Stored:
    """A batch that was written and read back.

    Attributes:
        targets: decoded.
        encoding_bytes: a token, of the encoding's own arrays.
        common_bytes: a token, of those that every store keeps.
    """

    targets: SoftTargets
    encoding_bytes: float
    common_bytes: float

    @property
    def bytes_a_token(self) -> float:
        """Both."""
        return self.encoding_bytes + self.common_bytes


def store_batch(batch: Batch, encoding: Encoding) -> Stored:
    """Write a batch to a compressed Zarr store, as a dump does it, and read it."""
    head = None
    if isinstance(encoding, Hidden):
        head = HeadArrays(batch.teacher.head.weight.detach().numpy(), None)
        encoding = replace(encoding, head_sha256=head_digest(head))
    manifest = _manifest(len(batch.sequences_NQ), encoding)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "store.zarr")
        with StoreWriter.open(path, manifest, head) as writer:
            arrays = _arrays(batch, manifest)
            for shard in range(manifest.layout.num_shards):
                start, stop = manifest.layout.shard_bounds(shard)
                writer.write_shard(shard, {name: values[start:stop] for name, values in arrays.items()})
            writer.finalize()
        with open_store(path) as store:
            read = store.read(target_arrays(store.manifest), 0, manifest.num_rows)
            kept_head = store.head()
        given = target_head(encoding, kept_head) if isinstance(encoding, Hidden) and kept_head is not None else None
        targets = build_targets(manifest, read, 1.0, head=given)
        sizes = {spec.name: _folder_bytes(path / spec.name / "c") for spec in manifest.arrays}
    num_tokens = manifest.num_rows * LENGTH
    common = sum(size for name, size in sizes.items() if name in COMMON)
    return Stored(targets, (sum(sizes.values()) - common) / num_tokens, common / num_tokens)


def _manifest(num_rows: int, encoding: Encoding) -> Manifest:
    """Of a store with the chunks that a large dump would have, or all rows in one where those are larger."""
    arrays = store_arrays(encoding, VOCABULARY, len(TEMPERATURES), False, SEQUENCES)
    layout = choose_layout(LARGE_DUMP, arrays, num_positions=LENGTH)
    chunk_rows = min(layout.chunk_rows, num_rows)
    return Manifest(
        num_rows=num_rows,
        num_classes=VOCABULARY,
        shard_rows=-(-num_rows // chunk_rows) * chunk_rows,
        chunk_rows=chunk_rows,
        encoding=encoding,
        temperatures=TEMPERATURES,
        teacher={"digest": "0" * 64, "kind": "module", "arch": None, "precision": "fp32"},
        corpus={"kind": "tokens", "fingerprint": "0" * 64, "num_samples": num_rows},
        preprocess={},
        class_names=None,
        has_hard_targets=False,
        compressor="zstd",
        provenance={},
        sequences=SEQUENCES,
    )


def _arrays(batch: Batch, manifest: Manifest) -> Mapping[str, Array]:
    """Every array of the store, from the code that a dump runs."""
    encoding, num_rows = manifest.encoding, manifest.num_rows
    uniform_R = None
    if isinstance(encoding, Sample):
        uniform_R = torch.from_numpy(uniforms(encoding.seed, np.arange(num_rows), LENGTH))
    rows = TeacherRows(
        batch.logits_RC,
        batch.sequences_NQ[:, 1:].flatten(),
        uniform_R,
        batch.hidden_RW if isinstance(encoding, Hidden) else None,
    )
    found = build_sparsify(encoding, TEMPERATURES)(rows)
    assert not found.pop(REFUSAL).any()
    per_row = {
        "status": np.full(num_rows, STATUS_OK),
        "sample_digest": np.random.default_rng(0).integers(0, 2**64, num_rows, np.uint64),
        "token_ids": batch.sequences_NQ.numpy(),
        "position_ids": np.broadcast_to(np.arange(LENGTH + 1), (num_rows, LENGTH + 1)),
    }
    values = per_row | {name: tensor.numpy() for name, tensor in found.items()}
    return {
        spec.name: values[spec.name].reshape(num_rows, *spec.row_shape).astype(spec.dtype) for spec in manifest.arrays
    }


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
