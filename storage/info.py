"""What a store is: figures for a program, and about ten lines for a person."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from storage.console import format_bytes, format_count, format_plural
from storage.encodings import Hidden, Sample, TopK
from storage.manifest import COMBINED, FIRST_ROW
from storage.reader import Store, open_store
from storage.series import Series

SHOWN_NAMES = 6
SHOWN_CHARACTERS = 72


def info(path: str | Path) -> dict[str, Any]:
    """What a store is, as a JSON object. Quick: no row is read, and no seal either once the store is finalized.

    Raises:
        PathError: there is no store at the path.
        FormatVersionError: it is of a newer format version.
        DamageError: a record was changed.
    """
    with open_store(path) as store:
        return _info(store)


def _info(store: Store) -> dict[str, Any]:
    manifest = store.manifest
    sealed, sequences = store.sealed_shards(), manifest.sequences
    return {
        "path": store.path,
        "content_digest": store.content_digest,
        "finalized": store.finalized,
        "complete": len(sealed) == store.layout.num_shards,
        "num_rows": manifest.num_rows,
        "num_sealed_rows": store.num_sealed_rows,
        "num_positions": 1 if sequences is None else sequences.num_positions,
        "num_quarantined": store.num_quarantined,
        "encoding": manifest.encoding.to_json(),
        "temperatures": list(manifest.temperatures),
        "num_classes": manifest.num_classes,
        "class_names": None if manifest.class_names is None else list(manifest.class_names),
        "has_hard_targets": manifest.has_hard_targets,
        "sequences": None if sequences is None else sequences.to_json(),
        "lineage": None if manifest.lineage is None else [dict(origin) for origin in manifest.lineage],
        "combined": manifest.extra.get(COMBINED),
        "teacher": dict(manifest.teacher),
        "corpus": dict(manifest.corpus),
        "preprocess": dict(manifest.preprocess),
        "format_version": manifest.format_version,
        "num_bytes": sum(member.backend.num_bytes() for member in store.members),
        "compressor": manifest.compressor,
        "num_shards": store.layout.num_shards,
        "num_sealed_shards": len(sealed),
        "shard_rows": manifest.shard_rows,
        "chunk_rows": manifest.chunk_rows,
        "provenance": dict(manifest.provenance),
        **({"members": _members(store)} if isinstance(store, Series) else {}),
    }


def quarantine(path: str | Path) -> list[dict[str, Any]]:
    """Row, key and reason of each row without targets in sealed shards, in order. Reads every seal.

    Raises:
        PathError: there is no store at the path.
        DamageError: a record was changed.
    """
    with open_store(path) as store:
        return [vars(entry) for entry in store.quarantine()]


def quarantine_text(entries: list[dict[str, Any]]) -> str:
    """What `quarantine` gave, a line a row."""
    if not entries:
        return "  no row is without targets"
    return "\n".join(f"  row {entry['row']}  {' '.join(entry['key'].split())}: {entry['reason']}" for entry in entries)


def _members(series: Series) -> list[dict[str, Any]]:
    """The stores of a series, and how many files of the corpus each of them covers."""
    return [
        {
            "name": series.member_path(files).rsplit("/", 1)[-1],
            "content_digest": member.content_digest,
            "num_rows": files.num_rows,
            "num_sealed_rows": member.num_sealed_rows,
            "num_files": len(files.files),
            "num_left_out": files.num_left_out,
        }
        for files, member in zip(series.files, series.members, strict=True)
    ]


def info_text(figures: Mapping[str, Any]) -> str:
    """What `info` gave, in about ten lines."""
    lines = [f"{figures['path']}: a logit store, {_state(figures)}"]
    lines += [f"  {name:<9} {text}" for name, text in _facts(figures) if text]
    return "\n".join(lines)


def _state(figures: Mapping[str, Any]) -> str:
    if "members" in figures:
        return _state_of_series(figures)
    if figures["finalized"]:
        return "finalized" if figures["complete"] else "finalized at a part of its rows"
    if figures["complete"]:
        return "all rows sealed, not finalized yet"
    command = "command" if figures["lineage"] else "teacherdump run"  # of rows that were taken from other stores
    return f"not finished: the same {command} goes on with it"


def _state_of_series(figures: Mapping[str, Any]) -> str:
    members = figures["members"]
    text = f"a series of {format_plural(len(members), 'store')}"
    if figures["finalized"]:
        return f"{text}, each finalized; more may follow"
    return f"{text}; {members[-1]['name']} is not finished: the same teacherdump run --follow goes on with it"


def _facts(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "rows", _rows(figures)
    yield "encoding", _encoding(figures)
    yield ("classes", _classes(figures)) if figures["sequences"] is None else ("tokens", _tokens(figures))
    teacher, corpus = figures["teacher"], figures["corpus"]
    yield "teacher", _joined([*_plain(teacher, "digest"), _digest("sha256", teacher.get("digest"))])
    samples = corpus.get("num_samples")
    counted = f"{format_count(samples)} samples" if isinstance(samples, int) else ""
    first = corpus.get(FIRST_ROW)
    if first is not None:
        last = first + figures["num_rows"] - 1
        counted = f"samples {format_count(first)} to {format_count(last)} of {counted}".removesuffix(" of ")
    others = _plain(corpus, "fingerprint", "num_samples", FIRST_ROW)
    yield "corpus", _joined([*others, counted, _digest("fingerprint", corpus.get("fingerprint"))])
    yield "input", _joined(_named(figures["preprocess"]))
    layout = (
        f"{format_count(figures['num_sealed_shards'])} of {format_plural(figures['num_shards'], 'shard')} of "
        f"{format_count(figures['shard_rows'])} rows, chunks of {format_count(figures['chunk_rows'])}, "
        f"compressor {figures['compressor']}, format {figures['format_version']}"
    )
    yield "layout", layout
    yield "size", _size(figures)
    yield "lineage", _joined([_origin(origin) for origin in figures["lineage"] or ()])
    yield "combined", _combined(figures["combined"])
    if "members" in figures:
        files = sum(member["num_files"] for member in figures["members"])
        left_out = sum(member["num_left_out"] for member in figures["members"])
        what = f"{format_plural(files, 'file')} of the corpus"
        yield "members", f"{what}, {format_count(left_out)} samples left out" if left_out else what
    yield "made", _joined(_named(figures["provenance"]))
    yield "digest", figures["content_digest"] or "none until it is finalized"


def _rows(figures: Mapping[str, Any]) -> str:
    total, sealed = figures["num_rows"], figures["num_sealed_rows"]
    text = format_count(total) if sealed == total else f"{format_count(sealed)} of {format_count(total)} sealed"
    if figures["sequences"] is not None:
        positions = figures["num_positions"]
        text += f", sequences of {format_count(positions)}: {format_count(sealed * positions)} positions"
    refused = figures["num_quarantined"]
    of_them = "of them" if figures["sequences"] is None else "rows"
    return f"{text}, {format_count(refused)} {of_them} without targets" if refused else text


def _encoding(figures: Mapping[str, Any]) -> str:
    options = dict(figures["encoding"])
    name = options.pop("name")
    declared = ", ".join(f"{value:g}" for value in figures["temperatures"])
    if name == Sample.name:
        return f"{name} {format_plural(options['draws'], 'draw')} at T = {declared}"
    if name == Hidden.name:
        kept = _hidden(options, figures["num_classes"])
    else:
        values = options.pop("values")
        kept = " ".join([name, *(f"{key}={value}" for key, value in options.items()), str(values)])
    return f"{kept}, exact at T = {declared}" if name == TopK.name else f"{kept}, any T (statistics at {declared})"


def _hidden(options: Mapping[str, Any], num_classes: int) -> str:
    """`hidden 384 x float16 + head 50,257 x 384`, and what the head has beside its weight."""
    width = format_count(options["width"])
    text = f"{Hidden.name} {width} x {options['values']} + head {format_count(num_classes)} x {width}"
    text += " and bias" if options["has_bias"] else ""
    text += "" if options["scale"] == 1 else f", scale {options['scale']:g}"
    return text if options["soft_cap"] is None else f"{text}, soft cap {options['soft_cap']:g}"


def _tokens(figures: Mapping[str, Any]) -> str:
    """Vocabulary and tokenizer of sequences, and whether the tokens are there."""
    sequences = figures["sequences"]
    padded = sequences["num_padded"]
    return _joined(
        [
            f"vocabulary {format_count(figures['num_classes'])}",
            f"{format_count(padded)} more outputs of the teacher cut off" if padded else "",
            _digest("tokenizer", sequences["tokenizer"]) or "tokenizer not known",
            "stored" if sequences["has_tokens"] else "not stored: a student needs the corpus",
        ]
    )


def _origin(origin: Mapping[str, Any]) -> str:
    """`from dense, digest 0123456789abcdef`."""
    encoding = origin.get("encoding")
    name = encoding.get("name") if isinstance(encoding, Mapping) else None
    return f"from {name or 'a store'} {_digest('digest', origin.get('content_digest'))}".rstrip()


def _combined(combined: Any) -> str:
    """`of 2 stores, kept probabilities within 0.01, entropy within 0.05`."""
    if not isinstance(combined, Mapping):
        return ""
    names = {"probability_within": "kept probabilities", "entropy_within": "entropy", "max_logit_within": "max_logit"}
    bounds = [(names[name], combined[name]) for name in names if isinstance(combined.get(name), float | int)]
    said = [f"{what} within {value:g}" for what, value in bounds if value]
    return _joined([f"of {combined.get('num_stores')} stores", *(said or ["exact up to rounding"])])


def _classes(figures: Mapping[str, Any]) -> str:
    text = format_count(figures["num_classes"])
    names = figures["class_names"]
    if names is not None:
        shown = names if len(names) <= SHOWN_NAMES else [*names[: SHOWN_NAMES - 2], "...", names[-1]]
        text += ": " + _clip(", ".join(shown))
    return f"{text}; with hard targets" if figures["has_hard_targets"] else text


def _size(figures: Mapping[str, Any]) -> str:
    text = format_bytes(figures["num_bytes"])
    rows = figures["num_sealed_rows"]
    if not rows:
        return text
    text += f", {figures['num_bytes'] / rows:,.1f} bytes a row"
    if figures["sequences"] is None:
        return text
    return f"{text}, {figures['num_bytes'] / rows / figures['num_positions']:,.1f} bytes a position"


def _plain(value: Mapping[str, Any], *but: str) -> list[str]:
    """The scalar values of an object, without their names."""
    found = [entry for name, entry in value.items() if name not in but]
    return [
        _clip(str(entry)) for entry in found if isinstance(entry, str | int | float) and not isinstance(entry, bool)
    ]


def _named(value: Mapping[str, Any]) -> list[str]:
    """The values of an object that say something, with their names."""
    pairs = [(name, entry) for name, entry in value.items() if entry is not None and not isinstance(entry, Mapping)]
    return [f"{name} {_clip(_brief(entry))}" for name, entry in pairs if name != "version"]


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_brief, value)) + "]"
    return str(value)


def _digest(label: str, digest: Any) -> str:
    return f"{label} {digest[:16]}" if isinstance(digest, str) else ""


def _clip(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def _joined(parts: list[str]) -> str:
    return ", ".join(part for part in parts if part)
