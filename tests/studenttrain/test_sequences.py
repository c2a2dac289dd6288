"""Students of sequences: from the store's own tokens or from a corpus, masks, resume, ranks, and what is refused."""

import json
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storage.corpus import SequenceOptions, load_tokenizer, open_corpus
from storage.corpus.stored import StoredTokens
from storage.encodings import Dense, Encoding, Sample, TopK
from storage.errors import CorpusError, CorpusMismatchError, MismatchError, StudentError
from storage.reader import open_store
from studenttrain.export import load_student
from studenttrain.inspection import spread_pieces
from studenttrain.train import fit
from studenttrain.trial import try_student
from tests.studenttrain.runs import assert_same_weights, final_state, metric_lines
from tests.studenttrain.sequences import (
    LENGTH,
    STUDENT,
    VOCABULARY,
    TokenGround,
    hidden_encoding,
    make_token_ground,
    open_tokens,
    table_head,
    table_hidden,
    write_token_store,
    write_tokens,
)
from tests.studenttrain.test_distributed import run_ranks
from tests.studenttrain.test_resume import assert_same_run, kill_again_and_again

ENCODINGS: dict[str, Encoding] = {
    "dense": Dense(),
    "topk": TopK(4),
    "sample": Sample(20),
    "hidden": hidden_encoding(),
}
pytestmark = pytest.mark.usefixtures("no_report")


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_stores_own_tokens_teach_what_the_corpus_teaches(tmp_path: Path, name: str) -> None:
    ground = make_token_ground(tmp_path, ENCODINGS[name], refused=(3,))
    stored = ground.config("stored")
    read = ground.config("read", data=str(ground.data), boundaries=str(tmp_path / "starts.npy"))
    for config in (stored, read):
        fit(config, quiet=True)
    assert_same_weights(final_state(stored), final_state(read))
    losses = [line["soft_loss"] for line in metric_lines(stored)]
    assert losses
    assert np.isfinite(losses).all()


def test_a_store_without_tokens_teaches_the_same_from_its_corpus(tmp_path: Path) -> None:
    with_tokens = make_token_ground(tmp_path / "with", TopK(4))
    without = make_token_ground(tmp_path / "without", TopK(4), has_tokens=False)
    one = with_tokens.config("one")
    two = without.config("two", data=str(without.data), boundaries=str(without.folder / "starts.npy"))
    for config in (one, two):
        fit(config, quiet=True)
    assert_same_weights(final_state(one), final_state(two))


def test_a_hidden_store_teaches_what_its_dense_twin_teaches(tmp_path: Path) -> None:
    dense = make_token_ground(tmp_path / "dense", Dense("float32"))
    hidden = make_token_ground(tmp_path / "hidden", hidden_encoding())
    options: dict[str, Any] = {"alpha": 1.0, "temperature": 2.0, "student": "gpt:1x16"}
    one, two = dense.config("one", **options), hidden.config("two", **options)
    for config in (one, two):
        fit(config, quiet=True)
    for name, value in final_state(one).items():
        torch.testing.assert_close(final_state(two)[name], value, rtol=1e-3, atol=1e-4)


def test_positions_whose_target_is_of_another_document_teach_nothing(tmp_path: Path) -> None:
    ground = make_token_ground(tmp_path)
    with open_store(ground.targets) as store:
        arrays = store.read(["position_ids"], 0, store.manifest.num_rows)
    num_positions = int((arrays["position_ids"][:, 1:] != 0).sum())
    assert num_positions < arrays["position_ids"][:, 1:].size
    config = ground.config(epochs=3)
    assert fit(config, quiet=True).num_rows_seen == 3 * num_positions


@pytest.mark.parametrize("student", ["gpt:1x16", "tests.studenttrain.test_sequences:Bigram"])
def test_a_step_of_nothing_but_masked_positions_moves_nothing_and_harms_nothing(tmp_path: Path, student: str) -> None:
    data = write_tokens(tmp_path, num_tokens=8 * LENGTH + 1)
    np.save(tmp_path / "starts.npy", np.arange(3 * LENGTH, 5 * LENGTH + 1))  # a document for each token
    targets = write_token_store(tmp_path / "targets.zarr", open_tokens(data, tmp_path / "starts.npy"), TopK(4))
    config = TokenGround(tmp_path, data, targets).config(batch_size=1, student=student, epochs=1)
    fit(config, quiet=True)
    lines = metric_lines(config)
    assert sum(line["soft_loss"] == 0 for line in lines) == 2
    assert np.isfinite([line["soft_loss"] for line in lines]).all()


