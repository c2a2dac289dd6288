"""What turns text into token ids, and a fingerprint that tells one tokenizer from another.

Only here is the library `tokenizers` imported, and only when a tokenizer is opened.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.corpus.labels import one_line
from storage.errors import CorpusError

# The built-in tokenizer: an id is a byte of UTF-8.
BYTES = "bytes"

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to token ids.

    Attributes:
        name: what it was opened by.
        fingerprint: sha256 of the token map, the merges, the added tokens with their ids, and the types of model,
            normalizer and pre-tokenizer, as hex.
        vocab_size: highest id + 1.
        encoder: a `tokenizers.Tokenizer`, or None for bytes.
    """

    name: str
    fingerprint: str
    vocab_size: int
    encoder: Any = field(repr=False)

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Token ids of each text: all of it, with no token added at its start or end.

        A special token that is written out in a text, such as `<|endoftext|>`, becomes its id.
        """
        if self.encoder is None:
            return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]
        encode = getattr(self.encoder, "encode_batch_fast", self.encoder.encode_batch)
        return [np.array(item.ids, np.uint32) for item in encode(list(texts), add_special_tokens=False)]


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a name.

    Args:
        name: `bytes`, a `tokenizers` JSON file, or a folder with a tokenizer.json, as Hugging Face tokenizers are
            saved.

    Raises:
        CorpusError: there is no such file, it is no tokenizer, or the library `tokenizers` is not installed.
    """
    if name == BYTES:
        return Tokenizer(BYTES, _digest({"model": BYTES, "vocab_size": 256}), 256, None)
    where = f"tokenizer '{name}'"
    path = Path(name)
    if path.is_dir():
        path /= TOKENIZER_FILE
        if not path.is_file():
            raise CorpusError(
                f"{where}: expected a folder with a {TOKENIZER_FILE}, got one without; save the tokenizer with "
                "save_pretrained of a fast tokenizer"
            )
    if not path.is_file():
        raise CorpusError(
            f"{where}: expected {BYTES}, a tokenizers JSON file or a folder with a {TOKENIZER_FILE}, got nothing "
            "there; check the path"
        )
    try:
        from tokenizers import Tokenizer as Encoder
    except ImportError as error:
        raise CorpusError(
            f"{where}: expected the library tokenizers, got an environment without it; pip install 'logitstore[text]'"
        ) from error
    try:
        encoder = Encoder.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise CorpusError(
            f"{where}: expected a tokenizers JSON file, got another or a damaged one ({one_line(error)}); "
            "take another copy"
        ) from error
    encoder.no_truncation()  # a document is taken whole, whatever the file says
    encoder.no_padding()
    ids = encoder.get_vocab(with_added_tokens=True).values()
    if not ids:
        raise CorpusError(f"{where}: expected tokens, got an empty vocabulary; give a trained tokenizer")
    return Tokenizer(name, _digest(_identity(json.loads(encoder.to_str()))), max(ids) + 1, encoder)


def _identity(value: dict[str, Any]) -> dict[str, Any]:
    """What two tokenizers must have in common to give the same ids, of a `tokenizers` JSON object.

    Only what every version of the library writes alike: a tokenizer that was saved again keeps its fingerprint.
    """
    model = value["model"]
    merges = [merge.split(" ", 1) if isinstance(merge, str) else list(merge) for merge in model.get("merges") or []]
    return {
        "model": model["type"],
        "vocab": model["vocab"],
        "merges": merges,
        "added_tokens": sorted([token["id"], token["content"], token["special"]] for token in value["added_tokens"]),
        "normalizer": _types(value.get("normalizer")),
        "pre_tokenizer": _types(value.get("pre_tokenizer")),
    }


def _types(part: dict[str, Any] | None) -> list[str]:
    """The type of a normalizer or pre-tokenizer, or those that a sequence of them is made of."""
    if part is None:
        return []
    inner = part.get("normalizers", part.get("pretokenizers")) if part["type"] == "Sequence" else None
    return [part["type"]] if inner is None else [name for item in inner for name in _types(item)]


def _digest(value: dict[str, Any]) -> str:
    """sha256 of canonical JSON, as hex."""
    return sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
