"""What a reply may hold before it is loaded; Flower's own pulling, with objects that are made up."""

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from fedqc_server import limits
from fedqc_server.limits import Limit, ReplyTooLargeError, bound_uploads, discard, limited_pull, limiting
from fedqc_simulations.engine import LocalGrid
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.corestate.sql_corestate import SqlCoreState
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.run import Run
from flwr.superlink.grid.http_grid import HttpGrid


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


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Flower's server with a bound of 3 objects and 1000 bytes a message; what it stored."""
    stored: list[bytes] = []

    def store_object(self: Any, run_id: int, session_id: str, object_id: str, content: bytes) -> bool:
        is_known = session_id != "made-up"
        if is_known:
            stored.append(content)
        return is_known

    # Both are put back in the end, whatever the bound makes of them.
    monkeypatch.setattr(SqlObjectStore, "preregister", SqlObjectStore.preregister)
    monkeypatch.setattr(SqlCoreState, "store_object", store_object)
    bound_uploads(Limit(size=1000, objects=3))
    return stored


def store(session: str, size: int) -> bool:
    unused: Any = None
    return SqlCoreState.store_object(unused, 1, session, "name", bytes(size))


def test_flowers_server_keeps_only_so_many_bytes_of_a_message(bounded: list[bytes]) -> None:
    assert store("first", 600)
    assert not store("first", 401)
    assert store("first", 400)
    assert store("second", 1000)
    assert [len(content) for content in bounded] == [600, 400, 1000]


def test_a_made_up_session_costs_nobody_anything(bounded: list[bytes]) -> None:
    assert not any(store("made-up", 900) for _ in range(3))
    assert bounded == []


@pytest.mark.filterwarnings("ignore:No path_separator:DeprecationWarning")  # of Flower's database
def test_flowers_server_takes_no_message_of_very_many_objects(bounded: list[bytes], tmp_path: Path) -> None:
    objects = SqlObjectStore(str(tmp_path / "state.db"))
    objects.initialize()
    tree = ObjectTree(object_id="0" * 64, children=[ObjectTree(object_id=f"{n:064}") for n in (1, 2)])
    assert len(objects.preregister(1, tree)) == 3
    tree.children.append(ObjectTree(object_id="3" * 64))
    with pytest.raises(ValueError, match="4 objects, at most 3"):
        objects.preregister(1, tree)
    assert len(objects) == 3


def test_a_limit_survives_its_text() -> None:
    assert Limit.from_text(Limit(5, 7).to_text()) == Limit(5, 7)
    assert Limit(5, 7).on_disk() == Limit(10, 14)


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
