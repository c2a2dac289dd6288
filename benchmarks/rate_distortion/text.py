"""Real text as ids of a vocabulary of 50,000: a byte-level BPE, trained here on the same text.

Legend: N sequences, P positions, Q = P + 1 tokens.
"""

import json
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

VOCABULARY = 50_000
LENGTH = 128  # positions of a sequence
END = "<|end|>"
HELD_OUT = 20  # every twentieth file, and the last twentieth of one, is kept from all training
SUFFIXES = (".py", ".txt", ".rst", ".md")
SKIPPED = ("site-packages", "dist-packages", "__pycache__", "encodings")  # the last: tables, not text
MOST_CHARACTERS = 1_500_000  # of a file


def standard_library() -> Path:
    """Where Python keeps the sources of its own library: text that is there wherever this runs."""
    return Path(sysconfig.get_path("stdlib"))


def read_texts(paths: Sequence[Path]) -> Iterator[tuple[str, bool]]:
    """Texts, each with whether it is held out, in order of their names."""
    for path in paths:
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = [file for file in found if _is_text(file, path)]
        for number, file in enumerate(files):
            try:
                text = file.read_text(encoding="utf-8")[:MOST_CHARACTERS]
            except UnicodeDecodeError:
                continue
            if path.is_dir():
                yield text, number % HELD_OUT == HELD_OUT - 1
            else:
                cut = len(text) - len(text) // HELD_OUT
                yield text[:cut], False
                yield text[cut:], True


def _is_text(file: Path, root: Path) -> bool:
    if file == root:
        return True
    inner = file.relative_to(root)
    return file.suffix in SUFFIXES and not set(SKIPPED) & set(inner.parts) and file.is_file()


def prepare_text(paths: Sequence[Path], run: Path) -> None:
    """Write `tokenizer.json`, `train.npy`, `held-out.npy` and `text.json` into a folder, unless they are there."""
    if (run / "text.json").is_file():
        return
    texts = list(read_texts(paths))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for text, is_held_out in texts if not is_held_out), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise SystemExit(f"text: expected enough of it for {VOCABULARY} entries, got {tokenizer.get_vocab_size()}")
    tokenizer.save(str(run / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    figures = {"bytes": sum(len(text.encode()) for text, _ in texts), "texts": len(texts)}
    for name, wanted in (("train", False), ("held-out", True)):
        parts = tokenizer.encode_batch([text for text, is_held_out in texts if is_held_out is wanted])
        ids = np.concatenate([np.array([*part.ids, end], np.uint16) for part in parts])
        np.save(run / f"{name}.npy", ids)
        figures[f"{name.replace('-', '_')}_tokens"] = len(ids)
    (run / "text.json").write_text(json.dumps(figures))


def pieces(ids: NDArray[np.uint16], starts: Tensor) -> Tensor:
    """Runs of LENGTH + 1 ids from some places, int64 (N, Q)."""
    places_NQ = starts[:, None] + torch.arange(LENGTH + 1)
    return torch.from_numpy(ids[places_NQ.numpy()].astype(np.int64))


def held_out_sequences(run: Path, num_sequences: int, seed: int = 0) -> Tensor:
    """Different sequences of the text that nothing was trained on, int64 (N, Q); the first are always the same."""
    ids = np.load(run / "held-out.npy")
    places = torch.randperm((len(ids) - 1) // LENGTH, generator=torch.Generator().manual_seed(seed))
    if len(places) < num_sequences:
        raise SystemExit(f"text: expected {num_sequences} held-out sequences, got {len(places)}; give more text")
    return pieces(ids, places[:num_sequences] * LENGTH)
