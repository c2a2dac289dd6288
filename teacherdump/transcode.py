"""Write a store in another encoding, without the teacher: the store speaks for it.

Legend: N rows, P positions, R flat rows (N, or N P), C classes, K kept entries, T temperatures.

What a new store says is computed from what the old one holds, by the code that a dump uses. What that does not hold is
refused: a store can be made smaller, never richer. From dense or hidden rows the logits come back, on a device; a topk
row is cut on the host, since any k' < k is a prefix of it. torch is imported only where there are logits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from storage.arrays import Array, Arrays
from storage.encodings import Dense, Encoding, Hidden, Sample, TopK
from storage.encodings.sample import uniforms
from storage.encodings.values import ValueType
from storage.errors import MismatchError, NotSealedError
from storage.exclusive import sole_run
from storage.manifest import Compressor, Manifest, store_arrays
from storage.options import ascending_temperatures, check_choice
from storage.reader import Store, open_one_store
from storage.scan import check_target
from storage.scan.passes import Progress
from storage.scan.reencoding import Reencode, reencoded, shortened
from storage.writer import StoreWriter
from teacherdump.config import ENCODINGS, EncodingName
from teacherdump.plan import choose_layout

FINENESS: tuple[ValueType, ...] = ("uint8", "float16", "float32")  # what a value is stored in, the coarsest first
REACHABLE: Mapping[str, tuple[str, ...]] = {
    "dense": ("dense", "topk", "sample"),
    "hidden": ("hidden", "dense", "topk", "sample"),
    "topk": ("topk",),
    "sample": (),
}
LACKS = {
    "dense": "hidden states are not in it",
    "topk": "the classes that it did not keep are not in it",
    "sample": "its draws say nothing of what was not drawn",
}


@dataclass(frozen=True)
class TranscodeOptions:
    """What a store is written as; None is as the source has it, where the encoding stays.

    Attributes:
        encoding: `dense`, `topk`, `sample` or `hidden`.
        k: kept entries, with topk.
        draws: of a row, with sample.
        seed: of the draws; None is 0.
        temperatures: that the new store declares; none are those of the source, and for draws 1 where it has several.
        values: how a logit or hidden state is stored; None is float16, or what the source has where that is coarser.
        compressor: `none` or `zstd`; None is what a dump takes.
        device: where logits are computed: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        ValueError: an option is out of range, or would be ignored.
    """

    encoding: EncodingName | None = None
    k: int | None = None
    draws: int | None = None
    seed: int | None = None
    temperatures: tuple[float, ...] = ()
    values: ValueType | None = None
    compressor: Compressor | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, allowed in (("encoding", ENCODINGS), ("values", FINENESS), ("compressor", get_args(Compressor))):
            check_choice(name, getattr(self, name), allowed)
        object.__setattr__(self, "temperatures", ascending_temperatures(self.temperatures))


@dataclass(frozen=True)
class TranscodeResult:
    """What was written.

    Attributes:
        path: the new store.
        content_digest: of the new store.
        source_digest: of the old one; the new one's lineage ends with it.
        num_rows: sealed rows of both.
        num_bytes: of the new store on the disk.
        source_bytes: of the old one.
        notes: in what the new store is less exact than one that the teacher gave, a line each.
    """

    path: str
    content_digest: str
    source_digest: str
    num_rows: int
    num_bytes: int
    source_bytes: int
    notes: tuple[str, ...]


def transcode(
    source: str | Path, target: str | Path, options: TranscodeOptions, *, progress: Progress | None = None
) -> TranscodeResult:
    """Write a finalized store in another encoding.

    Shard by shard, each checked against its seal on the way and again in the new store. Run again after a kill, it goes
    on where it stopped. Who the teacher was, the corpus and the preprocessing stay; `lineage` names the source.

    Args:
        source: a finalized store.
        target: where the new one shall be; its suffix names the backend.
        options: what to write.
        progress: called with the number of rows: each row counts once when it is written, and once when it is checked.

    Raises:
        NotSealedError: the source is not finalized.
        MismatchError: the source does not hold what was asked for, or the target is another store.
        PathError: the target holds something else.
        DamageError: the source is damaged.
        ValueError: an option is out of range, or would be ignored.
    """
    with open_one_store(source) as store:
        digest = store.content_digest
        if digest is None:
            raise NotSealedError(
                f"{source}: expected a finalized store, got one that is not; "
                "finish the dump, or finalize at what is sealed: logitstore finalize --partial"
            )
        encoding, temperatures = choose_encoding(store.manifest, options, str(source))
        manifest = target_manifest(store, encoding, temperatures, options.compressor)
        check_target(source, target, "transcoding", lambda there: _origin(there) == digest)
        reencode = _build_reencode(store, encoding, temperatures, options.device)
        head = store.head() if isinstance(encoding, Hidden) else None
        advance = progress or (lambda _: None)
        with sole_run(target), StoreWriter.open(target, manifest, head) as writer:
            owed = set(writer.owed_shards())
            for shard in store.sealed_shards():
                seal = store.seal(shard)
                if shard in owed:
                    writer.write_shard(
                        shard, reencoded(store, seal.start, seal.stop, manifest, reencode), seal.quarantine
                    )
                advance(seal.stop - seal.start)
            written = writer.finalize(partial=True, progress=advance)
            num_bytes = writer.store.backend.num_bytes()
        return TranscodeResult(
            path=str(target),
            content_digest=written,
            source_digest=digest,
            num_rows=store.num_sealed_rows,
            num_bytes=num_bytes,
            source_bytes=store.backend.num_bytes(),
            notes=tuple(_notes(store.manifest.encoding, encoding)),
        )


def choose_encoding(manifest: Manifest, options: TranscodeOptions, where: str) -> tuple[Encoding, tuple[float, ...]]:
    """What the new store keeps, and at which temperatures.

    Args:
        manifest: of the source.
        options: what was asked for.
        where: the source, for messages.

    Raises:
        MismatchError: the source does not hold it.
        ValueError: an option is out of range, or would be ignored.
    """
    there = manifest.encoding
    name = options.encoding or there.name
    if name not in REACHABLE[there.name]:
        reachable = " or ".join(REACHABLE[there.name])
        advice = f"choose {reachable}, or dump" if reachable else "dump"
        raise MismatchError(
            f"{where}: expected a store to make {name} of, got {there.name}: {LACKS[there.name]}; {advice} again with "
            "the teacher"
        )
    _refuse_ignored(name, options)
    temperatures = options.temperatures or manifest.temperatures
    if name == "sample" and not options.temperatures and len(temperatures) > 1:
        temperatures = (1.0,)
    encoding = _encoding(name, there, options, where)
    encoding.check(manifest.num_classes, temperatures)
    missing = [value for value in temperatures if value not in manifest.temperatures]
    if isinstance(there, TopK) and missing:
        declared = ", ".join(f"{value:g}" for value in manifest.temperatures)
        raise MismatchError(
            f"{where}: expected temperatures that the store declares ({declared}), got {missing[0]:g}; its tail is "
            "known at these only: use one of them, or dump again with the teacher"
        )
    if encoding == there and temperatures == manifest.temperatures:
        raise ValueError(
            f"encoding: expected another than '{where}' has, got the same; to pack it otherwise: logitstore convert"
        )
    return encoding, temperatures


def _refuse_ignored(name: str, options: TranscodeOptions) -> None:
    for option, encoding in (("k", "topk"), ("draws", "sample"), ("seed", "sample")):
        value = getattr(options, option)
        if value is not None and name != encoding:
            raise ValueError(f"{option}: expected none with {name}, got {value}; it is of {encoding}: leave it out")
    if name == "sample" and options.values is not None:
        raise ValueError(f"values: expected none with sample, which keeps counts, got {options.values}; leave it out")


def _encoding(name: str, there: Encoding, options: TranscodeOptions, where: str) -> Encoding:
    if name == "sample":
        if options.draws is None:
            raise ValueError("draws: expected how many sample takes, got none; give --draws N")
        return Sample(options.draws, options.seed or 0)
    assert isinstance(there, Dense | TopK | Hidden)
    coarse: ValueType = "float16" if there.values == "float32" else there.values
    values: ValueType = options.values or (there.values if name == there.name else coarse)
    if FINENESS.index(values) > FINENESS.index(there.values):
        raise MismatchError(
            f"{where}: expected values no finer than it has ({there.values}), got {values}; nothing would become more "
            f"exact: use {there.values}, or dump again with the teacher"
        )
    if isinstance(there, Hidden) and name == "hidden":
        if values == "uint8":
            raise ValueError("values: expected float16 or float32 with hidden, got uint8; choose one of these")
        return replace(there, values=values)
    return Dense(values) if name == "dense" else TopK(_kept_entries(there, options.k, where), values)


def _kept_entries(there: Encoding, k: int | None, where: str) -> int:
    if isinstance(there, TopK):
        k = there.k if k is None else k
        if k > there.k:
            raise MismatchError(
                f"{where}: expected at most the {there.k} entries that it keeps, got k = {k}; use a smaller k, or dump "
                "again with the teacher"
            )
    if k is None:
        raise ValueError("k: expected how many entries topk keeps, got none; give --k N")
    return k


def _notes(there: Encoding, encoding: Encoding) -> list[str]:
    """What a reader of the new store should know that the encoding's own bound does not say."""
    if isinstance(there, Hidden):
        return [] if isinstance(encoding, Hidden) else [f"its logits come from hidden states: {there.error_bound}"]
    if not isinstance(there, Dense | TopK) or there.values == "float32":
        return []
    return [f"its logits come from {there.values} values: {there.error_bound.partition(';')[0]}"]


