"""The dump of language models: every encoding against the model itself, in any batches, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storage.corpus import open_corpus
from storage.encodings import Dense, Hidden, Sample, TopK
from storage.encodings.sample import uniforms
from storage.errors import CorpusError, MismatchError, StoreError, TeacherError
from storage.reader import Store, open_store
from storage.sequences import flatten_positions, next_tokens
from studenttrain.models import build_model
from teacherdump.config import DumpConfig
from teacherdump.run import run
from tests.teacherdump.tokens import (
    ARCH,
    LENGTH,
    VOCABULARY,
    reference_logits,
    save_teacher,
    token_config,
    write_tokens,
)

ENCODINGS: dict[str, dict[str, Any]] = {
    "dense": {"encoding": "dense", "values": "float32", "temperatures": (1.0, 3.0)},
    "topk": {"encoding": "topk", "k": 5, "values": "float32", "temperatures": (1.0, 3.0)},
    "uint8": {"encoding": "topk", "k": 5, "values": "uint8"},
    "sample": {"encoding": "sample", "draws": 30, "seed": 3, "temperatures": (2.0,)},
    "hidden": {"encoding": "hidden", "values": "float32"},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.set_num_threads(1)
    save_teacher(tmp_path / "teacher.pt")
    write_tokens(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def samples_of(config: DumpConfig) -> np.ndarray[Any, Any]:
    corpus = open_corpus(config.data, sequence=config.sequence_options)
    return corpus.read_rows(np.arange(corpus.num_samples)).astype(np.int64)  # type: ignore[attr-defined, no-any-return]


def all_rows(store: Store) -> dict[str, np.ndarray[Any, Any]]:
    return store.read([spec.name for spec in store.manifest.arrays], 0, store.manifest.num_rows)


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_holds_what_the_model_says_of_each_document_alone(folder: Path, name: str) -> None:
    config = token_config(folder, **ENCODINGS[name])
    result = run(config)
    samples_N2Q = samples_of(config)
    model = build_model(ARCH)
    model.load_state_dict(torch.load(folder / "teacher.pt", weights_only=True))
    logits_RC = reference_logits(model.eval(), samples_N2Q).reshape(-1, VOCABULARY)
    with open_store(config.out) as store:
        manifest, arrays = store.manifest, all_rows(store)
        flat = flatten_positions(manifest.sequences, arrays)
        assert manifest.format_version == "1.1"
        assert result.num_sealed_rows == len(samples_N2Q) == -(-499 // LENGTH)
        np.testing.assert_array_equal(arrays["token_ids"], samples_N2Q[:, 0])
        np.testing.assert_array_equal(arrays["position_ids"], samples_N2Q[:, 1])
        np.testing.assert_allclose(flat["max_logit"], logits_RC.max(1), atol=1e-5)
        hard_R = next_tokens(samples_N2Q[:, 0], samples_N2Q[:, 1]).reshape(-1)
        logprobs_RC = torch.from_numpy(logits_RC).log_softmax(1).numpy()
        expected_R = np.where(hard_R >= 0, logprobs_RC[np.arange(len(hard_R)), hard_R], np.nan)
        np.testing.assert_allclose(flat["hard_target_logprob"].astype(np.float32), expected_R, rtol=2e-3, atol=2e-3)
        assert (hard_R < 0).any()
        encoding = manifest.encoding
        if isinstance(encoding, Hidden):
            head = store.head()
            assert head is not None
            np.testing.assert_allclose(encoding.logits(flat, head), logits_RC, atol=1e-5)
        elif isinstance(encoding, Sample):
            uniform_R = uniforms(3, np.arange(len(samples_N2Q)), LENGTH)
            expected = encoding.encode(logits_RC, (2.0,), uniform_N=uniform_R)
            assert (flat["ids"] == expected["ids"]).all(axis=1).mean() > 0.98  # a last bit may move a draw
            assert (flat["counts"].sum(axis=1) == 30).all()
        elif isinstance(encoding, TopK | Dense):
            mine = encoding.logprobs(flat, 1.0, manifest.temperatures)
            reference = encoding.logprobs(encoding.encode(logits_RC, manifest.temperatures), 1.0, manifest.temperatures)
            np.testing.assert_allclose(mine, reference, atol=2e-2 if name == "uint8" else 1e-4)


@pytest.mark.parametrize("name", ["dense", "topk", "sample"])
def test_batches_and_restarts_change_no_bit_of_what_a_table_says(folder: Path, name: str) -> None:
    torch.manual_seed(4)
    arch = "tests.teacherdump.tokens:table"
    from tests.teacherdump.tokens import Table

    torch.save(Table().state_dict(), folder / "table.pt")
    options = {**ENCODINGS[name], "models": (str(folder / "table.pt"),), "arch": arch, "boundaries": None}
    digests = set()
    for number, batch_size in enumerate((1, 7, 16)):
        config = token_config(folder, out=str(folder / f"{number}.zarr"), batch_size=batch_size, **options)
        if number == 1:  # in three runs
            run(token_config(folder, **{**vars(config), "limit_samples": 16}))
            run(token_config(folder, **{**vars(config), "limit_samples": 16}))
        digests.add(run(config).content_digest)
    h5 = token_config(folder, out=str(folder / "x.h5"), **options)
    digests.add(run(h5).content_digest)
    assert len(digests) == 1
    assert None not in digests


def test_other_seeds_draw_otherwise(folder: Path) -> None:
    one = run(token_config(folder, encoding="sample", draws=8, seed=1, out=str(folder / "1.zarr")))
    two = run(token_config(folder, encoding="sample", draws=8, seed=2, out=str(folder / "2.zarr")))
    assert one.content_digest != two.content_digest


def test_what_pads_a_vocabulary_is_cut_off_and_recorded(folder: Path) -> None:
    from tests.teacherdump.tokens import Table

    torch.manual_seed(4)
    model = Table(VOCABULARY + 8)
    torch.save(model.state_dict(), folder / "table.pt")
    config = token_config(
        folder, models=(str(folder / "table.pt"),), arch="tests.teacherdump.tokens:padded_table", boundaries=None,
        values="float32",
    )  # fmt: skip
    run(config)
    with open_store(config.out) as store:
        sequences = store.manifest.sequences
        assert sequences is not None
        assert (store.manifest.num_classes, sequences.num_padded) == (VOCABULARY, 8)
        arrays = all_rows(store)
    logits_NPC = model(torch.from_numpy(samples_of(config)[:, 0, :-1]))[:, :, :VOCABULARY].detach()
    expected = logits_NPC.log_softmax(2).numpy()
    found = torch.from_numpy(arrays["values"]).log_softmax(2).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_tokens_may_stay_out_of_the_store(folder: Path) -> None:
    config = token_config(folder, store_tokens=False)
    run(config)
    with open_store(config.out) as store:
        assert not {"token_ids", "position_ids"} & {spec.name for spec in store.manifest.arrays}
        assert (store.read(["sample_digest"], 0, 5)["sample_digest"] != 0).all()


def test_an_ensemble_is_the_mean_of_its_members_probabilities(folder: Path) -> None:
    save_teacher(folder / "other.pt", seed=1)
    models = tuple(str(folder / name) for name in ("teacher.pt", "other.pt"))
    config = token_config(folder, models=models, values="float32")
    run(config)
    samples_N2Q, probs = samples_of(config), []
    for path in models:
        model = build_model(ARCH)
        model.load_state_dict(torch.load(path, weights_only=True))
        probs.append(torch.from_numpy(reference_logits(model.eval(), samples_N2Q)).softmax(2))
    with open_store(config.out) as store:
        found = torch.from_numpy(all_rows(store)["values"]).softmax(2)
    np.testing.assert_allclose(found, torch.stack(probs).mean(0), atol=1e-5)


def test_the_head_is_stored_once_and_a_resumed_run_keeps_it(folder: Path) -> None:
    config = token_config(folder, encoding="hidden")
    run(token_config(folder, encoding="hidden", limit_samples=16))
    result = run(config)
    assert result.content_digest is not None
    with open_store(config.out) as store:
        head = store.head()
        assert head is not None
        assert head.weight_CW.shape == (VOCABULARY, 16)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"vocab_size": 60}, TeacherError, "expected a teacher of its vocabulary, 60 tokens, got one of 40"),
        ({"vocab_size": 41}, TeacherError, "expected a teacher of its vocabulary, 41 tokens, got one of 40"),
        ({"vocab_size": 20}, CorpusError, r"expected token ids from 0 to 19, got \d+"),
        ({"arch": "tests.teacherdump.tokens:LooksAhead"}, TeacherError, "when a later token changed"),
        ({"arch": "tests.teacherdump.tokens:LooksAcross"}, TeacherError, "looks across; give a model that takes"),
        (
            {"arch": "tests.teacherdump.tokens:LooksAcross", "boundaries": None, "encoding": "hidden"},
            TeacherError,
            r"whose last layer can't be told from the rest; use another encoding",
        ),
    ],
)
def test_a_teacher_or_corpus_that_does_not_fit_is_refused(
    folder: Path, options: dict[str, Any], error: type[StoreError], message: str
) -> None:
    if "arch" in options:
        torch.save({}, folder / "empty.pt")
        path = folder / "program.pt2"
        from tests.teacherdump import tokens

        module = getattr(tokens, options["arch"].rpartition(":")[2])().eval()
        ids, positions = torch.zeros(2, LENGTH, dtype=torch.int64), torch.zeros(2, LENGTH, dtype=torch.int64)
        shape = {0: torch.export.Dim("batch")}
        torch.export.save(torch.export.export(module, (ids, positions), dynamic_shapes=(shape, shape)), path)
        options = {**options, "arch": None, "models": (str(path),)}
    with pytest.raises(error, match=message):
        run(token_config(folder, **options))
    assert not (folder / "out.zarr").exists()


def test_an_ensemble_has_no_hidden_states_to_keep(folder: Path) -> None:
    save_teacher(folder / "other.pt", seed=1)
    models = tuple(str(folder / name) for name in ("teacher.pt", "other.pt"))
    with pytest.raises(TeacherError, match="for --encoding hidden, got an ensemble"):
        run(token_config(folder, models=models, encoding="hidden"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": LENGTH + 1}, "num_rows: the store has 42, this run 39"),
        ({"store_tokens": False}, "sequences.has_tokens: the store has true, this run false"),
        ({"boundaries": None}, "corpus.fingerprint"),
        ({"encoding": "topk", "k": 3}, "encoding"),
    ],
)
def test_a_run_with_other_sequences_does_not_go_on(folder: Path, options: dict[str, Any], message: str) -> None:
    run(token_config(folder, limit_samples=16))
    with pytest.raises(MismatchError, match=message):
        run(token_config(folder, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": None, "boundaries": None}, "vocab_size: expected --sequence-length beside it"),
        ({"sequence_length": None, "boundaries": None, "vocab_size": None, "store_tokens": False}, "store_tokens: exp"),
        ({"encoding": "sample"}, "draws: expected how many sample takes"),
        ({"encoding": "sample", "draws": 300}, "draws: expected 1 to 255"),
        ({"encoding": "sample", "draws": 3, "temperatures": (1.0, 2.0)}, "temperatures: expected one for sample"),
        ({"encoding": "sample", "draws": 3, "values": "uint8"}, "values: expected none with sample"),
        ({"encoding": "hidden", "values": "uint8"}, "values: expected float16 or float32 with hidden"),
        ({"draws": 3}, "draws: expected none with dense, got 3; it is of sample"),
        ({"seed": 3}, "seed: expected none with dense"),
        ({"encoding": "topk", "k": 5, "draws": 3}, "draws: expected none with topk"),
    ],
)
def test_options_that_contradict_each_other_are_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_config(folder, **options)
