"""Check a whole series: each member as a store, and the records that make them one."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from storage.backends import backend_for
from storage.errors import DamageError, MismatchError, PathError, StoreError
from storage.reader import Store
from storage.scan.passes import Progress
from storage.scan.verification import Damage, VerifyResult, verify
from storage.series import check_member
from storage.series_records import (
    FilesRecord,
    SeriesRecord,
    join_path,
    member_name,
    read_files_record,
    read_series_record,
    records_at,
    series_digest,
)


def verify_series(path: str | Path, num_workers: int | None, progress: Progress | None) -> VerifyResult:
    """Everything that is damaged in a series; shards and rows have the numbers of the series."""
    records = records_at(path)
    try:
        shared = read_series_record(records, path)
        assert shared is not None
    except DamageError as error:
        note = "nothing else could be checked: the record of the series is damaged"
        return VerifyResult(str(path), (Damage.of(error),), notes=(note,))
    total = VerifyResult(str(path), (), finalized=True, num_rows=0)
    digests: list[str | None] = []
    damage, number, unfinished, first_shard = [], 0, None, 0
    while True:
        try:
            found = read_files_record(records, path, number)
        except DamageError as error:
            damage.append(Damage.of(error))  # how many rows the member has is not known, so neither is what follows
            break
        if found is None:
            break
        number += 1
        if not found.num_rows:
            continue
        if unfinished is not None:
            damage.append(
                Damage(f"{unfinished}: expected a finalized store, since member {found.member} is there, got none")
            )
        member = str(join_path(path, member_name(found.member, shared.suffix)))
        result = _verify_member(member, shared, found, str(path), num_workers, progress)
        unfinished = None if result is not None and result.finalized else member
        if result is not None:
            digests.append(result.content_digest)
            total = _joined(total, result, found, first_shard)
        first_shard += -(-found.num_rows // int(shared.shared["shard_rows"]))
    known = [digest for digest in digests if digest is not None]
    notes = total.notes
    if total.num_rows == 0 and not damage:
        notes += ("no member is there yet",)
    return replace(
        total,
        damage=(*damage, *total.damage),
        notes=notes,
        finalized=bool(digests) and total.finalized,
        content_digest=series_digest(known) if known and len(known) == len(digests) and not damage else None,
    )


def _verify_member(
    path: str,
    shared: SeriesRecord,
    files: FilesRecord,
    series: str,
    num_workers: int | None,
    progress: Progress | None,
) -> VerifyResult | None:
    """What a member's check found, or None where it is not begun."""
    try:
        result = verify(path, num_workers=num_workers, progress=progress)
    except PathError:
        return None
    try:
        with Store(backend_for(path)) as store:
            check_member(store, shared, files, series)
    except MismatchError as error:
        return replace(result, damage=(Damage(str(error)), *result.damage))
    except StoreError:
        pass  # told among its damage
    return result


def _joined(total: VerifyResult, result: VerifyResult, files: FilesRecord, first_shard: int) -> VerifyResult:
    """The findings of the members so far, and of the next one."""
    assert total.num_rows is not None
    first_row = total.num_rows
    return replace(
        total,
        damage=total.damage + tuple(_shifted(result.damage, first_shard)),
        warnings=total.warnings + result.warnings,
        notes=total.notes + tuple(f"{result.path}: {note}" for note in result.notes),
        finalized=total.finalized and result.finalized,
        num_rows=first_row + files.num_rows,
        num_sealed_rows=total.num_sealed_rows + result.num_sealed_rows,
        missing_rows=total.missing_rows
        + tuple((start + first_row, stop + first_row) for start, stop in result.missing_rows),
        num_shards=total.num_shards + result.num_shards,
        num_chunks=total.num_chunks + result.num_chunks,
    )


def _shifted(damage: tuple[Damage, ...], first_shard: int) -> Iterator[Damage]:
    for entry in damage:
        yield entry if entry.shard is None else replace(entry, shard=entry.shard + first_shard)
