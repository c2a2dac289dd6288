"""How one of several writers seals a shard in object storage, where there are no locks.

A writer has all bytes of a shard, and their digests, before it writes the first. It creates an intent record, which
holds the seal that it means to create; then the objects; then it marks the intent as committed, which is what decides;
then it creates the seal. Each of these is written only if what it goes over is still what was seen, so that of two
writers one is told. One that finds another's intent waits for the other's seal, and takes the intent over if nothing
comes of it: from then on the first one's commit fails. A committed intent is never taken over: whoever finds it creates
the seal that it holds. Once the seal is there the intent goes; who creates one after that looks for the seal again
before anything is written.

What a stopped writer may still do after its intent was taken over is an object that it creates where there is none, and
the new owner sees it; or one put over an object that it had seen before, which by then is another. That leaves one gap:
storage that tells objects apart by their bytes alone, an object that was there before with just the bytes that the new
owner writes, and a request that arrives after all of it. `finalize` hashes every object once more for that.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from storage.errors import DamageError
from storage.records import checked_record, signed
from storage.remote import Place
from storage.untrusted import MAX_RECORD_BYTES

PATIENCE_S = 15.0  # for another writer's seal; twice as much each time that an intent is taken over
MAX_PATIENCE_S = 600.0
FIRST_LOOK_S, LAST_LOOK_S = 0.05, 2.0


def intent_name(seal: str) -> str:
    """Name of the intent of a seal record.

    Example:
        >>> intent_name("seals/00000003.json")
        'seals/00000003.intent.json'
    """
    return seal.removesuffix(".json") + ".intent.json"


@dataclass(frozen=True)
class Intent:
    """What a writer is about to seal.

    Attributes:
        writer: who wrote it, unique.
        attempt: how often an intent of this shard was taken over.
        committed: whether all objects are there, and the seal is decided.
        seal: the bytes of the seal record.
    """

    writer: str
    attempt: int
    committed: bool
    seal: bytes

    def to_bytes(self) -> bytes:
        """One line of JSON, its own sha256 last."""
        return signed(vars(self) | {"seal": self.seal.decode()})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Intent | None":
        """The intent of a record; None where it is no such record, so that anyone may go over it."""
        try:
            value = checked_record(data, where)
            intent = cls(**(value | {"seal": str(value["seal"]).encode()}))
        except (DamageError, KeyError, TypeError, UnicodeEncodeError):
            return None
        is_whole = isinstance(intent.attempt, int) and isinstance(intent.committed, bool)
        return intent if is_whole and isinstance(intent.writer, str) else None


@dataclass(frozen=True)
class Sealing:
    """One writer's attempt at one shard.

    Attributes:
        place: the store.
        seal_name: of the seal record.
        seal: its bytes.
        objects: the shard's objects by key.
        writer: who writes, unique.
        patience_s: for another's seal.
        each: calls a function with each of some things, side by side.
        put_seal: creates the seal record; False where there is another.
    """

    place: Place
    seal_name: str
    seal: bytes
    objects: Mapping[str, bytes]
    writer: str
    patience_s: float
    each: Callable[[Callable[[str], bool], Iterable[str]], Iterable[bool]]
    put_seal: Callable[[str, bytes], bool]

    def run(self) -> bool:
        """Write the objects and create the seal.

        Returns:
            Whether the seal that is there is this one.
        """
        name, mine = intent_name(self.seal_name), Intent(self.writer, 0, False, self.seal)
        waiting = _Waiting(self.patience_s)
        while True:
            if self.place.get(self.seal_name, MAX_RECORD_BYTES) is not None:
                return self.put_seal(self.seal_name, self.seal)
            found = self.place.look(name, MAX_RECORD_BYTES)
            if found is None:
                self.place.put_new(name, mine.to_bytes())
                continue
            data, state = found
            there = Intent.from_bytes(data, name)
            if there is not None and there.committed:
                return self._seal(there.seal) and there.seal == self.seal
            if there is None or there.seal != self.seal:
                is_mine = there is not None and there.writer == self.writer  # of an attempt of this writer that failed
                attempt = 0 if there is None else there.attempt
                if is_mine or waiting.is_over(data, attempt):
                    self.place.put_over(name, replace(mine, attempt=attempt + 1).to_bytes(), state)
                continue
            if self._write(name) and self.place.put_over(name, replace(there, committed=True).to_bytes(), state):
                return self._seal(self.seal)

    def _seal(self, seal: bytes) -> bool:
        is_there = self.put_seal(self.seal_name, seal)
        self.place.delete(intent_name(self.seal_name))
        return is_there

    def _write(self, name: str) -> bool:
        """Write every object; False where the intent is not of this seal any more."""

        def is_ours() -> bool:
            data = self.place.get(name, MAX_RECORD_BYTES)
            there = None if data is None else Intent.from_bytes(data, name)
            return there is not None and there.seal == self.seal

        def write(key: str) -> bool:
            data = self.objects[key]
            while not self.place.put_new(key, data):
                state = self.place.state(key)  # seen before the look at the intent: see above
                if not is_ours():
                    return False
                if state is not None and self.place.put_over(key, data, state):
                    break
            return True

        return all(self.each(write, self.objects))


class _Waiting:
    """How long another's intent has stood as it is."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s, self._pause_s = patience_s, FIRST_LOOK_S
        self._seen: Any = None
        self._since = 0.0

    def is_over(self, data: bytes, attempt: int) -> bool:
        """Wait a little; True where it has been long enough."""
        if data != self._seen:
            self._seen, self._since, self._pause_s = data, time.monotonic(), FIRST_LOOK_S
        patience = min(MAX_PATIENCE_S, self._patience_s * 2 ** min(attempt, 10))
        if time.monotonic() - self._since >= patience:
            return True
        time.sleep(min(self._pause_s, patience))
        self._pause_s = min(2 * self._pause_s, LAST_LOOK_S)
        return False
