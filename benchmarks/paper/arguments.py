"""Settings of an experiment from a command's arguments: an option for each field."""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")


def settings_from(kind: type[Settings], doc: str | None, arguments: Sequence[str] | None = None) -> Settings:
    """The settings that a script's arguments ask for.

    Args:
        kind: a dataclass; its fields without a default are paths, which have to be given.
        doc: of the script, shown by `--help`.
        arguments: instead of the command's own.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(kind):
        name = f"--{field.name.replace('_', '-')}"
        if field.default is MISSING:
            parser.add_argument(name, type=Path, required=True)
        else:
            parser.add_argument(name, type=type(field.default), default=field.default, help=f"[{field.default}]")
    return kind(**vars(parser.parse_args(arguments)))
