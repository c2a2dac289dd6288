"""Checks that the options of several passes share."""

from collections.abc import Iterable, Sequence


def check_choice(name: str, value: str | None, allowed: Sequence[str]) -> None:
    """Refuse an option that is given and none of a few words.

    Raises:
        ValueError: it is another.
    """
    if value is not None and value not in allowed:
        raise ValueError(f"{name}: expected {' or '.join(allowed)}, got {value!r}")


def ascending_temperatures(values: Iterable[float]) -> tuple[float, ...]:
    """Temperatures as a manifest declares them: floats, ascending, each once.

    Raises:
        ValueError: one is not a number above 0.

    Example:
        >>> ascending_temperatures([4, 1, 4])
        (1.0, 4.0)
    """
    found = tuple(sorted({float(value) for value in values}))
    if any(not 0 < value < float("inf") for value in found):
        raise ValueError(f"temperatures: expected numbers above 0, got {list(found)}")
    return found
