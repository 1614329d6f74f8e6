import pytest

from fedqc.lazy import Chosen, Kept, Lazy


class Squares(Lazy[int]):
    """Five squares, and which of them somebody asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 5

    def make(self, index: int) -> int:
        self.asked.append(index)
        return index**2


def test_items_are_made_when_they_are_asked_for() -> None:
    squares = Squares()
    part = squares[1:4]
    assert squares.asked == []
    assert (len(part), part[1], part[-1]) == (3, 4, 9)
    assert squares.asked == [2, 3]
    assert list(squares) == [0, 1, 4, 9, 16]
    assert list(part[::-1]) == [9, 4, 1]


@pytest.mark.parametrize("index", [5, -6])
def test_there_is_nothing_beyond_the_ends(index: int) -> None:
    squares = Squares()
    with pytest.raises(IndexError):
        squares[index]
    assert squares.asked == []


def test_the_chosen_ones_come_in_the_order_in_which_they_were_chosen() -> None:
    assert list(Chosen(Squares(), [3, 0, 3])) == [9, 0, 9]


def test_items_stay_while_there_is_room() -> None:
    squares = Squares()
    kept = Kept(squares, lambda item: 10 if item == 9 else 4, 9)
    assert [kept[index] for index in (1, 3, 1, 3, 2, 2)] == [1, 9, 1, 9, 4, 4]
    assert squares.asked == [1, 3, 3, 2, 2]  # of 9 bytes 4 are taken, and then there is no more room
