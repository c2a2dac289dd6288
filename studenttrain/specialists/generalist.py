"""What the generalist says of the samples of a corpus: from a store that was made from it, or from a student.

Legend: N rows, C classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.arrays import Arrays
from storage.corpus import Batch, Corpus, check_digests
from storage.encodings import Dense, Hidden
from storage.errors import MismatchError, StudentError
from storage.manifest import FUSED, Manifest
from storage.reader import Store
from studenttrain.checks import check_class_names, weights_digest
from studenttrain.specialists.plan import SpecialistsPlan
from studenttrain.specialists.specialist import Specialist


def check_generalist_store(store: Store, plan: SpecialistsPlan, specialists: list[Specialist]) -> None:
    """Refuse a store that can't speak for the generalist of some specialists.

    Raises:
        MismatchError: it does not tell the probability of each class, or is of other classes, another preprocessing or
            another teacher.
        StudentError: it is of sequences.
    """
    manifest, where = store.manifest, f"store '{store.path}'"
    if manifest.sequences is not None:
        raise StudentError(
            f"{where}: expected one whose rows have a class, got sequences of tokens; give another store"
        )
    if manifest.num_classes != plan.num_classes:
        raise MismatchError(
            f"{where}: expected the plan's {plan.num_classes} classes, got {manifest.num_classes}; give the store of "
            "the specialists' generalist"
        )
    check_class_names(where, manifest.class_names, plan.class_names, "the plan of the specialists")
    if not isinstance(manifest.encoding, Dense | Hidden):
        raise MismatchError(
            f"{where}: expected dense or hidden, which tell the probability of every class, got "
            f"{manifest.encoding.name}: a specialist's classes are not all in it; dump the generalist again with "
            "--encoding dense"
        )
    _refuse_fused_with(manifest, specialists, where)
    _refuse_another_teacher(manifest, specialists, where)
    if dict(manifest.preprocess) != dict(specialists[0].card.preprocess):
        raise MismatchError(
            f"{where}: expected the preprocessing of the store that the specialists learned from, got another; give a "
            "store of the same generalist"
        )


def _members_of(manifest: Manifest) -> set[Any]:
    """Digests of what was fused into a store, the generalist among them; none where nothing was."""
    members = manifest.teacher.get("members")
    if manifest.teacher.get("kind") != FUSED or not isinstance(members, list | tuple):
        return set()
    return {member.get("digest") for member in members if isinstance(member, Mapping)}


def _refuse_another_teacher(manifest: Manifest, specialists: list[Specialist], where: str) -> None:
    """Refuse a store of another teacher than the one whose store the specialists learned from."""
    there = {manifest.teacher.get("digest"), *_members_of(manifest)}
    for number, specialist in enumerate(specialists):
        known = (specialist.card.specialist or {}).get("generalist")
        if known is not None and known not in there:
            raise MismatchError(
                f"{where}: expected what the generalist of specialist {number} said, got another teacher's; dump this "
                "corpus with the generalist that made the specialists' store"
            )


def _refuse_fused_with(manifest: Manifest, specialists: list[Specialist], where: str) -> None:
    """Refuse a store that these very specialists have a say in already: they would count twice."""
    there = _members_of(manifest)
    if not there:
        return
    for number, specialist in enumerate(specialists):
        if weights_digest(specialist.model.state_dict()) in there:
            raise MismatchError(
                f"{where}: expected what the generalist alone said, got one that specialist {number} was fused into "
                "already; give the generalist's store"
            )


def stored_logprobs(manifest: Manifest, arrays: Arrays, head: Any) -> NDArray[np.float64]:
    """The log-probabilities at T = 1 of rows of a store, float64 (N, C); NaN in those without targets.

    Args:
        manifest: of the store, dense or hidden.
        arrays: of the rows.
        head: of a store of hidden states; else None.
    """
    encoding = manifest.encoding
    with np.errstate(invalid="ignore"):  # rows without targets hold NaN
        if isinstance(encoding, Hidden):
            found_NC = encoding.logprobs(arrays, 1.0, manifest.temperatures, head)
        else:
            found_NC = encoding.logprobs(arrays, 1.0, manifest.temperatures)
    return found_NC.astype(np.float64)


def read_generalist(store: Store, corpus: Corpus, batch: Batch) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """What a store says of a batch of consecutive rows, log-probabilities (N, C), and their status (N,).

    Raises:
        CorpusMismatchError: a sample is not the one that its row was made from.
        NotSealedError: a row is not sealed.
    """
    start, stop = int(batch.rows_N[0]), int(batch.rows_N[-1]) + 1
    names = [spec.name for spec in store.manifest.arrays if spec.name in ("values", "value_range", "hidden")]
    arrays: Mapping[str, NDArray[Any]] = store.read(["status", "sample_digest", *names], start, stop)
    check_digests(arrays["sample_digest"], batch.digests_N, batch.rows_N, corpus, store.path)
    return stored_logprobs(store.manifest, arrays, store.head()), arrays["status"]


def batches_of(store: Store, shards: Sequence[int], batch_size: int) -> list[NDArray[np.int64]]:
    """The rows of some shards, a batch after the other, each of one shard."""
    bounds = [store.layout.shard_bounds(shard) for shard in shards]
    starts = [(first, stop) for start, stop in bounds for first in range(start, stop, batch_size)]
    return [np.arange(first, min(first + batch_size, stop)) for first, stop in starts]
