"""What of a store a copy takes: some rows, some arrays, fewer entries. Pure."""

import re
from dataclasses import dataclass, replace

from storage.encodings import Encoding, TopK
from storage.errors import MismatchError, NotSealedError
from storage.manifest import FIRST_ROW, Manifest
from storage.reader import Store
from storage.scan.reencoding import Reencode, shortened

HARD_TARGETS = ("hard_target", "hard_target_logprob")
TOKENS = ("position_ids", "token_ids")


@dataclass(frozen=True)
class Selection:
    """What a copy takes; None takes all.

    Attributes:
        rows: the first row, and the row after the last; None in either place is the store's own end.
        arrays: names. What may be left out and is not named is left out: the hard targets of a classifier, or the
            tokens of sequences; the other arrays come along whether they are named or not.
        k: entries of a topk store.
    """

    rows: tuple[int | None, int | None] | None = None
    arrays: tuple[str, ...] | None = None
    k: int | None = None


@dataclass(frozen=True)
class Chosen:
    """What a selection is of one store.

    Attributes:
        start: the source's row that row 0 will be.
        stop: the source's row after the last.
        encoding: of the copy.
        left_out: names of arrays that it does not have.
        come_along: names of arrays that were not named, and that every such store has.
    """

    start: int
    stop: int
    encoding: Encoding
    left_out: tuple[str, ...]
    come_along: tuple[str, ...]


def parse_rows(text: str) -> tuple[int | None, int | None]:
    """A range of rows.

    Raises:
        ValueError: it is none.

    Example:
        >>> parse_rows("100:200"), parse_rows(":1000")
        ((100, 200), (None, 1000))
    """
    match = re.fullmatch(r"\s*(\d{0,18}):(\d{0,18})\s*", text)
    if match is None or not (match[1] or match[2]):
        raise ValueError(f"rows: expected START:STOP, such as 0:1000, got {text!r}")
    start, stop = (int(number) if number else None for number in match.groups())
    return start, stop


def choose(store: Store, selection: Selection) -> Chosen | None:
    """What a selection is of a store; None where it is all of it.

    Raises:
        ValueError: rows or arrays that the store does not have.
        MismatchError: fewer entries of a store that is not topk, or more than it keeps.
    """
    manifest = store.manifest
    start, stop = _rows(manifest, selection)
    left_out, come_along = _arrays(manifest, selection)
    encoding = _encoding(manifest, selection, store.path)
    if (start, stop) == (0, manifest.num_rows) and not left_out and encoding == manifest.encoding:
        return None
    return Chosen(start, stop, encoding, left_out, come_along)


def _rows(manifest: Manifest, selection: Selection) -> tuple[int, int]:
    start, stop = selection.rows or (None, None)
    start, stop = start or 0, manifest.num_rows if stop is None else stop
    if not 0 <= start < stop <= manifest.num_rows:
        raise ValueError(f"rows: expected a range inside 0:{manifest.num_rows}, got {start}:{stop}; choose rows of it")
    return start, stop


def _arrays(manifest: Manifest, selection: Selection) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names that are left out, and names that come along though they were not named."""
    if selection.arrays is None:
        return (), ()
    names, named = [spec.name for spec in manifest.arrays], set(selection.arrays)
    unknown = sorted(named - set(names))
    if unknown or not named:
        got = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"arrays: expected some of {', '.join(names)}, got {got}; name arrays of the store")
    pair = TOKENS if manifest.sequences is not None else HARD_TARGETS
    together = [name for name in pair if name in names] if set(pair) <= set(names) else []
    missing = [name for name in together if name not in named]
    if missing and len(missing) < len(together):
        raise ValueError(
            f"arrays: expected {' and '.join(together)} both or neither, got one of them; name {missing[0]} too, or "
            "leave both out"
        )
    return tuple(missing), tuple(name for name in names if name not in named and name not in missing)


def _encoding(manifest: Manifest, selection: Selection, where: str) -> Encoding:
    encoding, k = manifest.encoding, selection.k
    if k is None:
        return encoding
    if not isinstance(encoding, TopK):
        has_all = encoding.name in ("dense", "hidden")
        advice = f"make one of it: logitstore transcode --encoding topk --k {k}" if has_all else "leave --k out"
        raise MismatchError(f"{where}: expected a topk store to take fewer entries of, got {encoding.name}; {advice}")
    if k > encoding.k:
        raise MismatchError(
            f"{where}: expected at most the {encoding.k} entries that it keeps, got k = {k}; use a smaller k, or dump "
            "again with the teacher"
        )
    return replace(encoding, k=k)


def chosen_manifest(store: Store, chosen: Chosen, name: str) -> Manifest:
    """The manifest of what was chosen of a finalized store.

    Args:
        store: the source.
        chosen: of it.
        name: of the source, for the provenance.
    """
    there, is_part = store.manifest, (chosen.start, chosen.stop) != (0, store.manifest.num_rows)
    origin = {
        "content_digest": store.content_digest,
        "encoding": there.encoding.to_json(),
        "temperatures": list(there.temperatures),
    }
    sequences = there.sequences
    if sequences is not None and set(TOKENS) <= set(chosen.left_out):
        sequences = replace(sequences, has_tokens=False)
    return replace(
        there,
        num_rows=chosen.stop - chosen.start,
        encoding=chosen.encoding,
        corpus={**there.corpus, FIRST_ROW: there.first_row + chosen.start} if is_part else there.corpus,
        has_hard_targets=there.has_hard_targets and not set(HARD_TARGETS) <= set(chosen.left_out),
        sequences=sequences,
        provenance={**there.provenance, "copied_from": {"name": name}},
        format_version="",
        lineage=(*(there.lineage or ()), origin | ({"rows": [chosen.start, chosen.stop]} if is_part else {})),
    )


def rewriting_of(there: Manifest, chosen: Chosen) -> Reencode:
    """What makes the arrays of what was chosen."""
    encoding = chosen.encoding
    if isinstance(encoding, TopK) and encoding != there.encoding:
        return lambda flat, _: shortened(flat, there.temperatures, encoding, there.temperatures)
    return lambda flat, _: dict(flat)


def check_sealed_rows(store: Store, chosen: Chosen) -> None:
    """Refuse rows of which some have no targets for good, since the store was finalized without them.

    Raises:
        NotSealedError: there are some.
    """
    if (chosen.start, chosen.stop) == (0, store.manifest.num_rows):
        return  # the copy lacks the same shards
    sealed = frozenset(store.sealed_shards())
    for shard, first, end in store.layout.split(chosen.start, chosen.stop):
        if shard not in sealed:
            raise NotSealedError(
                f"{store.path}: expected rows {chosen.start} to {chosen.stop - 1} sealed, got rows {first} to "
                f"{end - 1} without targets; choose other rows"
            )