def target_manifest(
    store: Store, encoding: Encoding, temperatures: tuple[float, ...], compressor: Compressor | None
) -> Manifest:
    """The manifest of the new store: rows and shards as they are, chunks as they suit what is kept."""
    there = store.manifest
    arrays = store_arrays(encoding, there.num_classes, len(temperatures), there.has_hard_targets, there.sequences)
    num_positions = 1 if there.sequences is None else there.sequences.num_positions
    layout = choose_layout(there.num_rows, arrays, there.shard_rows, None, num_positions)
    origin = {
        "content_digest": store.content_digest,
        "encoding": there.encoding.to_json(),
        "temperatures": list(there.temperatures),
    }
    return replace(
        there,
        chunk_rows=layout.chunk_rows,
        encoding=encoding,
        temperatures=temperatures,
        compressor=compressor or ("zstd" if encoding.name in ("topk", "sample") else "none"),
        provenance={**there.provenance, "transcoded_from": {"name": Path(store.path).name}},
        format_version="",
        lineage=(*(there.lineage or ()), origin),
    )


def _origin(manifest: Manifest) -> str | None:
    """The content digest of the store that one was made of; None where a teacher gave it."""
    return str(manifest.lineage[-1]["content_digest"]) if manifest.lineage else None


def _build_reencode(store: Store, encoding: Encoding, temperatures: Sequence[float], device: str) -> Reencode:
    there, head = store.manifest, store.head()
    if isinstance(there.encoding, TopK):
        assert isinstance(encoding, TopK)
        return lambda flat, _: shortened(flat, there.temperatures, encoding, temperatures)
    from teacherdump.from_store import build_from_store

    given = build_from_store(there, head, encoding, temperatures, device)

    def reencode(flat: Arrays, rows_N: Array) -> dict[str, Array]:
        uniform_R = None
        if isinstance(encoding, Sample):
            num_positions = 1 if there.sequences is None else there.sequences.num_positions
            uniform_R = uniforms(encoding.seed, rows_N + there.first_row, num_positions)
        return given(flat, uniform_R)

    return reencode
