"""Settings of an experiment from a command's arguments: an option for each field."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")


def settings_from(
    kind: type[Settings], doc: str | None, arguments: Sequence[str] | None, needed: Mapping[str, Sequence[str]]
) -> Settings:
    """The settings that a script's arguments ask for.

    Args:
        kind: a dataclass; its fields without a default are paths, which have to be given.
        doc: of the script, shown by `--help`.
        arguments: instead of the command's own; None takes these.
        needed: files that must be in the folder of an option, by its name; one line ends the script where they are not.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(kind):
        name = f"--{field.name.replace('_', '-')}"
        if field.default is MISSING:
            parser.add_argument(name, type=Path, required=True)
        else:
            parser.add_argument(name, type=type(field.default), default=field.default, help=f"[{field.default}]")
    given = parser.parse_args(arguments)
    for option, names in needed.items():
        folder = getattr(given, option)
        for name in names:
            if not (folder / name).is_file():
                parser.error(f"--{option}: expected {name} in '{folder}', got none; give the folder that holds it")
    return kind(**vars(given))
