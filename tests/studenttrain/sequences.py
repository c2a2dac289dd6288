"""A small corpus of tokens with a store of what a table says of it, for the tests of the trainer."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.arrays import STATUS_NOT_FINITE
from storage.corpus import SequenceOptions, TokenCorpus, default_preprocess, open_corpus, sample_digests
from storage.encodings import Dense, Encoding, HeadArrays, Hidden, Sample
from storage.encodings.sample import uniforms
from storage.head import head_digest
from storage.manifest import Manifest
from storage.records import QuarantineEntry
from storage.sequences import Sequences, next_tokens
from storage.writer import StoreWriter
from studenttrain.config import FitConfig

VOCABULARY, LENGTH, WIDTH = 20, 8, 6
STUDENT = "gpt:1x16,dropout=0.2"


def write_tokens(folder: Path, name: str = "tokens", num_tokens: int = 400, seed: int = 0) -> Path:
    """Token ids and, beside them, `starts.npy`, the offsets of documents."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    np.save(folder / f"{name}.npy", generator.integers(0, VOCABULARY, num_tokens).astype(np.uint8))
    np.save(folder / "starts.npy", np.unique(generator.integers(1, num_tokens - 1, 15)))
    return folder / f"{name}.npy"


def open_tokens(path: Path, boundaries: Path | None) -> TokenCorpus:
    options = SequenceOptions(LENGTH, vocab_size=VOCABULARY, boundaries=None if boundaries is None else str(boundaries))
    corpus = open_corpus(path, sequence=options)
    assert isinstance(corpus, TokenCorpus)
    return corpus


def table_head() -> HeadArrays:
    return HeadArrays(np.random.default_rng(5).normal(size=(VOCABULARY, WIDTH)).astype(np.float32), None)


def hidden_encoding() -> Hidden:
    return Hidden(WIDTH, "float32", head_sha256=head_digest(table_head()))


def table_hidden(samples_N2Q: NDArray[Any]) -> NDArray[np.float32]:
    """Hidden states (R, WIDTH) that depend on the token alone."""
    table = np.random.default_rng(6).normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
    hidden_RW: NDArray[np.float32] = table[samples_N2Q[:, 0, :-1].reshape(-1)]
    return hidden_RW


def write_token_store(
    path: Path,
    corpus: TokenCorpus,
    encoding: Encoding | None = None,
    *,
    temperatures: Sequence[float] = (1.0,),
    has_tokens: bool = True,
    refused: Sequence[int] = (),
    tokenizer: str | None = None,
    teacher: str = "0",
) -> Path:
    """A finalized store; float32 dense by default.

    Args:
        path: `.zarr` or `.h5`.
        corpus: what the rows are made from.
        encoding: of any kind.
        temperatures: declared.
        has_tokens: whether they are kept.
        refused: rows in quarantine.
        tokenizer: fingerprint.
        teacher: a digit that tells one teacher from another.
    """
    encoding = encoding or Dense("float32")
    manifest = Manifest(
        num_rows=corpus.num_samples,
        num_classes=VOCABULARY,
        shard_rows=16,
        chunk_rows=8,
        encoding=encoding,
        temperatures=tuple(temperatures),
        teacher={"digest": teacher * 64, "kind": "weights", "arch": "gpt:1x16", "precision": "fp32"},
        corpus={"kind": corpus.kind, "fingerprint": corpus.fingerprint, "num_samples": corpus.num_samples},
        preprocess=default_preprocess(corpus).to_json(),
        class_names=None,
        has_hard_targets=False,
        compressor="none",
        provenance={},
        sequences=Sequences(LENGTH, has_tokens, tokenizer, 0),
    )
    with StoreWriter.open(path, manifest, table_head() if isinstance(encoding, Hidden) else None) as writer:
        for shard in writer.owed_shards():
            start, stop = manifest.layout.shard_bounds(shard)
            rows_N = np.arange(start, stop)
            samples = corpus.read_rows(rows_N).astype(np.int64)
            hidden_RW = table_hidden(samples)
            uniform_R = uniforms(0, rows_N, LENGTH) if isinstance(encoding, Sample) else None
            said = encoding.encode(
                hidden_RW @ table_head().weight_CW.T, temperatures, uniform_N=uniform_R, hidden_NW=hidden_RW
            )
            arrays = {spec.name: spec.full(stop - start) for spec in manifest.arrays}
            for name, values in said.items():
                arrays[name] = values.reshape(arrays[name].shape)
            arrays["status"][:] = 0
            arrays["sample_digest"][:] = sample_digests(corpus, start, stop)
            hard_NP = next_tokens(samples[:, 0], samples[:, 1])
            arrays["hard_target_logprob"][...] = np.where(hard_NP >= 0, -1.0, np.nan)
            if has_tokens:
                arrays["token_ids"][...], arrays["position_ids"][...] = samples[:, 0], samples[:, 1]
            mine = [row for row in refused if start <= row < stop]
            for row in mine:
                for spec in manifest.arrays:
                    if spec.name not in ("sample_digest", "token_ids", "position_ids"):
                        arrays[spec.name][row - start] = spec.fill_value
                arrays["status"][row - start] = STATUS_NOT_FINITE
            writer.write_shard(shard, arrays, [QuarantineEntry(row, corpus.key(row), "refused") for row in mine])
        writer.finalize()
    return path


@dataclasses.dataclass(frozen=True)
class TokenGround:
    """A corpus of tokens with its store, and where runs go.

    Attributes:
        folder: holds all.
        data: the ids; their documents are in `starts.npy` beside them.
        targets: the store.
    """

    folder: Path
    data: Path
    targets: Path

    def config(self, out: str = "run", **options: Any) -> FitConfig:
        """Options of a short run on the store's own tokens."""
        given: dict[str, Any] = {"targets": str(self.targets), "data": None, "out": str(self.folder / out)}
        given |= {"student": STUDENT, "batch_size": 8, "device": "cpu", "readers": 1}
        if "steps" not in options:
            given["epochs"] = 2
        return FitConfig(**given | options)


def make_token_ground(folder: Path, encoding: Encoding | None = None, **store: Any) -> TokenGround:
    """A corpus and its store in a folder; options go to `write_token_store`."""
    data = write_tokens(folder)
    corpus = open_tokens(data, folder / "starts.npy")
    return TokenGround(folder, data, write_token_store(folder / "targets.zarr", corpus, encoding, **store))
