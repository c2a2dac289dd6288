import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.corpus import SequenceOptions, TokenCorpus, open_corpus, text
from storage.errors import CorpusError


def write_jsonl(path: Path, texts: Sequence[str], field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": number, field: text}) + "\n" for number, text in enumerate(texts)))
    return path


def open_text(path: Path, length: int = 4, kind: str | None = None, **options: Any) -> TokenCorpus:
    corpus = open_corpus(path, kind, sequence=SequenceOptions(length, **{"tokenizer": "bytes", **options}))
    assert isinstance(corpus, TokenCorpus)
    return corpus


def said(corpus: TokenCorpus) -> list[bytes]:
    """The documents as bytes."""
    ids_T = corpus.ids_T.astype(np.uint8)
    return [part.tobytes() for part in np.split(ids_T, corpus.starts_D[1:])]


def test_each_line_of_jsonl_is_a_document(tmp_path: Path) -> None:
    corpus = open_text(write_jsonl(tmp_path / "a.jsonl", ["abc", "", "dé", "x\ny"]))
    assert said(corpus) == [b"abc", "dé".encode(), b"x\ny"]
    assert (corpus.kind, corpus.sample_kind, corpus.num_samples, corpus.vocab_size) == ("text", "tokens", 2, 256)
    assert corpus.read_rows(np.arange(2))[:, 1].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert corpus.has_several_documents
    assert corpus.key(1) == "4-8"


def test_a_separator_is_put_behind_each_document(tmp_path: Path) -> None:
    corpus = open_text(write_jsonl(tmp_path / "a.jsonl", ["abc", "", "d"]), separator=10)
    assert said(corpus) == [b"abc\n", b"d\n"]


def test_another_field_may_hold_the_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["abc", "d"], "content")
    assert said(open_text(path, text_field="content")) == [b"abc", b"d"]


def test_a_plain_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    for name, kind in (("a.txt", None), ("README", "text"), ("a.md", "text")):
        (tmp_path / name).write_bytes(b"one\r\n\r\ntwo")
        corpus = open_text(tmp_path / name, kind=kind)
        assert said(corpus) == [b"one\r\n\r\ntwo"]
        assert not corpus.has_several_documents


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b" / "1.jsonl", ["three", "four"])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "2.txt").write_text("two")
    (tmp_path / "a" / "1.TXT").write_text("one")
    (tmp_path / "a" / "notes.md").write_text("left out")
    (tmp_path / ".hidden.txt").write_text("left out")
    corpus = open_text(tmp_path)
    assert said(corpus) == [b"one", b"two", b"three", b"four"]
    assert corpus.num_ignored == 1


def test_a_mark_of_byte_order_is_no_text_and_blank_lines_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "two"}\r\n \n')
    assert said(open_text(tmp_path / "a.jsonl")) == [b"one", b"two"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert said(open_text(tmp_path / "a.txt")) == [b"one"]


def test_documents_do_not_depend_on_how_many_are_tokenised_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * (number % 7) for number in range(50)])
    whole = open_text(path)
    monkeypatch.setattr(text, "BATCH_CHARACTERS", 5)
    parts = open_text(path)
    assert np.array_equal(whole.ids_T, parts.ids_T)
    assert whole.fingerprint == parts.fingerprint


def test_text_is_tokenised_by_a_tokenizers_file(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "cat": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = write_jsonl(tmp_path / "data" / "a.jsonl", ["the cat", "the dog", " "])
    corpus = open_text(path, tokenizer=str(tmp_path), separator=2)
    assert corpus.ids_T.tolist() == [0, 1, 2, 0, 2, 2]
    assert corpus.starts_D.tolist() == [0, 3]
    assert corpus.vocab_size == 3
    assert corpus.tokenizer is not None
    again = pickle.loads(pickle.dumps(corpus))
    assert again.fingerprint == corpus.fingerprint
    assert again.tokenizer.fingerprint == corpus.tokenizer.fingerprint
    assert np.array_equal(again.ids_T, corpus.ids_T)
    with pytest.raises(ValueError, match="separator: expected a token id below 3, the size of the vocabulary, got 3"):
        open_text(path, tokenizer=str(tmp_path), separator=3)


def test_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["abc"])
    with pytest.raises(
        CorpusError, match="expected a tokenizer for the text, got none; give --tokenizer: bytes, a tok"
    ):
        open_text(path, tokenizer=None)


