"""What a reply may hold before it is loaded; Flower's own pulling, with objects that are made up."""

from importlib import import_module

import pytest
from fedqc_server import limits
from fedqc_server.limits import Limit, ReplyTooLargeError, limited_pull, limiting
from flwr.supercore.inflatable.inflatable_utils import pull_objects


class Store:
    """Objects of one size, and how many were asked for."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.asked = 0

    def pull(self, object_id: str) -> bytes:
        self.asked += 1
        return bytes(self.size)


def names(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def test_what_is_due_is_pulled_by_flower() -> None:
    store = Store(1000)
    with limiting(Limit(size=5000, objects=5)):
        pulled = limited_pull(pull_objects)(names(5), store.pull)
    assert {name: len(content) for name, content in pulled.items()} == dict.fromkeys(names(5), 1000)


def test_too_many_objects_are_refused_before_one_is_pulled() -> None:
    store = Store(1)
    with limiting(Limit(size=10**9, objects=100)), pytest.raises(ReplyTooLargeError, match="101 objects"):
        limited_pull(pull_objects)(names(101), store.pull)
    assert store.asked == 0


def test_pulling_ends_once_there_is_too_much() -> None:
    """Two gigabytes in objects of 5 MiB: a few are loaded, no more than Flower pulls at once."""
    store = Store(5 << 20)
    with limiting(Limit(size=20 << 20, objects=10_000)), pytest.raises(ReplyTooLargeError, match="bytes"):
        limited_pull(pull_objects)(names(400), store.pull)
    assert store.asked < 50


def test_without_a_limit_nothing_is_counted() -> None:
    store = Store(1000)
    assert len(limited_pull(pull_objects)(names(50), store.pull)) == 50


def test_an_answer_to_weights_may_hold_as_much_and_little_more() -> None:
    of_numbers, of_weights = Limit.of(0, 0), Limit.of(64 << 20, 100)
    assert of_numbers.size <= 2 << 20
    assert 64 << 20 < of_weights.size < 80 << 20
    assert of_weights.objects > 100 + 64 // 5


def test_it_is_put_in_the_one_place_that_flower_pulls_from(monkeypatch: pytest.MonkeyPatch) -> None:
    http_grid = import_module("flwr.superlink.grid.http_grid")
    monkeypatch.setattr(http_grid, "pull_objects", pull_objects)
    limits.install()
    installed = http_grid.pull_objects
    assert installed is not pull_objects
    limits.install()
    assert http_grid.pull_objects is installed  # once is enough
