"""The tree of errors, grouped by what the caller can do about them.

A message reads `<where>: expected <this>, got <that>; <what to do>`. The command lines turn any `StoreError` into one
line and exit code 1.
"""

from typing import Self


class StoreError(Exception):
    """Something about a store, its corpus or its models that the caller can mend."""


class PathError(StoreError):
    """The path is not what was asked for: give another path."""


class FormatVersionError(StoreError):
    """The store is of a newer format version: install a newer release."""


class MismatchError(StoreError):
    """The run or the student does not fit what the store holds: use the settings, or the store, that fit."""


class CorpusError(StoreError):
    """The corpus is missing, empty or unusable: give another corpus."""


class CorpusMismatchError(CorpusError):
    """A sample is not the one that the row was made from: use the corpus that the store was made from."""


class DamageError(StoreError):
    """A checksum or a seal does not hold: dump the shard again, or take another copy.

    Attributes:
        shard: index of the damaged shard, or None where the damage is not in a shard.
        array: name of the damaged array, or None.
        chunk: index of the damaged chunk inside the shard, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        shard: int | None = None,
        array: str | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__(message)
        self.shard = shard
        self.array = array
        self.chunk = chunk

    @classmethod
    def in_shard(cls, where: object, array: str, shard: int, chunk: int | None, expected: str) -> Self:
        """The error of one array of a shard; `expected` goes on as `expected ..., got ...`."""
        place = f"array {array!r}, shard {shard}" + ("" if chunk is None else f", chunk {chunk}")
        return cls(
            f"{where}: {place}: expected {expected}; take another copy of the store, or dump this shard again",
            shard=shard,
            array=array,
            chunk=chunk,
        )


class NotSealedError(StoreError):
    """The rows asked for are not sealed: resume the dump, or finalize at what is sealed."""


class OutOfSpaceError(StoreError):
    """The disk is full: free space and run the same command again."""


class RemoteError(StoreError):
    """Object storage can't be reached, or refused: check the URL, the credentials and the network."""


class AlarmError(StoreError):
    """The run looks broken: mend what the message names, or switch the alarm off."""


class TeacherError(StoreError):
    """The teacher is missing, pickled, or does not give logits: give another teacher."""


class StudentError(StoreError):
    """The student's spec or checkpoint is unusable, or does not fit the store: give another student."""
