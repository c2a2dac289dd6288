import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.corpus import load_tokenizer
from storage.errors import CorpusError

tokenizers = pytest.importorskip("tokenizers")

VOCAB = {"a": 0, "b": 1, "c": 2, "ab": 3, " ": 4}


def bpe(**options: Any) -> Any:
    """A small tokenizer; options change one thing of it."""
    parts: dict[str, Any] = {"vocab": VOCAB, "merges": [("a", "b")], "special": "<end>", "normalizer": None, **options}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(parts["vocab"], parts["merges"]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if parts["normalizer"] is not None:
        tokenizer.normalizer = parts["normalizer"]
    tokenizer.add_special_tokens([parts["special"]])
    return tokenizer


def save(tokenizer: Any, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return str(path)


def test_bytes_are_their_own_ids() -> None:
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.vocab_size == 256
    assert [ids.tolist() for ids in tokenizer.encode(["ab", "", "é"])] == [[97, 98], [], [0xC3, 0xA9]]
    assert all(ids.dtype == np.uint32 for ids in tokenizer.encode(["ab", ""]))
    assert tokenizer.fingerprint == "7a7e0457c44d6493c8d7a1939797feeaeb0353d6989fc55ebf7e1ecf47b79fb9"


def test_a_file_or_a_folder_with_one_is_read(tmp_path: Path) -> None:
    file = load_tokenizer(save(bpe(), tmp_path / "folder" / "tokenizer.json"))
    folder = load_tokenizer(str(tmp_path / "folder"))
    assert file.fingerprint == folder.fingerprint
    assert file.fingerprint == "e4f8a3f4a3a8bf21d26c09896e4f37857f61ca4e9c65245dc28e7996014ea6ae"
    assert file.vocab_size == folder.vocab_size == 6
    assert [ids.tolist() for ids in file.encode(["abc", "c<end>a", ""])] == [[3, 2], [2, 5, 0], []]


def test_the_size_is_the_highest_id_and_one(tmp_path: Path) -> None:
    name = save(bpe(vocab={**VOCAB, "z": 11}), tmp_path / "a.json")
    assert load_tokenizer(name).vocab_size == 12


def test_neither_truncation_nor_padding_nor_special_tokens_change_a_document(tmp_path: Path) -> None:
    tokenizer = bpe()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<end> $A <end>", special_tokens=[("<end>", 5)]
    )
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    ids = load_tokenizer(save(tokenizer, tmp_path / "a.json")).encode(["a b c a b c"])
    assert ids[0].tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    "options",
    [
        {"vocab": {**VOCAB, "a": 1, "b": 0}},
        {"merges": []},
        {"special": "<stop>"},
        {"normalizer": tokenizers.normalizers.Lowercase()},
    ],
)
def test_tokenizers_of_one_size_that_differ_have_other_fingerprints(tmp_path: Path, options: dict[str, Any]) -> None:
    one = load_tokenizer(save(bpe(), tmp_path / "a.json"))
    other = load_tokenizer(save(bpe(**options), tmp_path / "b.json"))
    assert one.vocab_size == other.vocab_size
    assert one.fingerprint != other.fingerprint


def test_a_part_of_another_type_gives_another_fingerprint(tmp_path: Path) -> None:
    pre = tokenizers.pre_tokenizers
    found = set()
    for part in (pre.Whitespace(), pre.ByteLevel(), pre.Sequence([pre.Digits(), pre.ByteLevel()])):
        tokenizer = bpe()
        tokenizer.pre_tokenizer = part
        found.add(load_tokenizer(save(tokenizer, tmp_path / "a.json")).fingerprint)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCAB, unk_token="a"))
    found.add(load_tokenizer(save(words, tmp_path / "a.json")).fingerprint)
    assert len(found) == 4


def test_a_unigram_model_is_known_by_its_tokens_and_scores(tmp_path: Path) -> None:
    found = set()
    for score in (-1.0, -2.0):
        model = tokenizers.models.Unigram([("<unk>", 0.0), ("a", score)], 0, byte_fallback=False)
        tokenizer = load_tokenizer(save(tokenizers.Tokenizer(model), tmp_path / "a.json"))
        assert tokenizer.vocab_size == 2
        found.add(tokenizer.fingerprint)
    assert len(found) == 2


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> str:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=1))
    return str(path)


def test_a_file_that_is_written_in_another_way_keeps_its_fingerprint(tmp_path: Path) -> None:
    def rewrite(value: dict[str, Any]) -> None:
        model = value["model"]
        model["merges"] = [" ".join(merge) for merge in model["merges"]]  # as releases before 0.20 wrote them
        model["vocab"] = dict(reversed(model["vocab"].items()))
        value["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}

    name = save(bpe(), tmp_path / "a.json")
    before = load_tokenizer(name).fingerprint
    assert load_tokenizer(rewritten(Path(name), rewrite)).fingerprint == before


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CorpusError,
        match=r"tokenizer '.*none': expected bytes, a tokenizers JSON file or a folder .*, got nothing there",
    ):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(
        CorpusError, match=r"expected a folder with a tokenizer.json, got one without; save the tokenizer"
    ):
        load_tokenizer(str(tmp_path))
    for content in ("", "[1]", "{}"):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(CorpusError, match="expected a tokenizers JSON file, got another or a damaged one"):
            load_tokenizer(str(tmp_path / "a.json"))
    name = save(tokenizers.Tokenizer(tokenizers.models.BPE()), tmp_path / "empty.json")
    with pytest.raises(CorpusError, match="expected tokens, got an empty vocabulary; give a trained tokenizer"):
        load_tokenizer(name)


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = save(bpe(), tmp_path / "a.json")
    real_import = builtins.__import__

    def without_tokenizers(module: str, *args: Any, **kwargs: Any) -> Any:
        if module == "tokenizers":
            raise ImportError(module)
        return real_import(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tokenizers)
    with pytest.raises(
        CorpusError,
        match=r"expected the library tokenizers, got an environment without it; pip install 'logitstore\[te",
    ):
        load_tokenizer(name)
    assert load_tokenizer("bytes").vocab_size == 256
