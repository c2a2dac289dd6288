"""What a small teacher says, for stores of every encoding, of rows with one distribution and of sequences.

Legend: N rows, P positions, R distributions (N, or N P in sequences), C classes, W width of the hidden state.
"""

from typing import Any

import numpy as np

from storage.arrays import Array
from storage.encodings import HeadArrays, Hidden, Sample
from storage.encodings.sample import uniforms
from storage.head import head_digest
from storage.manifest import Manifest
from storage.sequences import Sequences, next_tokens


def sequences_of(num_positions: int = 5, **fields: Any) -> Sequences:
    """Sequences with tokens, of a tokenizer, with other fields where a test asks for them."""
    options: dict[str, Any] = {
        "num_positions": num_positions,
        "has_tokens": True,
        "tokenizer": "ef" * 32,
        "num_padded": 2,
    }
    return Sequences(**(options | fields))


def head_of(num_classes: int, width: int, has_bias: bool = False, dtype: str = "float16") -> HeadArrays:
    """A head, the same each time."""
    generator = np.random.default_rng([num_classes, width])
    weight_CW = generator.normal(0, 1.5, (num_classes, width)).astype(dtype)
    return HeadArrays(weight_CW, generator.normal(0, 1, num_classes).astype(dtype) if has_bias else None)


def hidden_encoding(num_classes: int, width: int = 4, **options: Any) -> Hidden:
    """The encoding of hidden states beside `head_of` the same classes and width."""
    head = head_of(num_classes, width, options.get("has_bias", False))
    return Hidden(width, **options, head_sha256=head_digest(head))


def head_for(manifest: Manifest) -> HeadArrays | None:
    """The head of a store of hidden states; else None."""
    encoding = manifest.encoding
    if not isinstance(encoding, Hidden):
        return None
    return head_of(manifest.num_classes, encoding.width, encoding.has_bias)


def num_positions_of(manifest: Manifest) -> int:
    """Distributions of a row."""
    return 1 if manifest.sequences is None else manifest.sequences.num_positions


def teacher_says(
    manifest: Manifest, num_rows: int, generator: np.random.Generator, spread: float = 3.0
) -> tuple[Array, Array | None]:
    """Logits (R, C), float32, and the hidden states (R, W) that they come from, None without a head."""
    num_distributions = num_rows * num_positions_of(manifest)
    encoding, head = manifest.encoding, head_for(manifest)
    if not isinstance(encoding, Hidden) or head is None:
        return generator.normal(0, spread, (num_distributions, manifest.num_classes)).astype(np.float32), None
    hidden_RW = generator.normal(0, 1, (num_distributions, encoding.width)).astype(np.float32)
    return encoding.logits({"hidden": hidden_RW}, head), hidden_RW


def tokens_of(manifest: Manifest, num_rows: int, generator: np.random.Generator) -> dict[str, Array]:
    """Token ids and their positions (N, P + 1), some documents in each row; the last row is padded with two tokens."""
    assert manifest.sequences is not None
    shape = (num_rows, manifest.sequences.num_positions + 1)
    is_start = generator.random(shape) < 0.3
    is_start[:, 0] = True
    index = np.arange(shape[1])
    position_ids = index - np.maximum.accumulate(np.where(is_start, index, 0), axis=1)
    token_ids = generator.integers(0, manifest.num_classes, shape)
    position_ids[-1, -2:] = token_ids[-1, -2:] = 0
    types = {spec.name: spec.dtype for spec in Sequences(shape[1] - 1, True, None, 0).arrays(manifest.num_classes)}
    return {
        "token_ids": token_ids.astype(types["token_ids"]),
        "position_ids": position_ids.astype(types["position_ids"]),
    }


def encode_rows(manifest: Manifest, rows_N: Array, logits_RC: Array, hidden_RW: Array | None) -> dict[str, Array]:
    """What a store keeps of the logits of its rows, in the shapes of its arrays."""
    num_positions, encoding = num_positions_of(manifest), manifest.encoding
    uniform_R = uniforms(encoding.seed, rows_N, num_positions) if isinstance(encoding, Sample) else None
    arrays = encoding.encode(logits_RC, manifest.temperatures, uniform_N=uniform_R, hidden_NW=hidden_RW)
    if manifest.sequences is None:
        return arrays
    return {name: values.reshape(len(rows_N), num_positions, *values.shape[1:]) for name, values in arrays.items()}


def hard_target_logprobs(logits_RC: Array, target_R: Array) -> Array:
    """The log-probability of hard targets at T = 1, float16 (R,); NaN where they are -1."""
    logits_RC = logits_RC.astype(np.float64)
    logits_RC -= logits_RC.max(axis=1, keepdims=True)
    logprob_R = np.take_along_axis(logits_RC, np.maximum(target_R, 0)[:, None].astype(np.int64), axis=1)[:, 0]
    logprob_R -= np.log(np.exp(logits_RC).sum(axis=1))
    return np.where(target_R < 0, np.nan, logprob_R).astype(np.float16)


def sequence_arrays(manifest: Manifest, tokens: dict[str, Array], logits_RC: Array) -> dict[str, Array]:
    """What a sequence store keeps beside the soft targets, with its tokens where it keeps those."""
    assert manifest.sequences is not None
    target_NP = next_tokens(tokens["token_ids"], tokens["position_ids"])
    logprob_NP = hard_target_logprobs(logits_RC, target_NP.reshape(-1)).reshape(target_NP.shape)
    return {"hard_target_logprob": logprob_NP} | (tokens if manifest.sequences.has_tokens else {})
