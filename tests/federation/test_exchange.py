"""How one request goes to many sites and their replies come back, on a clock of the test's own."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fedqc_server.exchange import Exchange
from fedqc_server.limits import ReplyTooLargeError
from fedqc_simulations.engine import LocalGrid
from flwr.app import Message

from fedqc.protocol import HandshakeReply, HandshakeRequest, reply_to_records
from fedqc.task import load_task

REQUEST = HandshakeRequest(federation="test", task="x", seed=0, min_count=1)
DEADLINE = 100.0


class Arriving(LocalGrid):
    """Replies that are there from a certain time on, and gone when their message has expired."""

    def __init__(self, clock: Any, arrival: dict[str, float]) -> None:
        super().__init__({name: Path(name) for name in arrival})
        self.clock = clock
        self.arrival = arrival
        self.pushed = 0.0
        self.trouble: dict[int, Exception] = {}
        """What a pull raises, by its number."""
        self.pulls = 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.pushed = self.clock.now()
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.pulls += 1
        if self.pulls in self.trouble:
            raise self.trouble[self.pulls]
        (message_id,) = message_ids
        message = self._waiting.get(message_id)
        if message is None:
            return []
        site, waited = self._names[message.metadata.dst_node_id], self.clock.now() - self.pushed
        if waited < self.arrival[site] or waited >= message.metadata.ttl:
            return []
        del self._waiting[message_id]
        reply = HandshakeReply(site=site, protocol=1, fedqc="1", task="0" * 64)
        answer = Message(reply_to_records(reply), reply_to=message)
        return [answer]


def ask(fake_time: Any, grid: Arriving) -> list[tuple[str, str | None, float]]:
    """Each site in the order of its reply, the reason why it has none, and when that was known."""
    exchange = Exchange(grid, fake_time.clock, load_task("phantom"))
    targets = {name: number for number, name in grid._names.items()}
    found = exchange.ask(REQUEST, targets, HandshakeReply, DEADLINE)
    return [(site, reply if isinstance(reply, str) else None, fake_time.now) for site, reply in found]


def test_replies_are_handed_on_as_they_come(fake_time: Any) -> None:
    grid = Arriving(fake_time.clock, {"a": 50, "b": 10, "c": 0})
    assert ask(fake_time, grid) == [("c", None, 0), ("b", None, 10), ("a", None, 50)]


def test_a_silent_site_makes_nobody_else_late(fake_time: Any) -> None:
    """The others' replies would be gone by the deadline, with the messages that they answer."""
    grid = Arriving(fake_time.clock, {"a": 1e9, "b": 20, "c": 90})
    found = ask(fake_time, grid)
    assert [(site, reason) for site, reason, _ in found] == [("b", None), ("c", None), ("a", "late")]
    assert found[-1][2] <= DEADLINE


def test_trouble_of_the_server_is_no_sites_fault(fake_time: Any) -> None:
    grid = Arriving(fake_time.clock, {"a": 0, "b": 0})
    grid.trouble = {1: httpx.ConnectError("gone"), 2: httpx.ReadTimeout("slow")}
    assert [(site, reason) for site, reason, _ in ask(fake_time, grid)] == [("a", None), ("b", None)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ReplyTooLargeError("much", "m"), "reply-too-large"),
        (ValueError("made to break"), "unreadable-reply-ValueError"),
    ],
)
def test_what_a_site_breaks_costs_that_site(fake_time: Any, error: Exception, reason: str) -> None:
    grid = Arriving(fake_time.clock, {"a": 0, "b": 0})
    grid.trouble = {1: error}
    assert [(site, why) for site, why, _ in ask(fake_time, grid)] == [("a", reason), ("b", None)]


def test_a_run_that_was_ended_is_ended(fake_time: Any) -> None:
    """Flower says so with an exception that is none of the others."""
    grid = Arriving(fake_time.clock, {"a": 0})
    grid.trouble = {1: KeyboardInterrupt()}  # type: ignore[dict-item]
    with pytest.raises(KeyboardInterrupt):
        ask(fake_time, grid)
