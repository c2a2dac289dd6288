"""What generalist and specialists say together, as a new store over the rows of the generalist's.

Legend: N rows, C classes.
"""

import contextlib
import hashlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from storage.arrays import STATUS_OK, Arrays
from storage.corpus import Batch, Corpus, Preprocess, check_digests
from storage.corpus.labels import NO_LABELS
from storage.corpus.parquet_columns import Columns
from storage.encodings import Dense, Encoding, TopK
from storage.encodings.values import ValueType
from storage.errors import MismatchError
from storage.exclusive import sole_run
from storage.manifest import FUSED, Manifest
from storage.reader import Store, open_one_store
from storage.records import canonical
from storage.scan import check_target
from storage.scan.ensemble import target_logprobs
from storage.scan.members import Member, SealedRows
from storage.sequences import ROW_ARRAYS
from storage.writer import StoreWriter
from studenttrain.checks import check_class_names, check_row_count, weights_digest
from studenttrain.distributed import choose_device
from studenttrain.evaluate import read_ahead
from studenttrain.preparation import check_student_input, default_readers, open_data
from studenttrain.specialists.fuse_options import FuseOptions, FuseResult
from studenttrain.specialists.fused import FusedClassifier, load_folder
from studenttrain.specialists.generalist import batches_of, check_generalist_store, stored_logprobs

Progress = Callable[[int], None]


@dataclass
class _Count:
    num_written: int = 0
    num_active: int = 0
    num_changed: int = 0
    residual: float = 0.0


def fuse_store(options: FuseOptions, *, progress: Callable[[int], Progress] | None = None) -> FuseResult:
    """Write the store of a generalist and its specialists, over the rows of the generalist's store.

    The generalist is not run: its store speaks for it. Shard by shard, each held against its seal and its samples, and
    checked again in the new store. Run again after a kill, it goes on where it stopped.

    Args:
        options: what is fused, and how it is kept.
        progress: called with the number of rows to go through, once all fits; what it gives is called with the number
            of rows that were done: each counts once when it is written, and once when it is checked.

    Raises:
        NotSealedError: the generalist's store is not finalized.
        StoreError: something can't be used, or things don't fit each other.
        ValueError: an option is out of range, or would be ignored.
    """
    with contextlib.ExitStack() as stack:
        member = Member(stack.enter_context(open_one_store(options.targets)))
        store = member.store
        plan, specialists = load_folder(options.specialists, options.phase)
        check_generalist_store(store, plan, specialists)
        classifier = FusedClassifier(
            specialists,
            plan.num_classes,
            active_top=options.active_top,
            tolerance=options.tolerance,
            device=choose_device(options.device),
        )
        columns = Columns(options.image_column, None)
        corpus = open_data(options.data, options.corpus_kind, NO_LABELS, options.array, None, store, columns)
        preprocess = Preprocess.from_json(store.manifest.preprocess)
        check_student_input(preprocess, corpus, "--data")
        check_class_names(
            f"corpus '{options.data}'", corpus.class_names, store.manifest.class_names, f"store '{store.path}'"
        )
        check_row_count(store, corpus)
        manifest = target_manifest(member, classifier, options)
        check_target(store.path, options.out, "fusion", lambda there: _is_of(there, manifest))
        advance = (lambda _: None) if progress is None else progress(2 * store.num_sealed_rows)
        count = _Count()
        with sole_run(options.out), StoreWriter.open(options.out, manifest) as writer:
            owed = set(writer.owed_shards())
            shards = [shard for shard in store.sealed_shards() if shard in owed]
            advance(store.num_sealed_rows - sum(_num_rows(store, shard) for shard in shards))
            readers = options.readers or default_readers()
            batches = read_ahead(corpus, batches_of(store, shards, options.batch_size), preprocess, readers)
            for shard in shards:
                _write_shard(shard, member, writer, classifier, corpus, batches, count, advance)
            digest = writer.finalize(partial=True, progress=advance)
            written = writer.store
            return FuseResult(
                path=str(options.out),
                content_digest=digest,
                source_digest=member.digest,
                encoding=manifest.encoding.to_json(),
                num_rows=written.num_sealed_rows,
                num_quarantined=written.num_quarantined,
                num_active=count.num_active,
                num_changed=count.num_changed,
                num_written=count.num_written,
                num_bytes=written.backend.num_bytes(),
                residual=count.residual,
                tolerance=options.tolerance,
            )


def _num_rows(store: Store, shard: int) -> int:
    start, stop = store.layout.shard_bounds(shard)
    return stop - start


