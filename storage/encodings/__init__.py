"""Encodings: soft targets to arrays and back. One encoding a file; each states what it keeps and its error bound."""

from collections.abc import Mapping
from typing import Any

from storage.encodings.dense import Dense
from storage.encodings.hidden import HeadArrays, Hidden
from storage.encodings.protocol import Encoding, check_temperature
from storage.encodings.sample import Sample
from storage.encodings.topk import TopK
from storage.errors import FormatVersionError

__all__ = ["Dense", "Encoding", "HeadArrays", "Hidden", "Sample", "TopK", "check_temperature", "encoding_from_json"]


def encoding_from_json(value: Mapping[str, Any]) -> Encoding:
    """The encoding that a manifest names.

    Raises:
        FormatVersionError: the encoding is not known to this release.
    """
    kinds: dict[str, type[Dense | TopK | Sample | Hidden]] = {kind.name: kind for kind in (Dense, TopK, Sample, Hidden)}
    options = dict(value)
    name = options.pop("name", None)
    if name not in kinds:
        raise FormatVersionError(
            f"manifest: expected an encoding of {', '.join(kinds)}, got {name!r}; install a newer release"
        )
    try:
        return kinds[name](**options)
    except TypeError as error:
        raise FormatVersionError(
            f"manifest: expected options of the encoding {name!r} that this release knows, got {sorted(options)}; "
            "install a newer release"
        ) from error
