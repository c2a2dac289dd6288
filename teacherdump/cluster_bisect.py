"""Which sample kills the workers that run it: found by halves, from nothing but which pieces were in work as one died.

Arithmetic without I/O. A shard that was in flight on a worker that died is suspicious: it is done again, alone on its
worker. After a second death it is scored in halves, each alone on its worker, without writing. A piece that comes back
is innocent, a piece whose worker dies is halved, down to one row; a row that kills twice by itself is convicted. Then
the shard is dumped without its convicted rows.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from storage.errors import TeacherError
from teacherdump.report import KILLED

DEATHS_OF_A_SHARD = 2  # deaths after which a shard is bisected: one may be another's fault, or nobody's
DEATHS_OF_A_ROW = 2  # deaths that convict a row which was alone on its worker
MOST_ACQUITTALS = 2  # times that all of a shard is found innocent, before its deaths are nobody's sample


@dataclass(frozen=True)
class Piece:
    """Some rows of a shard that a worker is to do.

    Attributes:
        shard: index of the shard.
        start: first row.
        stop: behind the last row.
        is_whole: whether the shard is dumped and sealed; else the rows are only scored, and nothing is kept.
        is_alone: whether nothing else may be in flight on its worker.
        without: rows that are left out, and why.
    """

    shard: int
    start: int
    stop: int
    is_whole: bool = True
    is_alone: bool = False
    without: tuple[tuple[int, str], ...] = ()


@dataclass
class _Case:
    """What is known of one suspicious shard."""

    start: int
    stop: int
    num_deaths: int = 0  # since the last verdict
    num_acquittals: int = 0
    num_open: int = 0  # pieces of the bisection that are not known yet
    num_found: int = 0  # rows that this bisection convicted
    deaths: list[tuple[int, int]] = field(default_factory=list)  # rows that were in flight at each death
    convicted: dict[int, str] = field(default_factory=dict)

    def deaths_of(self, row: int) -> int:
        """Deaths at which a row was in flight."""
        return sum(start <= row < stop for start, stop in self.deaths)


class Suspects:
    """The shards that were in flight on workers that died, and what is to be done about them."""

    def __init__(self) -> None:
        self._cases: dict[int, _Case] = {}
        self._waiting: deque[Piece] = deque()

    @property
    def num_waiting(self) -> int:
        """Pieces that wait for a worker."""
        return len(self._waiting)

    def next_piece(self) -> Piece | None:
        """The next piece, to be done alone on its worker; None where none waits."""
        return self._waiting.popleft() if self._waiting else None

    def put_back(self, piece: Piece) -> None:
        """A piece that was not done, through no fault of anybody."""
        self._waiting.appendleft(piece)

    def died(self, pieces: Iterable[Piece]) -> list[str]:
        """A worker died with these pieces in flight.

        Returns:
            What a person should know, a line each.

        Raises:
            TeacherError: a shard kills its workers, and no sample of it alone does.
        """
        return [line for piece in pieces for line in self._died(piece)]

    def _died(self, piece: Piece) -> list[str]:
        case = self._cases.setdefault(piece.shard, _Case(piece.start, piece.stop))
        case.deaths.append((piece.start, piece.stop))
        if piece.is_whole:
            return self._shard_died(piece.shard, case)
        if piece.stop - piece.start > 1:
            self._halve(piece.shard, case, piece.start, piece.stop)
            case.num_open -= 1
            return []
        row = piece.start
        if case.deaths.count((row, row + 1)) < DEATHS_OF_A_ROW:
            self._waiting.append(piece)
            return []
        case.num_found += 1
        case.convicted[row] = f"{KILLED}, {case.deaths_of(row)} times"
        return [f"row {row}: {case.convicted[row]}; it is left out", *self._closed(piece.shard, case)]

    def _shard_died(self, shard: int, case: _Case) -> list[str]:
        case.num_deaths += 1
        if case.num_deaths < DEATHS_OF_A_SHARD:
            self._whole(shard, case)
            return []
        if case.num_acquittals >= MOST_ACQUITTALS:
            raise TeacherError(
                f"shard {shard}: expected workers that live through rows {case.start} to {case.stop - 1}, got "
                f"{len(case.deaths)} that died, though no sample of them alone kills one; the memory may be too small: "
                "give workers more of it, a smaller --batch-size, or fewer --workers"
            )
        self._halve(shard, case, case.start, case.stop)
        return [f"shard {shard}: {case.num_deaths} workers that ran it died; looking for the sample"]

    def _halve(self, shard: int, case: _Case, start: int, stop: int) -> None:
        middle = (start + stop + 1) // 2
        for first, last in ((start, middle), (middle, stop)):
            if any(row not in case.convicted for row in range(first, last)):
                case.num_open += 1
                self._waiting.append(
                    Piece(shard, first, last, is_whole=False, is_alone=True, without=tuple(case.convicted.items()))
                )

    def _whole(self, shard: int, case: _Case) -> None:
        without = tuple(sorted(case.convicted.items()))
        self._waiting.append(Piece(shard, case.start, case.stop, is_alone=True, without=without))

    def done(self, piece: Piece) -> list[str]:
        """A piece came back; what a person should know, a line each."""
        case = self._cases.get(piece.shard)
        if case is None:
            return []
        if piece.is_whole:
            del self._cases[piece.shard]
            return []
        return self._closed(piece.shard, case)

    def _closed(self, shard: int, case: _Case) -> list[str]:
        """One piece of a bisection is known; the verdict, once all are."""
        case.num_open -= 1
        if case.num_open:
            return []
        found, case.num_found = case.num_found, 0
        case.num_deaths = 0
        self._whole(shard, case)
        if found:
            return []
        case.num_acquittals += 1
        return [f"shard {shard}: no sample of it kills a worker by itself; it is done again"]