def test_options_of_other_corpora_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["abc"])
    with pytest.raises(
        ValueError, match="token_dtype: expected a corpus of tokens for 'uint16', got text; leave it out"
    ):
        open_text(path, dtype="uint16")
    with pytest.raises(
        ValueError, match=r"boundaries: expected a corpus of tokens for '.*b.npy', got text; leave it out"
    ):
        open_text(path, boundaries="b.npy")
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(ValueError, match="text_field: expected JSONL for 'body', got plain text; leave it out"):
        open_text(tmp_path / "a.txt", text_field="body")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"words", "expected a JSON object, got something else"),
        (b'{"text": "cut', "expected a JSON object, got something else"),
        (b"[" * 100_000, "expected a JSON object, got something else"),
        (b'["abc"]', "expected a JSON object, got list; mend the line"),
        (b'{"body": "abc"}', "expected text in the field 'text', got the fields 'body'; say which field: --text-field"),
        (b"{}", "expected text in the field 'text', got the fields none"),
        (b'{"text": 3}', "expected text in the field 'text', got int"),
        (b'{"text": "\xff"}', r"expected UTF-8, got the byte 0xff \(invalid start byte\); save the file as UTF-8"),
        (b'{"text": "ab\\ud800"}', "expected text that UTF-8 holds, got half of a surrogate pair at character 2; mend"),
    ],
)
def test_a_line_that_can_not_be_read_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(CorpusError, match=f"text '.*a.jsonl', line 3: {message}"):
        open_text(tmp_path / "a.jsonl")


def test_plain_text_that_is_not_utf_8_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xe9\n")
    with pytest.raises(
        CorpusError, match=r"text '.*a.txt', line 2: expected UTF-8, got the byte 0xe9 \(invalid contin"
    ):
        open_text(tmp_path / "a.txt")


def test_files_without_a_document_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "b.txt").touch()
    with pytest.raises(
        CorpusError, match=r"text '.*b.txt': expected at least one document, got an empty file; remove it"
    ):
        open_text(tmp_path)
    (tmp_path / "c.jsonl").write_text("\n\n")
    with pytest.raises(CorpusError, match=r"text '.*c.jsonl': expected at least one document, got an empty file"):
        open_text(tmp_path / "c.jsonl")
    with pytest.raises(
        CorpusError, match="expected at least 2 tokens, one to read and one to predict, got 1; give more"
    ):
        open_text(write_jsonl(tmp_path / "d.jsonl", ["x", ""]))


def test_a_folder_without_text_and_links_that_leave_it_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(CorpusError, match=r"expected text \(.txt, .jsonl\), got none; give a folder that holds it"):
        open_text(tmp_path / "data", kind="text")
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "data" / "b.txt").symlink_to(tmp_path / "a.txt")
    with pytest.raises(CorpusError, match=r"expected links that stay inside the folder, got 'b.txt'"):
        open_text(tmp_path / "data")


def test_more_text_than_memory_is_meant_to_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_TOKENS", 9)
    (tmp_path / "a.txt").write_text("0123456789")
    with pytest.raises(
        CorpusError, match="expected at most 9 tokens, since text is tokenised in memory, got more; save"
    ):
        open_text(tmp_path / "a.txt")


def test_real_text_is_read_as_the_bytes_that_it_is(shared_data: Path) -> None:
    path = shared_data / "tinyshakespeare" / "input.txt"
    corpus = open_text(path, 256)
    assert corpus.ids_T.astype(np.uint8).tobytes() == path.read_bytes()
    assert corpus.num_samples == -(-(path.stat().st_size - 1) // 256)
    assert corpus.read_raw(3)[: 4 * 257] == corpus.ids_T[3 * 256 : 4 * 256 + 1].astype("<u4").tobytes()
