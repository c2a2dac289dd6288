"""What lies in a folder of transformers: its configuration and its weights, found without loading anything.

Sources: the names that `PreTrainedModel.save_pretrained` of transformers writes.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from storage.errors import StudentError

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
PICKLED = "pytorch_model.bin"


@dataclass(frozen=True)
class HfFiles:
    """A model's folder.

    Attributes:
        folder: where it lies.
        weights: the files that its weights are loaded from, in name order, an index of several among them; empty where
            there are none.
        is_pickled: whether they may run code while they are loaded.
    """

    folder: Path
    weights: tuple[Path, ...]
    is_pickled: bool

    @property
    def all(self) -> tuple[Path, ...]:
        """The configuration and the weights, in name order."""
        return tuple(sorted((self.folder / CONFIG, *self.weights)))


def find_hf_files(folder: str | Path, where: str) -> HfFiles:
    """The files of a model; safetensors where there are any, as transformers itself chooses.

    Args:
        folder: as `save_pretrained` wrote it.
        where: how an error names it.

    Raises:
        StudentError: there is no such folder, or no model in it, or a part of it is missing.
    """
    path = Path(folder)
    if not path.is_dir():
        got = "a file" if path.exists() else "nothing there"
        raise StudentError(
            f"{where}: expected a folder with a {CONFIG}, as save_pretrained writes it, got {got}; give the path of "
            "such a folder: nothing is downloaded"
        )
    if not (path / CONFIG).is_file():
        raise StudentError(
            f"{where}: expected a folder with a {CONFIG}, as save_pretrained writes it, got none in it; save the model "
            "and its configuration there"
        )
    for name in (SAFETENSORS, PICKLED):
        is_pickled = name == PICKLED
        if (path / name).is_file():
            return HfFiles(path, (path / name,), is_pickled)
        if (path / f"{name}.index.json").is_file():
            return HfFiles(path, _parts(path / f"{name}.index.json", where), is_pickled)
    return HfFiles(path, (), False)


def _parts(index: Path, where: str) -> tuple[Path, ...]:
    """An index and the files that it names."""
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        parts = [index.parent / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StudentError(
            f"{where}: expected the index of its weights in {index.name}, got a damaged file; take another copy"
        ) from error
    missing = sorted(part.name for part in parts if part.parent != index.parent or not part.is_file())
    if missing:
        raise StudentError(
            f"{where}: expected the {len(parts)} files of weights that {index.name} names, got none called "
            f"'{missing[0]}' beside it; take another copy of the folder"
        )
    return tuple(sorted((index, *parts)))
