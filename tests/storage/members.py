"""Stores of several teachers over the same rows, for the tests of what goes over more than one store."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from storage.arrays import STATUS_NOT_FINITE, STATUS_OK, STATUS_UNDECODABLE, Array
from storage.encodings import Encoding, Sample
from storage.manifest import Manifest
from storage.reader import open_store
from storage.records import QuarantineEntry
from storage.writer import StoreWriter
from tests.storage.scan_stores import all_tokens_of, hard_targets_of, manifest_of
from tests.storage.soft_targets import (
    encode_rows,
    hard_target_logprobs,
    num_positions_of,
    sequence_arrays,
    teacher_says,
)


def says(manifest: Manifest, seed: int) -> Array:
    """Logits (R, C) of the teacher of a seed."""
    return teacher_says(manifest, manifest.num_rows, np.random.default_rng(seed))[0]


def member_manifest(seed: int, encoding: Encoding, **fields: Any) -> Manifest:
    """The manifest of a teacher's store."""
    teacher = {"digest": f"{seed:02x}" * 32, "kind": "weights", "arch": "mlp:1-1", "precision": "fp32"}
    return manifest_of(encoding=encoding, **({"teacher": {**teacher, "combine": None, "members": []}} | fields))


def write_member(
    path: Path,
    seed: int,
    encoding: Encoding,
    *,
    undecodable: tuple[int, ...] = (),
    not_finite: tuple[int, ...] = (),
    unread: tuple[int, ...] = (),
    other_samples: tuple[int, ...] = (),
    other_targets: tuple[int, ...] = (),
    logits: Array | None = None,
    shards: tuple[int, ...] | None = None,
    finalize: bool = True,
    **fields: Any,
) -> Path:
    """A store of the teacher of a seed.

    Args:
        path: where.
        seed: of the teacher.
        encoding: of the store.
        undecodable: rows without targets.
        not_finite: more such rows.
        unread: of those that are undecodable, the rows whose bytes could not be read.
        other_samples: rows made of another sample.
        other_targets: rows with another hard target.
        logits: what the teacher says (R, C); None is `says`.
        shards: that are sealed; None is all.
        finalize: whether it is finalized.
        fields: of the manifest.
    """
    manifest = member_manifest(seed, encoding, **fields)
    num_positions = num_positions_of(manifest)
    logits_RC = says(manifest, seed) if logits is None else logits
    with StoreWriter.open(path, manifest) as writer:
        for shard in range(manifest.layout.num_shards) if shards is None else shards:
            start, stop = manifest.layout.shard_bounds(shard)
            flat = logits_RC[start * num_positions : stop * num_positions]
            arrays = encode_rows(manifest, np.arange(start, stop), flat, None)
            arrays["sample_digest"] = np.arange(1, manifest.num_rows + 1, dtype=np.uint64)[start:stop] * np.uint64(97)
            arrays["status"] = np.full(stop - start, STATUS_OK, np.uint8)
            if manifest.has_hard_targets:
                arrays["hard_target"] = hard_targets_of(manifest)[start:stop]
                arrays["hard_target_logprob"] = hard_target_logprobs(flat, arrays["hard_target"])
            if manifest.sequences is not None:
                tokens = {name: values[start:stop] for name, values in all_tokens_of(manifest).items()}
                arrays |= sequence_arrays(manifest, tokens, flat)
            quarantine = []
            for row in range(start, stop):
                here = row - start
                arrays["sample_digest"][here] += np.uint64(row in other_samples)
                if row in other_targets:
                    arrays["hard_target"][here] = 0 if arrays["hard_target"][here] else 1
                if row in undecodable or row in not_finite:
                    status = STATUS_UNDECODABLE if row in undecodable else STATUS_NOT_FINITE
                    kept = {"sample_digest", "hard_target"}
                    kept |= {"token_ids", "position_ids"} if status == STATUS_NOT_FINITE else set()
                    for spec in manifest.arrays:
                        if spec.name not in kept:
                            arrays[spec.name][here] = spec.full(1)[0]
                    arrays["status"][here] = status
                    arrays["sample_digest"][here] *= np.uint64(row not in unread)
                    quarantine.append(QuarantineEntry(row, f"sample-{row}", f"refused by teacher {seed}"))
            writer.write_shard(shard, arrays, quarantine)
        if finalize:
            writer.finalize(partial=True)
    return path


Make = Callable[..., Path]


def maker(folder: Path) -> Make:
    """What writes members' stores into a folder, once for each set of options; they are not to be changed."""
    made: dict[str, Path] = {}

    def member(seed: int, encoding: Encoding, **options: Any) -> Path:
        key = repr((seed, encoding, {name: getattr(it, "tolist", lambda it=it: it)() for name, it in options.items()}))
        if key not in made:
            made[key] = write_member(folder / f"{len(made)}.zarr", seed, encoding, **options)
        return made[key]

    return member


def read_all(path: Path) -> dict[str, Array]:
    """Every array of a complete store."""
    with open_store(path) as store:
        return store.read([spec.name for spec in store.manifest.arrays], 0, store.manifest.num_rows)


def draws_with(seed: int, draws: int = 20) -> Sample:
    """An encoding of draws."""
    return Sample(draws, seed)