def test_an_evaluation_counts_positions_with_a_target(tmp_path: Path) -> None:
    ground = make_token_ground(tmp_path)
    config = ground.config()
    fit(config, quiet=True)
    figures = try_student(config.out, targets=config.targets, quiet=True)
    model, card = load_student(Path(config.out))
    assert card.sequences is not None
    with open_store(ground.targets) as store:
        samples = StoredTokens(store).read_rows(np.arange(store.manifest.num_rows)).astype(np.int64)
    tokens, positions = torch.from_numpy(samples[:, 0]), torch.from_numpy(samples[:, 1])
    with torch.no_grad():
        logprobs = model(tokens[:, :-1], positions[:, :-1]).log_softmax(2)
    mask = positions[:, 1:] != 0
    nll = -logprobs.gather(2, tokens[:, 1:, None])[:, :, 0][mask].mean()
    top1 = logprobs.argmax(2)
    said = torch.from_numpy((table_hidden(samples) @ table_head().weight_CW.T).argmax(1)).view_as(top1)
    assert figures.num_samples == int(mask.sum())
    assert figures.nll == pytest.approx(float(nll), rel=1e-5)
    assert figures.agreement == pytest.approx(float((top1 == said)[mask].double().mean()))
    again = try_student(config.out, str(ground.data), boundaries=str(tmp_path / "starts.npy"), quiet=True)
    assert again.nll == pytest.approx(figures.nll, rel=1e-6)


def test_a_run_is_validated_on_the_tokens_of_another_store(tmp_path: Path) -> None:
    ground = make_token_ground(tmp_path, TopK(4))
    val = write_tokens(tmp_path / "val", num_tokens=200, seed=9)
    val_store = write_token_store(tmp_path / "val.zarr", open_tokens(val, None), TopK(4))
    config = ground.config(val_targets=str(val_store))
    result = fit(config, quiet=True)
    assert result.figures is not None
    assert result.figures.num_samples == 199
    assert result.figures.agreement is not None


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path, processes: ForkServerContext) -> None:
    ground = make_token_ground(tmp_path, TopK(4), refused=(3,))
    options: dict[str, Any] = {"epochs": 30, "checkpoint_every": "3", "accumulate": 2, "ema": 0.9}
    undisturbed, killed = ground.config("undisturbed", **options), ground.config("killed", **options)
    fit(undisturbed, quiet=True)
    kill_again_and_again(processes, killed, 4, 3.0)
    assert_same_run(undisturbed, killed)


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(tmp_path: Path) -> None:
    ground = make_token_ground(tmp_path, TopK(4), refused=(3,))
    options: dict[str, Any] = {"batch_size": 7, "student": "gpt:1x16", "accumulate": 2}
    one, two = ground.config("one", **options), ground.config("two", **options)
    fit(one, quiet=True)
    first, second = run_ranks(two)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    for name, value in final_state(one).items():
        torch.testing.assert_close(final_state(two)[name], value, rtol=1e-4, atol=1e-5)


def test_the_exported_program_says_what_the_student_says(tmp_path: Path) -> None:
    ground = make_token_ground(tmp_path)
    config = ground.config()
    fit(config, quiet=True)
    model, _ = load_student(Path(config.out))
    program = torch.export.load(Path(config.out) / "student.pt2").module()
    tokens = torch.randint(0, VOCABULARY, (5, LENGTH))
    positions = torch.arange(LENGTH).expand(5, -1)
    torch.testing.assert_close(program(tokens, positions), model(tokens, positions), rtol=1e-4, atol=1e-5)


class Bigram(torch.nn.Module):
    """A student of one's own without a head apart, which takes no positions."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(num_classes, num_classes)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Logits (N, P, V)."""
        logits: torch.Tensor = self.table(token_ids)
        return logits


@pytest.mark.parametrize("encoding", [TopK(4), Sample(20)])
def test_a_student_of_ones_own_learns_the_table(tmp_path: Path, encoding: Encoding) -> None:
    ground = make_token_ground(tmp_path, encoding)
    student = "tests.studenttrain.test_sequences:Bigram"
    config = ground.config(student=student, epochs=60, lr=0.05, alpha=1.0)
    fit(config, quiet=True)
    figures = try_student(config.out, targets=config.targets, quiet=True)
    assert figures.agreement is not None
    assert figures.agreement > 0.8


@pytest.mark.parametrize("most", [1, 3, 20, 1000])
def test_rows_to_look_at_are_as_many_as_were_asked_for(tmp_path: Path, most: int) -> None:
    ground = make_token_ground(tmp_path)
    with open_store(ground.targets) as store:
        pieces = spread_pieces(store, most)
        assert min(most, store.manifest.num_rows) / 2 <= sum(stop - start for start, stop in pieces)
        assert sum(stop - start for start, stop in pieces) <= max(most, 1)


