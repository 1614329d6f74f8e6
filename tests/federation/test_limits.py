"""What a reply may hold before it is loaded; Flower's own pulling, with objects that are made up."""

import time
from dataclasses import dataclass, field
from importlib import import_module
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
from fedqc_server import limits
from fedqc_server.limits import Limit, ReplyTooLargeError, bound_uploads, discard, limited_pull, limiting
from fedqc_simulations.engine import LocalGrid
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.corestate.sql_corestate import SqlCoreState
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError, pull_objects
from flwr.supercore.run import Run
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.superlink.servicer.fleet import fleet_handlers


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
    with limiting(Limit(size=5000, objects=5), 60):
        pulled = limited_pull(pull_objects)(names(5), store.pull)
    assert {name: len(content) for name, content in pulled.items()} == dict.fromkeys(names(5), 1000)


def test_too_many_objects_are_refused_before_one_is_pulled() -> None:
    store = Store(1)
    with limiting(Limit(size=10**9, objects=100), 60), pytest.raises(ReplyTooLargeError, match="101 objects"):
        limited_pull(pull_objects)(names(101), store.pull)
    assert store.asked == 0


def test_pulling_ends_once_there_is_too_much() -> None:
    """Two gigabytes in objects of 5 MiB: a few are loaded, no more than Flower pulls at once."""
    store = Store(5 << 20)
    with limiting(Limit(size=20 << 20, objects=10_000), 60), pytest.raises(ReplyTooLargeError, match="bytes"):
        limited_pull(pull_objects)(names(400), store.pull)
    assert store.asked < 50


def test_parts_that_never_come_are_waited_for_only_so_long() -> None:
    def missing(object_id: str) -> bytes:
        raise ObjectUnavailableError(object_id)

    begin = time.monotonic()
    with limiting(Limit(size=10, objects=10), 0.2), pytest.raises(ObjectPullError):
        limited_pull(pull_objects)(names(1), missing)
    assert time.monotonic() - begin < 30


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


@dataclass
class FlowersServer:
    """The functions of Flower's server that store, with stubs behind the bound."""

    stored: list[int] = field(default_factory=list)
    pushed: list[Any] = field(default_factory=list)

    def begin(self, session: str, reply_to: str) -> None:
        message = SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id=reply_to, message_id="m"))
        unused: Any = None
        SqlLinkState.store_message_and_object_tree(unused, cast(Any, message), unused, session)

    def store(self, session: str, size: int) -> bool:
        unused: Any = None
        return SqlCoreState.store_object(unused, 1, session, "name", bytes(size))

    def push(self, **changes: Any) -> None:
        known = {"src_node_id": 5, "dst_node_id": 1, "reply_to_message_id": "asked", "message_id": "m"}
        metadata = Metadata(**{**known, **{key: value for key, value in changes.items() if key in known}})
        request = PushMessagesRequest(
            node=Node(node_id=5),
            messages_list=[Message(metadata=metadata)] * changes.get("messages", 1),
            message_object_trees=[ObjectTree(object_id=changes.get("root", "m"))],
        )
        unused: Any = None
        fleet_handlers.push_messages(request=request, state=unused)


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> FlowersServer:
    """With a bound of 1000 bytes a message."""
    server = FlowersServer()

    def store_object(self: Any, run_id: int, session_id: str, object_id: str, content: bytes) -> bool:
        is_known = session_id != "made-up"
        if is_known:
            server.stored.append(len(content))
        return is_known

    # All are put back in the end, whatever the bound makes of them.
    monkeypatch.setattr(SqlLinkState, "store_message_and_object_tree", lambda *_: (True, []))
    monkeypatch.setattr(SqlCoreState, "store_object", store_object)
    monkeypatch.setattr(fleet_handlers, "push_messages", lambda request, state: server.pushed.append(request))
    bound_uploads(1000)
    return server


def test_flowers_server_keeps_only_so_many_bytes_of_a_message(flower: FlowersServer) -> None:
    flower.begin("first", "asked")
    assert flower.store("first", 600)
    assert not flower.store("first", 401)
    assert flower.store("first", 400)
    flower.begin("again", "asked")  # the same answer, tried again
    assert not flower.store("again", 1)
    flower.begin("second", "asked too")
    assert flower.store("second", 1000)
    assert flower.stored == [600, 400, 1000]


def test_what_is_not_stored_does_not_count(flower: FlowersServer) -> None:
    assert not any(flower.store("made-up", 900) for _ in range(3))
    assert not flower.store("", 1)  # nor may a site leave its session out
    assert flower.stored == []


def test_a_site_sends_its_own_replies_and_nothing_else(flower: FlowersServer) -> None:
    flower.push()
    assert len(flower.pushed) == 1
    others: list[dict[str, Any]] = [
        {"src_node_id": 6},
        {"src_node_id": 1},
        {"reply_to_message_id": ""},
        {"root": "another"},
        {"messages": 2},
        {"messages": 0},
    ]
    for changes in others:
        with pytest.raises(ValueError, match="node 5 sends something else than a reply of its own"):
            flower.push(**changes)
    assert len(flower.pushed) == 1


def test_the_disk_takes_more_than_is_loaded() -> None:
    """Or the ServerApp could not say who sent too much."""
    assert Limit(size=5, objects=7).on_disk > 5


def test_what_was_refused_is_dropped_by_flowers_server() -> None:
    grid = HttpGrid("127.0.0.1:1", insecure=True, token="t")  # noqa: S106 - it connects to nobody
    grid.set_run(Run.create_empty(7))
    dropped: list[Any] = []
    client = SimpleNamespace(ConfirmMessageReceived=dropped.append)
    with patch.object(HttpGrid, "_runtime_client", client):
        discard(grid, "0" * 64)
    assert [(one.run_id, one.message_object_id) for one in dropped] == [(7, "0" * 64)]


def test_a_simulation_has_nothing_to_drop() -> None:
    discard(LocalGrid({}), "0" * 64)