def target_manifest(member: Member, classifier: FusedClassifier, options: FuseOptions) -> Manifest:
    """The manifest of the new store: the corpus, rows and shards of the generalist's, another teacher and encoding.

    Raises:
        ValueError: the encoding does not fit the classes.
    """
    there = member.manifest
    values: ValueType = options.values or (there.encoding.values if isinstance(there.encoding, Dense) else "float16")
    encoding: Encoding = Dense(values) if options.k is None else TopK(options.k, options.values or "float16")
    temperatures = options.temperatures or there.temperatures
    encoding.check(there.num_classes, temperatures)
    origin: dict[str, Any] = {
        "content_digest": member.digest,
        "encoding": there.encoding.to_json(),
        "temperatures": list(there.temperatures),
    }
    versions = {name: importlib.metadata.version(name) for name in ("logitstore", "torch", "numpy")}
    return replace(
        there,
        encoding=encoding,
        temperatures=temperatures,
        teacher=fused_identity(there, classifier),
        compressor=options.compressor or ("none" if options.k is None else "zstd"),
        provenance={
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "specialists": Path(options.specialists).name,
            "generalist": {"name": member.name, "provenance": dict(there.provenance)},
            "versions": versions,
            "device": classifier.device.type,
            "batch_size": options.batch_size,
        },
        format_version="",
        lineage=(*(there.lineage or ()), origin),
    )


def fused_identity(generalist: Manifest, classifier: FusedClassifier) -> dict[str, Any]:
    """Who the teacher of the new store is: the generalist's teacher, each specialist, and how they were fused."""
    teacher = generalist.teacher
    members: list[dict[str, Any]] = [{"digest": str(teacher.get("digest")), "kind": teacher.get("kind")}]
    members += [
        {
            "digest": weights_digest(specialist.model.state_dict()),
            "kind": "specialist",
            "arch": specialist.card.student,
            "classes": list(specialist.classes),
            "dustbin_shift": specialist.dustbin_shift,
        }
        for specialist in classifier.specialists
    ]
    identity: dict[str, Any] = {
        "kind": FUSED,
        "arch": teacher.get("arch"),
        "precision": teacher.get("precision"),
        "combine": None,
        "fusion": {"active_top": classifier.active_top, "tolerance": classifier.tolerance},
        "members": members,
    }
    return {"digest": hashlib.sha256(canonical(identity)).hexdigest()} | identity


def _is_of(there: Manifest, manifest: Manifest) -> bool:
    """Whether a manifest is of a fusion with the same generalist's store; what else differs the writer says."""
    is_fused = there.teacher.get("kind") == FUSED and bool(there.lineage)
    return is_fused and there.to_json().get("lineage") == manifest.to_json()["lineage"]


def _write_shard(
    shard: int,
    member: Member,
    writer: StoreWriter,
    classifier: FusedClassifier,
    corpus: Corpus,
    batches: Iterator[Batch],
    count: _Count,
    advance: Progress,
) -> None:
    """Fuse the rows of a shard and seal them, once what was read is held against the source's seal."""
    start, stop = member.store.layout.shard_bounds(shard)
    rows = SealedRows(member, start, stop)
    found = {spec.name: spec.full(stop - start) for spec in writer.manifest.arrays}
    done = start
    while done < stop:
        batch = next(batches)
        end = int(batch.rows_N[-1]) + 1
        arrays = rows.read(done, end)
        check_digests(arrays["sample_digest"], batch.digests_N, batch.rows_N, corpus, member.store.path)
        part = slice(done - start, end - start)
        for name, values in _fused_rows(member, writer.manifest, classifier, batch, arrays, count).items():
            found[name][part] = values
        advance(end - done)
        done = end
    rows.check()
    writer.write_shard(shard, found, member.store.seal(shard).quarantine)


def _fused_rows(
    member: Member, manifest: Manifest, classifier: FusedClassifier, batch: Batch, arrays: Arrays, count: _Count
) -> dict[str, NDArray[Any]]:
    """All arrays of the new store for a batch; rows without targets stay so, with what the old one says of them."""
    good_N = arrays["status"] == STATUS_OK
    lost = [position for position in batch.errors if good_N[position]]
    if lost:
        row = int(batch.rows_N[lost[0]])
        raise MismatchError(
            f"corpus of '{member.store.path}': row {row}: expected a sample that can be decoded, as at the dump, got "
            f"one that can't ({batch.errors[lost[0]]}); fuse where the store was made"
        )
    new = {spec.name: spec.full(len(good_N)) for spec in manifest.arrays}
    new |= {name: arrays[name] for name in ROW_ARRAYS & set(new)}
    if not good_N.any():
        return new
    generalist_NC = stored_logprobs(
        member.manifest, {name: it[good_N] for name, it in arrays.items()}, member.store.head()
    )
    fused = classifier.fuse(torch.from_numpy(batch.inputs[good_N]), torch.from_numpy(generalist_NC))
    count.num_written += int(good_N.sum())
    count.num_active += int(fused.active_NM.any(1).sum())
    count.num_changed += int((fused.logprobs_NC.argmax(1) != fused.generalist_NC.argmax(1)).sum())
    count.residual = max(count.residual, fused.result.residual)
    logits_NC = fused.logprobs_NC.cpu().numpy().astype(np.float32)
    made = manifest.encoding.encode(logits_NC, manifest.temperatures)
    if manifest.has_hard_targets:
        made["hard_target_logprob"] = target_logprobs(logits_NC, arrays["hard_target"][good_N])
    for name, values in made.items():
        new[name][good_N] = values
    return new
