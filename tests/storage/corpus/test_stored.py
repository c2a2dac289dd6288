"""A store's own tokens as a corpus."""

from pathlib import Path

import numpy as np
import pytest

from storage.corpus import SampleError, open_corpus, verify_corpus
from storage.corpus.stored import StoredTokens
from storage.errors import CorpusError, NotSealedError
from storage.reader import open_store
from tests.builders import write_npz, write_store
from tests.studenttrain.sequences import LENGTH, make_token_ground


def test_stored_tokens_are_the_samples_that_the_rows_were_made_from(tmp_path: Path) -> None:
    ground = make_token_ground(tmp_path)
    with open_store(ground.targets) as store:
        corpus = StoredTokens(store)
        assert (corpus.num_samples, corpus.sequence_length) == (store.manifest.num_rows, LENGTH)
        assert corpus.key(3) == "3"
        assert corpus.fingerprint == store.manifest.corpus["fingerprint"]
        verify_corpus(store, corpus)
        rows_N = np.array([9, 3, 4, 5, 0])
        samples = corpus.read_rows(rows_N)
        for place, row in enumerate(rows_N.tolist()):
            np.testing.assert_array_equal(samples[place], corpus.decode(corpus.read_raw(row)))
        with pytest.raises(SampleError, match="expected 72 bytes of a sequence, got 5; take another copy"):
            corpus.decode(b"short")
        with pytest.raises(ValueError, match="row: expected 0 to"):
            corpus.read_raw(corpus.num_samples)


def test_tokens_of_rows_that_are_not_sealed_are_not_read(tmp_path: Path) -> None:
    ground = make_token_ground(tmp_path)
    (ground.targets / "final.json").unlink()
    (ground.targets / "seals" / "00000001.json").unlink()
    with open_store(ground.targets) as store, pytest.raises(NotSealedError, match="without a seal"):
        StoredTokens(store).read_rows(np.array([17]))


def test_a_store_whose_rows_are_no_sequences_has_no_tokens(tmp_path: Path) -> None:
    corpus = open_corpus(write_npz(tmp_path / "x.npz"))
    with (
        open_store(write_store(tmp_path / "a.zarr", corpus, finalize=True)) as store,
        pytest.raises(CorpusError, match="keeps its samples' tokens, got rows that are no sequences; give the corpus"),
    ):
        StoredTokens(store)