def test_a_report_shows_the_context_of_some_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pytest.importorskip("jinja2")
    ground = make_token_ground(tmp_path, TopK(4))
    config = ground.config()
    fit(config, quiet=True)
    page = (Path(config.out) / "report.html").read_text()
    assert page.count('<code class="context">') == 6
    assert "next token" in page
    assert "position " in page


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": "kl"}, MismatchError, "loss: expected one that a sample store allows"),
        ({"temperature": 2.0}, MismatchError, "temperature: expected one that the store declares"),
        ({"tokenizer": "bytes"}, MismatchError, "tokenizer 'bytes': expected the tokenizer that"),
        ({"student": "gpt:1x16,vocab=10"}, StudentError, "vocab"),
        ({"student": "mlp:8-4"}, StudentError, "mlp:8-4"),
    ],
)
def test_a_student_that_does_not_fit_the_store_is_refused(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    ground = make_token_ground(tmp_path, Sample(20), tokenizer="f" * 64)
    with pytest.raises(error, match=message):
        fit(ground.config(**options), quiet=True)


def test_a_corpus_of_other_tokens_or_documents_is_refused(tmp_path: Path) -> None:
    ground = make_token_ground(tmp_path)
    with pytest.raises(CorpusMismatchError, match=r"row 4 .*the sample was replaced, or the order changed"):
        fit(ground.config(data=str(ground.data)), quiet=True)  # without its documents
    other = write_tokens(tmp_path / "other", seed=1)
    with pytest.raises(CorpusMismatchError, match="row 0"):
        fit(ground.config(data=str(other), boundaries=str(tmp_path / "starts.npy")), quiet=True)


def test_a_store_of_another_tokenizer_or_teacher_is_no_validation(tmp_path: Path) -> None:
    ground = make_token_ground(tmp_path, tokenizer="f" * 64)
    corpus = open_tokens(ground.data, None)
    other = write_token_store(tmp_path / "tokenizer.zarr", corpus, tokenizer="e" * 64)
    with pytest.raises(MismatchError, match=r"got another \(eeeeeeeeeeee\): the same id is another token there"):
        fit(ground.config(val_targets=str(other)), quiet=True)
    other = write_token_store(tmp_path / "teacher.zarr", corpus, tokenizer="f" * 64, teacher="1")
    with pytest.raises(MismatchError, match="expected targets of the teacher that made"):
        fit(ground.config(val_targets=str(other)), quiet=True)


def test_text_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    ground = make_token_ground(tmp_path, tokenizer="f" * 64)
    (tmp_path / "corpus.txt").write_text("some text of some length" * 20)
    config = ground.config(data=str(tmp_path / "corpus.txt"), tokenizer="bytes")
    with pytest.raises(MismatchError, match=r"corpus '.*corpus\.txt': expected the tokenizer that"):
        fit(config, quiet=True)


def test_a_store_that_keeps_no_tokens_needs_its_corpus(tmp_path: Path) -> None:
    ground = make_token_ground(tmp_path, has_tokens=False)
    with pytest.raises(CorpusError, match="one that was made with --no-store-tokens; give the corpus"):
        fit(ground.config(), quiet=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_field": "x"}, "text_field: expected --data or --val-data beside it"),
        ({"boundaries": "x.npy"}, "boundaries: expected --data beside it"),
    ],
)
def test_options_of_a_corpus_that_is_not_given_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    ground = make_token_ground(tmp_path)
    with pytest.raises(ValueError, match=message):
        fit(ground.config(**options), quiet=True)


def test_options_of_an_evaluation_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    ground = make_token_ground(tmp_path)
    config = ground.config(epochs=1)
    fit(config, quiet=True)
    with pytest.raises(ValueError, match="data: expected a corpus to try the student on"):
        try_student(config.out, quiet=True)
    with pytest.raises(ValueError, match="separator: expected --data beside it"):
        try_student(config.out, targets=config.targets, separator=3, quiet=True)


def test_a_changed_token_in_the_store_is_found_before_it_teaches(tmp_path: Path) -> None:
    ground = make_token_ground(tmp_path)
    with open_store(ground.targets) as store:
        corpus = StoredTokens(store)
        samples = corpus.read_rows(np.array([4, 5, 2]))
        assert samples.shape == (3, 2, LENGTH + 1)
        np.testing.assert_array_equal(corpus.decode(corpus.read_raw(5)), samples[1])
    options = SequenceOptions(LENGTH, vocab_size=VOCABULARY, boundaries=str(tmp_path / "starts.npy"))
    read = open_corpus(ground.data, sequence=options)
    np.testing.assert_array_equal(read.decode(read.read_raw(5)), samples[1])


def test_the_card_of_a_language_model_says_its_sequences(tmp_path: Path) -> None:
    ground = make_token_ground(tmp_path, tokenizer=load_tokenizer("bytes").fingerprint)
    config = ground.config(student=STUDENT, epochs=1, tokenizer="bytes")
    fit(config, quiet=True)
    card = json.loads((Path(config.out) / "student.json").read_text())
    assert card["sequences"]["num_positions"] == LENGTH
    assert card["sequences"]["tokenizer"] == load_tokenizer("bytes").fingerprint
