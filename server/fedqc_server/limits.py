"""How much a site may send, before any of it is read.

A message travels as a tree of objects of up to 5 MiB. Flower's server puts on disk whatever objects a site
announces, and the ServerApp loads all of a message before our code sees one: a site could fill the
coordinator's disk and memory with an answer of many small parts. So the functions that store and load them
are put behind a count, here and nowhere else: `bound_uploads` in Flower's server, `install` in the ServerApp.

`python -m fedqc_server.limits` is `flower-superlink` behind the first.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

from flwr.serverapp import Grid

from fedqc.errors import ProtocolError

UPLOAD_VARIABLE = "FEDQC_UPLOAD_LIMIT"
"""Environment variable of Flower's server: bytes and objects of the largest answer, with a space between."""

_OBJECT = 2**22  # bytes; Flower's are 5 MiB, and the last of an array is smaller
_PLENTY_OBJECTS, _PLENTY_BYTES = 256, 2**20  # for records and names, whatever else there is
# The disk takes more than the ServerApp loads, for it is the ServerApp that says which site sent too much.
_DISK_SHARE = 2


class ReplyTooLargeError(ProtocolError):
    """A reply holds more than an answer to its request can hold."""

    def __init__(self, found: str, message_id: str) -> None:
        super().__init__(f"a reply of {found}")
        self.message_id = message_id


@dataclass(frozen=True)
class Limit:
    """The most that a reply may hold."""

    size: int
    """Bytes of all objects."""
    objects: int

    @classmethod
    def of(cls, weights_bytes: int, n_arrays: int) -> "Limit":
        """For an answer with as many weights as were sent (none: 0), and with numbers about them."""
        objects = _PLENTY_OBJECTS + 4 * n_arrays + 2 * weights_bytes // _OBJECT
        return cls(_PLENTY_BYTES + weights_bytes + weights_bytes // 8, objects)

    def on_disk(self) -> "Limit":
        """What Flower's server may keep of one message."""
        return Limit(_DISK_SHARE * self.size, _DISK_SHARE * self.objects)

    def to_text(self) -> str:
        """For `UPLOAD_VARIABLE`."""
        return f"{self.size} {self.objects}"

    @classmethod
    def from_text(cls, text: str) -> "Limit":
        """The other way.

        Raises:
            ValueError: that is no limit.
        """
        size, objects = map(int, text.split())
        return cls(size, objects)


# ------------------------------------------------------------------------------------------ the ServerApp

_INSTALLED: list[Callable[..., dict[str, bytes]]] = []
_LIMIT: ContextVar[Limit | None] = ContextVar("fedqc_reply_limit", default=None)


@contextmanager
def limiting(limit: Limit) -> Iterator[None]:
    """Refuse larger replies inside the block.

    The block's pulls raise `ReplyTooLargeError`, once `install` was called.
    """
    token = _LIMIT.set(limit)
    try:
        yield
    finally:
        _LIMIT.reset(token)


def install() -> None:
    """Put the function with which Flower pulls a reply's objects behind the count."""
    grid = import_module("flwr.superlink.grid.http_grid")
    if grid.pull_objects not in _INSTALLED:
        _INSTALLED.append(limited_pull(grid.pull_objects))
        vars(grid).update(pull_objects=_INSTALLED[-1])


def limited_pull(pull: Callable[..., dict[str, bytes]]) -> Callable[..., dict[str, bytes]]:
    """Flower's `pull_objects` behind the count of the block it is called in."""

    def pull_objects(
        object_ids: list[str], pull_object_fn: Callable[[str], bytes], **options: Any
    ) -> dict[str, bytes]:
        limit = _LIMIT.get()  # here, for the objects are pulled in threads
        if limit is None:
            return pull(object_ids, pull_object_fn, **options)
        message_id = object_ids[-1]  # the tree's root comes last
        if len(object_ids) > limit.objects:
            raise ReplyTooLargeError(
                f"{len(object_ids)} objects, at most {limit.objects} are due", message_id
            )
        lock, total = threading.Lock(), 0

        def pull_and_count(object_id: str) -> bytes:
            nonlocal total
            content = pull_object_fn(object_id)
            with lock:
                total += len(content)
                if total > limit.size:
                    raise ReplyTooLargeError(f"more than {limit.size} bytes", message_id)
            return content

        return pull(object_ids, pull_and_count, **options)

    return pull_objects


def discard(grid: Grid, message_id: str) -> None:
    """Have Flower's server drop a message that was refused, and take no more of it."""
    client = getattr(grid, "_runtime_client", None)
    if client is None:  # in a simulation nothing lies anywhere
        return
    received = import_module("flwr.proto.message_pb2").ConfirmMessageReceivedRequest
    client.ConfirmMessageReceived(
        received(node=vars(grid)["node"], run_id=grid.run.run_id, message_object_id=message_id)
    )


# ---------------------------------------------------------------------------------------- Flower's server


def bound_uploads(limit: Limit) -> None:
    """Let Flower's server keep no more than `limit` of one message.

    A message that announces more objects is not taken at all; of one that brings more bytes, the rest is
    not.
    """
    objects = import_module("flwr.supercore.object_store.sql_object_store").SqlObjectStore
    state = import_module("flwr.supercore.corestate.sql_corestate").SqlCoreState
    iterate = import_module("flwr.supercore.inflatable.inflatable_object").iterate_object_tree
    preregister, store_object = objects.preregister, state.store_object
    lock, received = threading.Lock(), dict[str, int]()

    def preregister_few(self: Any, run_id: int, object_tree: Any) -> list[str]:
        count = sum(1 for _ in iterate(object_tree))
        if count > limit.objects:
            raise ValueError(f"a message of {count} objects, at most {limit.objects} are taken")
        announced: list[str] = preregister(self, run_id, object_tree)
        return announced

    def store_little(self: Any, run_id: int, session_id: str, object_id: str, object_content: bytes) -> bool:
        # A session is one message. Flower refuses a name that it has not given; without one (from older
        # sites) it finds the session itself, and there is one count for all of them.
        with lock:
            if received.get(session_id, 0) + len(object_content) > limit.size:
                return False
            stored = bool(store_object(self, run_id, session_id, object_id, object_content))
            if stored:
                received[session_id] = received.get(session_id, 0) + len(object_content)
            return stored

    objects.preregister, state.store_object = preregister_few, store_little


def main() -> NoReturn:
    """Run Flower's `flower-superlink` behind the count."""
    bound_uploads(Limit.from_text(os.environ[UPLOAD_VARIABLE]))
    import_module("flwr.superlink.cli").flower_superlink()
    raise SystemExit(0)


if __name__ == "__main__":
    main()
