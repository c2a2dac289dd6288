"""What a store of an ensemble keeps, and what its members' stores can't say together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from storage.encodings import Dense, Encoding, Sample, TopK
from storage.encodings.sample import MAX_DRAWS
from storage.encodings.values import ValueType
from storage.errors import MismatchError
from storage.manifest import Compressor
from storage.options import ascending_temperatures, check_choice
from storage.scan.ensemble import Combine
from storage.scan.members import Member

FINENESS: tuple[ValueType, ...] = ("uint8", "float16", "float32")  # what a value is stored in, the coarsest first


@dataclass(frozen=True)
class CombineOptions:
    """How stores become one; None is as they are.

    Attributes:
        combine: `mean-probs`, the mean of their probabilities at T = 1, or `mean-logits`, of their logits.
        k: kept entries, of topk stores; None is as many as the tolerance allows.
        tolerance: of topk stores, how far a kept probability may be off, 0 to below 1; None is 0: exact, or refused.
        temperatures: that the new store declares; none are those that every store declares.
        values: how a logit is stored; None is as in the coarsest of the stores.
        compressor: `none` or `zstd`; None is that of the first.

    Raises:
        ValueError: an option is out of range.
    """

    combine: Combine = "mean-probs"
    k: int | None = None
    tolerance: float | None = None
    temperatures: tuple[float, ...] = ()
    values: ValueType | None = None
    compressor: Compressor | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("combine", get_args(Combine)), ("values", FINENESS), ("compressor", ("none", "zstd"))):
            check_choice(name, getattr(self, name), allowed)
        if self.k is not None and self.k < 1:
            raise ValueError(f"k: expected at least 1, got {self.k}")
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance: expected a probability from 0 to below 1, got {self.tolerance}")
        object.__setattr__(self, "temperatures", ascending_temperatures(self.temperatures))


def choose_encoding(members: Sequence[Member], options: CombineOptions) -> tuple[Encoding, tuple[float, ...]]:
    """What the new store keeps, and at which temperatures; of topk, as many entries as there could be.

    Raises:
        MismatchError: the stores can't say it together.
        ValueError: an option would be ignored, or has to be given.
    """
    encodings = [member.manifest.encoding for member in members]
    first, where = encodings[0], members[0].store.path
    for member, encoding in zip(members, encodings, strict=True):
        if encoding.name == "hidden":
            raise MismatchError(
                f"{member.store.path}: expected a store of what the teacher said, got hidden states, which are each "
                "teacher's own; make logits of them first: logitstore transcode --encoding dense"
            )
        if encoding.name != first.name:
            raise MismatchError(
                f"{member.store.path}: expected {first.name}, as {where} has it, got {encoding.name}; bring them to "
                "one encoding first: logitstore transcode"
            )
    _refuse_ignored(first.name, options)
    if isinstance(first, Dense):
        return Dense(options.values or _coarsest(encodings)), _dense_temperatures(members, options)
    _refuse_unknown(members, options)
    if isinstance(first, TopK):
        least = min(encoding.k for encoding in encodings if isinstance(encoding, TopK))
        if options.k is not None and options.k > least:
            raise MismatchError(
                f"{where}: expected at most the {least} entries that every store keeps, got k = {options.k}; use a "
                "smaller k"
            )
        return TopK(options.k or least, options.values or _coarsest(encodings)), (1.0,)
    draws = [encoding.draws for encoding in encodings if isinstance(encoding, Sample)]
    if len(set(draws)) > 1:
        raise MismatchError(
            f"{where}: expected the same number of draws in every store, each teacher's share, got {draws}; dump again "
            "with the same --draws"
        )
    if sum(draws) > MAX_DRAWS:
        raise MismatchError(
            f"{where}: expected at most {MAX_DRAWS} draws of all stores together, which a count of one byte holds, got "
            f"{sum(draws)}; dump again with fewer --draws"
        )
    return Sample(sum(draws), 0), (1.0,)


def _refuse_ignored(name: str, options: CombineOptions) -> None:
    for option in ("k", "tolerance"):
        value = getattr(options, option)
        if value is not None and name != "topk":
            raise ValueError(f"{option}: expected none with {name}, got {value}; it is of topk: leave it out")
    if name == "sample" and options.values is not None:
        raise ValueError(f"values: expected none with sample, which keeps counts, got {options.values}; leave it out")


def _coarsest(encodings: Sequence[Encoding]) -> ValueType:
    kept = [encoding.values for encoding in encodings if isinstance(encoding, Dense | TopK)]
    return min(kept, key=FINENESS.index)


def _dense_temperatures(members: Sequence[Member], options: CombineOptions) -> tuple[float, ...]:
    if options.temperatures:
        return options.temperatures
    declared = set.intersection(*(set(member.manifest.temperatures) for member in members))
    if not declared:
        raise ValueError("temperatures: expected one that every store declares, got none; give --temperature")
    return tuple(sorted(declared))


def _refuse_unknown(members: Sequence[Member], options: CombineOptions) -> None:
    """Refuse what topk and sample stores can't say together.

    Probabilities are averaged at T = 1. At another temperature, and of mean logits at any, what they sum to goes over
    classes that no store keeps.
    """
    name, where = members[0].manifest.encoding.name, members[0].store.path
    if options.combine != "mean-probs":
        raise MismatchError(
            f"{where}: expected dense stores for {options.combine}, got {name}: what the ensemble's probabilities sum "
            "to takes the logits of all classes; use mean-probs, or teacherdump run with --model repeated"
        )
    other = next((value for value in options.temperatures if value != 1), None)
    if other is not None:
        raise MismatchError(
            f"{where}: expected temperature 1, got {other:g}: an ensemble's probabilities at another one take those of "
            f"all classes, which {name} stores do not keep; leave it out, or combine dense stores"
        )
    for member in members:
        if 1.0 not in member.manifest.temperatures:
            declared = ", ".join(f"{value:g}" for value in member.manifest.temperatures)
            raise MismatchError(
                f"{member.store.path}: expected a store that declares temperature 1, at which probabilities are "
                f"averaged, got {declared}; dump it again with --temperature 1"
            )
