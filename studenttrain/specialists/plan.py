"""Which classes each specialist has: a small JSON file that the other commands go by."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from storage.backends.files import clear_os_errors, replace_file
from storage.errors import DamageError, PathError, StudentError
from storage.untrusted import is_count, parse_json

FORMAT = "logitstore-specialists"
FORMAT_VERSION = 1
MAX_PLAN_BYTES = 64 << 20
ADVICE = "make a plan: studenttrain specialists plan"


@dataclass(frozen=True)
class SpecialistsPlan:
    """Which classes each specialist has, and of which store.

    Attributes:
        num_classes: classes of the generalist.
        class_names: names in class order, or None where they are not known.
        store: which store was clustered, as `store_identity` gives it.
        specialists: the classes of each, ascending; they may overlap, and some classes may be in none.
        how: how the clusters were found: method, seed, figures.

    Raises:
        ValueError: a field is out of range.
    """

    num_classes: int
    class_names: tuple[str, ...] | None
    store: Mapping[str, Any]
    specialists: tuple[tuple[int, ...], ...]
    how: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not is_count(self.num_classes) or self.num_classes < 2:
            raise ValueError(f"num_classes: expected a whole number, at least 2, got {self.num_classes!r}")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"class_names: expected one for each of {self.num_classes} classes, got {len(self.class_names)}"
            )
        if not self.specialists:
            raise ValueError("specialists: expected at least one, got none")
        for number, classes in enumerate(self.specialists):
            where = f"specialists: number {number}"
            if not classes or len(classes) >= self.num_classes:
                raise ValueError(
                    f"{where}: expected 1 to {self.num_classes - 1} classes, some being left for the dustbin, got "
                    f"{len(classes)}"
                )
            wrong = [label for label in classes if not is_count(label) or label >= self.num_classes]
            if wrong:
                raise ValueError(f"{where}: expected classes from 0 to {self.num_classes - 1}, got {wrong[0]!r}")
            if any(one >= two for one, two in pairwise(classes)):
                raise ValueError(f"{where}: expected classes ascending, each once, got others")

    @property
    def uncovered(self) -> tuple[int, ...]:
        """The classes that no specialist has, ascending."""
        covered = {label for classes in self.specialists for label in classes}
        return tuple(label for label in range(self.num_classes) if label not in covered)

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON object."""
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "num_classes": self.num_classes,
            "class_names": None if self.class_names is None else list(self.class_names),
            "store": dict(self.store),
            "specialists": [list(classes) for classes in self.specialists],
            "how": dict(self.how),
        }

    @classmethod
    def from_json(cls, value: Any, where: str = "plan") -> Self:
        """The inverse of `to_json`.

        Args:
            value: a JSON object.
            where: where it is from, for messages.

        Raises:
            StudentError: it is no plan, of a newer release, or damaged.
        """
        if not isinstance(value, Mapping) or value.get("format") != FORMAT:
            raise StudentError(f"{where}: expected a plan of specialists, got another JSON; {ADVICE}")
        version: Any = value.get("version")
        if not is_count(version) or version < 1:
            raise StudentError(f"{where}: expected a version, got {str(version)[:40]!r}; {ADVICE}")
        if version > FORMAT_VERSION:
            raise StudentError(f"{where}: expected version {FORMAT_VERSION}, got {version}; install a newer release")
        try:
            _check_types(value)
            names = value["class_names"]
            return cls(
                num_classes=value["num_classes"],
                class_names=None if names is None else tuple(names),
                store=dict(value["store"]),
                specialists=tuple(tuple(classes) for classes in value["specialists"]),
                how=dict(value["how"]),
            )
        except KeyError as error:
            raise StudentError(f"{where}: expected {error.args[0]!r}, got none; {ADVICE}") from None
        except ValueError as error:
            raise StudentError(f"{where}: {error}; {ADVICE}") from None


def _check_types(value: Mapping[str, Any]) -> None:
    """Refuse fields of another type, as JSON that somebody else made may have them."""
    names, specialists = value["class_names"], value["specialists"]
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError("class_names: expected a list of names, or null, got something else")
    if not isinstance(specialists, list) or not all(isinstance(classes, list) for classes in specialists):
        raise ValueError("specialists: expected lists of classes, got something else")
    for name in ("store", "how"):
        if not isinstance(value[name], Mapping):
            raise ValueError(f"{name}: expected an object, got something else")  # noqa: TRY004
    for name in ("digest", "content_digest"):
        if not isinstance(value["store"].get(name), str | None):
            raise ValueError(f"store: expected {name} to be a digest, got something else")  # noqa: TRY004
    if not isinstance(value["store"].get("digest"), str):
        raise ValueError("store: expected its digest, got none")  # noqa: TRY004


def load_plan(path: str | Path) -> SpecialistsPlan:
    """The plan in a file.

    Raises:
        PathError: there is no such file.
        StudentError: it is no plan, too large for one, of a newer release, or damaged.
    """
    path, where = Path(path), f"plan '{path}'"
    if not path.is_file():
        raise PathError(f"{where}: expected a file, got nothing there; {ADVICE}")
    with clear_os_errors(path), path.open("rb") as file:
        data = file.read(MAX_PLAN_BYTES + 1)
    if len(data) > MAX_PLAN_BYTES:
        raise StudentError(f"{where}: expected at most {MAX_PLAN_BYTES >> 20} MiB, got more; {ADVICE}")
    try:
        value = parse_json(data, where)
    except DamageError:
        raise StudentError(f"{where}: expected JSON, got something else; {ADVICE}") from None
    return SpecialistsPlan.from_json(value, where)


def write_plan(path: str | Path, plan: SpecialistsPlan) -> None:
    """Write a plan durably, in place of one that is there: a kill leaves the old one or the new one, whole.

    Raises:
        PathError: the folder can't be written.
        OutOfSpaceError: the disk is full.
    """
    path = Path(path)
    with clear_os_errors(path):
        replace_file(path, plan_text(plan).encode("utf-8", "surrogatepass"))  # names may be any JSON strings


def plan_text(plan: SpecialistsPlan) -> str:
    """A plan as it stands in its file: one line a specialist, so that a person can read and change it."""
    value = plan.to_json()
    rows = ",\n".join(f"    {_line(classes)}" for classes in value["specialists"])
    long = {"class_names": _line(value["class_names"]), "specialists": f"[\n{rows}\n  ]"}
    text = json.dumps(value | dict.fromkeys(long, "@"), indent=2, ensure_ascii=False, allow_nan=False)
    for name, lines in long.items():
        text = text.replace(f'"{name}": "@"', f'"{name}": {lines}', 1)
    return text + "\n"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
