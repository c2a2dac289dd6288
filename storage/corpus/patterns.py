"""Names with braces and wildcards: `train-{0000..0146}.tar`, `part-{a,b}.parquet`, `*/train-*.tar`."""

import re
from collections.abc import Iterator

from storage.errors import CorpusError

# Names that one pattern may stand for.
MAX_NAMES = 2_000_000

_WILDCARD = re.compile(r"[*?\[]")
_SPECIAL = re.compile(r"[*?\[{]")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def has_wildcard(name: str) -> bool:
    """Whether a name has one of `*`, `?` and `[`, so that what it stands for has to be looked up."""
    return _WILDCARD.search(name) is not None


def is_pattern(name: str) -> bool:
    """Whether a name has wildcards, or braces that stand for something."""
    return has_wildcard(name) or next(expand_braces(name)) != name


def fixed_folder(pattern: str) -> tuple[str, str]:
    """A pattern as the folder in which nothing is special, and the rest.

    Example:
        >>> fixed_folder("/data/sets/train-{00..99}.tar")
        ('/data/sets', 'train-{00..99}.tar')
    """
    found = _SPECIAL.search(pattern)
    cut = pattern.rfind("/", 0, len(pattern) if found is None else found.start())
    return pattern[:cut], pattern[cut + 1 :]


def expand_braces(pattern: str) -> Iterator[str]:
    """The names that the braces of a pattern stand for, in the order in which they are written.

    A range keeps the leading zeros of its first number. Braces that hold neither a range nor a comma are left as they
    are, as shells do it.

    Raises:
        CorpusError: a range runs backwards, or stands for too many names.

    Example:
        >>> list(expand_braces("{train,val}-{08..10}.tar"))[:4]
        ['train-08.tar', 'train-09.tar', 'train-10.tar', 'val-08.tar']
    """
    for opened in (place for place, letter in enumerate(pattern) if letter == "{"):
        closed = _closing(pattern, opened)
        choices = None if closed is None else _choices(pattern[opened + 1 : closed], pattern)
        if choices is None or closed is None:
            continue
        before, behind = pattern[:opened], list(expand_braces(pattern[closed + 1 :]))
        for choice in choices:
            for inner in expand_braces(choice):
                for rest in behind:
                    yield before + inner + rest
        return
    yield pattern


def _closing(pattern: str, opened: int) -> int | None:
    """Where the brace that is opened there is closed."""
    depth = 0
    for place in range(opened, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[place], 0)
        if depth == 0:
            return place
    return None


def _choices(inside: str, pattern: str) -> Iterator[str] | None:
    """What stands between braces, one by one; None where it is neither a range nor a list."""
    found = _RANGE.fullmatch(inside)
    if found is not None:
        first, last = int(found[1]), int(found[2])
        if last < first or last - first >= MAX_NAMES:
            raise CorpusError(
                f"corpus '{pattern}': expected a range of 1 to {MAX_NAMES} ascending numbers, got {{{inside}}}; "
                "write the smaller number first"
            )
        width = len(found[1]) if found[1].startswith("0") else 1
        return (f"{number:0{width}d}" for number in range(first, last + 1))
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(inside):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append(inside[start:place])
            start = place + 1
    return iter([*parts, inside[start:]]) if parts else None


def matcher(pattern: str) -> re.Pattern[str]:
    """What matches the names that a pattern with wildcards stands for; a wildcard never stands for `/`.

    Example:
        >>> bool(matcher("*/train-?.tar").fullmatch("a/train-1.tar")), bool(matcher("*.tar").fullmatch("a/b.tar"))
        (True, False)
    """
    parts, place = [], 0
    while place < len(pattern):
        letter = pattern[place]
        closed = pattern.find("]", place + 2) if letter == "[" else -1
        if closed > 0:
            inside = pattern[place + 1 : closed].replace("\\", r"\\").replace("[", r"\[")
            parts.append(f"[{'^' + inside[1:] if inside.startswith('!') else inside}]")
            place = closed
        else:
            parts.append({"*": "[^/]*", "?": "[^/]"}.get(letter, re.escape(letter)))
        place += 1
    try:
        return re.compile("".join(parts), re.DOTALL)
    except re.error as error:
        raise CorpusError(
            f"corpus '{pattern}': expected a pattern, got one whose brackets stand for nothing ({error}); mend it"
        ) from error
