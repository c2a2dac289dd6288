"""The share of each class where a calibrated student will be used: equal, from a file, or what a store says.

Legend: C classes.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import StudentError
from storage.reader import Store
from storage.scan import class_mass
from studenttrain.checks import check_same_classes, open_targets, store_identity
from studenttrain.export import StudentCard

UNIFORM = "uniform"
MAX_TAIL = 0.1  # of the mass, that a topk store may leave open
MAX_SUM_ERROR = 1e-3


@dataclass(frozen=True)
class Prior:
    """The share of each class.

    Attributes:
        probs_C: above 0, float64; they sum to one.
        source: where it is from, for the card.
        note: what a user should know of it, or None.
        num_counted: samples that it is a mean of; None where it is no mean.
        samples: sha256 of the digests of all of its store's samples, in order; None where it is of no whole store.
    """

    probs_C: NDArray[np.float64]  # noqa: N815
    source: Mapping[str, Any]
    note: str | None = None
    num_counted: int | None = None
    samples: str | None = None


def read_prior(text: str, card: StudentCard, where: str, advance: Callable[[int], None]) -> Prior:
    """The prior that an option names.

    Args:
        text: `uniform`, the path of a `.json` file, or the path or URL of a store.
        card: of the student, for its classes.
        where: how an error names the student.
        advance: called with the number of rows of the store that were counted, now and then.

    Raises:
        StoreError: it is of other classes, can't be read, or gives a class nothing.
    """
    if text == UNIFORM:
        return Prior(np.full(card.num_classes, 1 / card.num_classes), {"from": UNIFORM})
    if text.endswith(".json"):
        probs_C = _checked(_of_file(Path(text), card), f"prior '{text}'", card)
        return Prior(probs_C / probs_C.sum(), {"from": "file", "probs": (probs_C / probs_C.sum()).tolist()})
    return _of_store(text, card, where, advance)


def _of_store(path: str, card: StudentCard, where: str, advance: Callable[[int], None]) -> Prior:
    """The mean soft-target mass of a store's rows at T = 1."""
    with open_targets(path) as store:
        check_same_classes(store, card.num_classes, card.class_names, where)
        identity, num_rows = store_identity(store), store.num_sealed_rows
        samples = _samples_of(store) if num_rows == store.layout.num_rows else None
    mass = class_mass(path, progress=advance)
    if mass.tail > MAX_TAIL:
        raise StudentError(
            f"prior '{path}': expected a store that tells the class of {100 * (1 - MAX_TAIL):g} % of its mass or more, "
            f"got {100 * (1 - mass.tail):.3g} %: the rest is in the tails of its topk targets; use a store with a "
            "larger --k, or give the prior as a file"
        )
    probs_C = _checked(np.array(mass.mean), f"prior '{path}'", card)
    note = None
    if mass.tail > 0:
        note = f"{100 * mass.tail:.2g} % of the prior's mass is in tails, taken to be spread as the rest is"
    source = {"from": "store", "num_rows": num_rows, **identity}
    return Prior(probs_C / probs_C.sum(), source, note, num_rows, samples)


def _samples_of(store: Store) -> str:
    """sha256 of the digests of a whole store's samples, in order."""
    digest = hashlib.sha256()
    for shard in store.sealed_shards():
        start, stop = store.layout.shard_bounds(shard)
        digest.update(store.read(["sample_digest"], start, stop)["sample_digest"].astype("<u8").tobytes())
    return digest.hexdigest()


def _of_file(path: Path, card: StudentCard) -> NDArray[np.float64]:
    """The numbers of a JSON file, in class order."""
    where = f"prior '{path}'"
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StudentError(f"{where}: expected a JSON file, got nothing there; check the path") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise StudentError(f"{where}: expected a JSON file, got one that can't be read ({reason}); mend it") from error
    if isinstance(value, Mapping):
        names = card.class_names or tuple(map(str, range(card.num_classes)))
        wrong = sorted(set(value) ^ set(names))
        if wrong:
            got = f"{wrong[0]!r} too" if wrong[0] in value else f"none for {wrong[0]!r}"
            raise StudentError(
                f"{where}: expected a probability for each of the {card.num_classes} classes by name, got {got}; name "
                "them as the student does, or give a list"
            )
        value = [value[name] for name in names]
    if not isinstance(value, list) or len(value) != card.num_classes:
        got = f"{len(value)}" if isinstance(value, list) else type(value).__name__
        raise StudentError(
            f"{where}: expected a list of {card.num_classes} probabilities, or an object of them by class, got {got}; "
            "give one for each class"
        )
    if any(isinstance(item, bool) or not isinstance(item, (int, float)) for item in value):
        raise StudentError(f"{where}: expected numbers, got others; give a probability for each class")
    probs_C = np.array(value, np.float64)
    if not abs(probs_C.sum() - 1) <= MAX_SUM_ERROR:
        raise StudentError(
            f"{where}: expected probabilities that sum to 1, got a sum of {probs_C.sum():g}; divide them by it"
        )
    return probs_C


def _checked(probs_C: NDArray[np.float64], where: str, card: StudentCard) -> NDArray[np.float64]:
    """Refuse a class that can't occur: it has no finite bias."""
    if not (probs_C > 0).all():
        index = int(np.argmin(probs_C > 0))
        raise StudentError(
            f"{where}: expected a probability above 0 for each class, got {probs_C[index]:g} for class "
            f"{name_of(card, index)}: no finite bias gives it that; give the prior as a file in which it has a small "
            "one, such as 1e-6"
        )
    return probs_C


def name_of(card: StudentCard, index: int) -> str:
    """A class's name, or its number where it has none."""
    return str(index) if card.class_names is None else card.class_names[index]
