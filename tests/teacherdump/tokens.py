"""Small corpora of tokens, and language models that label them."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from studenttrain.models import build_model
from teacherdump.config import DumpConfig

VOCABULARY, LENGTH = 40, 12
ARCH = f"gpt:1x16,vocab={VOCABULARY}"


class Table(nn.Module):
    """A teacher whose answer to a token is a row of a table: the same bits whatever stands beside it."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Logits (N, P, V)."""
        logits: Tensor = self.table(token_ids)
        return logits * 3


def table() -> nn.Module:
    return Table()


def padded_table() -> nn.Module:
    return Table(VOCABULARY + 8)


class LooksAhead(nn.Module):
    """Each position knows the whole sequence."""

    def forward(self, token_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Logits (N, P, V)."""
        del position_ids
        counts = nn.functional.one_hot(token_ids, VOCABULARY).float().sum(1, keepdim=True)
        return counts.expand(-1, token_ids.shape[1], -1) + 0.0


class LooksAcross(nn.Module):
    """Each position knows all before it, of whatever document."""

    def forward(self, token_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Logits (N, P, V)."""
        del position_ids
        return nn.functional.one_hot(token_ids, VOCABULARY).float().cumsum(1)


def save_teacher(path: Path, arch: str = ARCH, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    torch.save(build_model(arch).state_dict(), path)
    return path


def write_tokens(folder: Path, num_tokens: int = 500, seed: int = 0, vocabulary: int = VOCABULARY) -> Path:
    """`tokens.npy`, and the offsets of its documents in `starts.npy`."""
    generator = np.random.default_rng(seed)
    np.save(folder / "tokens.npy", generator.integers(0, vocabulary, num_tokens).astype(np.uint16))
    np.save(folder / "starts.npy", np.unique(generator.integers(1, num_tokens - 1, 12)))
    return folder / "tokens.npy"


def token_config(folder: Path, **options: Any) -> DumpConfig:
    """A dump of the tokens in shards of 16 sequences, with any option changed."""
    given: dict[str, Any] = {
        "models": (str(folder / "teacher.pt"),),
        "arch": ARCH,
        "data": str(folder / "tokens.npy"),
        "boundaries": str(folder / "starts.npy"),
        "sequence_length": LENGTH,
        "vocab_size": VOCABULARY,
        "out": str(folder / "out.zarr"),
        "device": "cpu",
        "batch_size": 5,
        "shard_rows": 16,
        "chunk_rows": 8,
    }
    return DumpConfig(**{**given, **options})


def reference_logits(model: nn.Module, samples_N2Q: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits (N, P, V) of each document alone, one after the other."""
    found = []
    for tokens_Q, positions_Q in samples_N2Q:
        starts = [*np.flatnonzero(positions_Q[:-1] == 0).tolist(), len(tokens_Q) - 1]
        with torch.no_grad():
            parts = [
                model(torch.from_numpy(tokens_Q[start:stop])[None])[0] for start, stop in itertools.pairwise(starts)
            ]
        found.append(torch.cat(parts).numpy())
    return np.stack(found)
