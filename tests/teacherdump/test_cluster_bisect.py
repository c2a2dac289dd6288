"""A sample that kills its workers is found from the deaths alone."""

import random

import pytest

from storage.errors import TeacherError
from teacherdump.cluster_bisect import Piece, Suspects


def dumped(killers: set[int], start: int, stop: int, chance: float = 0.0, seed: int = 0) -> tuple[Piece, int]:
    """The piece that at last dumps a shard with some killers in it, and how many workers died on the way."""
    suspects, dice = Suspects(), random.Random(seed)
    piece: Piece | None = Piece(7, start, stop)
    for num_deaths in range(1000):
        while True:
            assert piece is not None
            run = set(range(piece.start, piece.stop)) - {row for row, _ in piece.without}
            if run & killers or dice.random() < chance:
                suspects.died([piece])
                break
            suspects.done(piece)
            if piece.is_whole:
                assert suspects.num_waiting == 0
                return piece, num_deaths
            piece = suspects.next_piece()
        piece = suspects.next_piece()
        assert piece is not None
        assert piece.is_alone
    raise AssertionError("expected an end, got none")


@pytest.mark.parametrize("killers", [{0}, {99}, {41}, {3, 4}, {0, 50, 99}, set(range(20, 30))])
def test_just_the_rows_that_kill_are_left_out(killers: set[int]) -> None:
    piece, _ = dumped({1000 + row for row in killers}, 1000, 1100)
    assert piece.is_whole
    assert {row - 1000 for row, _ in piece.without} == killers


def test_one_killer_costs_a_worker_for_each_half() -> None:
    piece, num_deaths = dumped({1000}, 0, 1024)
    assert num_deaths == 2 + 9 + 2
    assert piece.without == ((1000, "the worker that ran this sample died, 13 times"),)


def test_a_shard_of_one_row_is_convicted_by_itself() -> None:
    piece, num_deaths = dumped({5}, 5, 6)
    assert (num_deaths, [row for row, _ in piece.without]) == (3, [5])


@pytest.mark.parametrize("seed", range(20))
def test_workers_that_die_of_something_else_convict_nobody_who_lives(seed: int) -> None:
    piece, _ = dumped({17}, 0, 64, chance=0.04, seed=seed)
    assert {row for row, _ in piece.without} == {17}


def test_a_shard_that_was_in_flight_beside_a_killer_is_only_suspicious() -> None:
    suspects = Suspects()
    assert suspects.died([Piece(0, 0, 4), Piece(1, 4, 8)]) == []
    again = [suspects.next_piece(), suspects.next_piece()]
    assert again == [Piece(0, 0, 4, is_alone=True), Piece(1, 4, 8, is_alone=True)]
    assert again[1] is not None
    assert suspects.done(again[1]) == []
    assert suspects.next_piece() is None
    assert again[0] is not None
    assert suspects.died([again[0]]) == ["shard 0: 2 workers that ran it died; looking for the sample"]
    assert [suspects.next_piece(), suspects.next_piece()] == [
        Piece(0, 0, 2, is_whole=False, is_alone=True),
        Piece(0, 2, 4, is_whole=False, is_alone=True),
    ]


def test_a_shard_that_kills_though_no_row_does_ends_the_run() -> None:
    suspects = Suspects()

    def go_on(piece: Piece | None) -> None:
        while piece is not None:
            if piece.is_whole:
                suspects.died([piece])
            else:
                suspects.done(piece)
            piece = suspects.next_piece()

    with pytest.raises(
        TeacherError, match="shard 3: expected workers that live through rows 0 to 7, got 6 that died, though no sample"
    ):
        go_on(Piece(3, 0, 8))


def test_a_piece_that_was_not_done_comes_first() -> None:
    suspects = Suspects()
    suspects.died([Piece(0, 0, 4), Piece(1, 4, 8)])
    first = suspects.next_piece()
    assert first is not None
    suspects.put_back(first)
    assert suspects.num_waiting == 2
    assert suspects.next_piece() == first
