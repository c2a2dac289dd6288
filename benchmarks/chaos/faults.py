"""What goes wrong, and how often it really did."""

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Relative frequency of each kind. A killed driver costs the most time, since four workers start anew with it.
AT_THE_PROXY: Mapping[str, float] = {
    "error-500": 8,
    "error-503": 8,
    "late-error": 5,
    "cut-answer": 8,
    "cut-request": 8,
    "lost-answer": 8,
    "slow": 3,
    "full": 2,
    "refuse": 2,
    "stop": 2,
}
KILLS: Mapping[str, float] = {"worker-killed": 6, "driver-killed": 3}
# At most so many in a round: each costs the time in which workers start, and a round is to come to its end.
MOST: Mapping[str, int] = {
    "driver-killed": 2,
    "worker-killed": 10,
    "worker-left": 4,
    "worker-joined": 4,
    "disk-full": 6,
}
LONGEST_S: Mapping[str, float] = {"slow": 4.0, "full": 4.0, "refuse": 3.0, "stop": 4.0}
MOST_REQUESTS = 4
MOST_SPARED = 12  # requests between two faults


def proxy_fault(kind: str, generator: random.Random) -> dict[str, Any]:
    """What the proxy is told of a fault of a kind of `AT_THE_PROXY`."""
    fault: dict[str, Any] = {"kind": kind, "spare": generator.randint(1, MOST_SPARED)}
    if kind in LONGEST_S:
        return fault | {"seconds": round(generator.uniform(0.5, LONGEST_S[kind]), 2)}
    if kind.startswith("error-"):
        return fault | {"kind": "error", "status": int(kind[6:]), "requests": generator.randint(1, MOST_REQUESTS)}
    return fault | ({"status": generator.choice([500, 503])} if kind == "late-error" else {})


@dataclass
class Tally:
    """Faults that hit something.

    Attributes:
        faults: number by kind; one that fell on nothing is none.
        requests: requests that each kind broke or held up.
        missed: number by kind of those that found nothing to break.
    """

    faults: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    _armed: dict[int, str] = field(default_factory=dict)
    _num_armed: int = 0

    @property
    def num_faults(self) -> int:
        """Faults that hit something, so far."""
        return sum(self.faults.values())

    @property
    def num_armed(self) -> int:
        """Faults that wait for something to break, or are under way."""
        return len(self._armed)

    def arm(self, kind: str) -> int:
        """Number of a fault that is going to be reported."""
        self._num_armed += 1
        self._armed[self._num_armed] = kind
        return self._num_armed

    def heard(self, number: int, hits: int) -> None:
        """A fault that was armed is over."""
        kind = self._armed.pop(number)
        self.add(kind, hits)
        self.requests[kind] += hits

    def add(self, kind: str, hits: int = 1) -> None:
        """Count a fault that was no matter of the proxy's."""
        if hits:
            self.faults[kind] += 1
        else:
            self.missed[kind] += 1
