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
"""Environment variable of Flower's server: bytes that it keeps of one message at most."""

_OBJECT = 2**22  # bytes; Flower's are 5 MiB, and the last of an array is smaller
_PLENTY_OBJECTS, _PLENTY_BYTES = 256, 2**20  # for records and names, whatever else there is
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

    @property
    def on_disk(self) -> int:
        """Bytes that Flower's server keeps of such a reply at most.

        That is more than the ServerApp loads, for it is the ServerApp that says which site sent too much.
        """
        return _DISK_SHARE * self.size


# ------------------------------------------------------------------------------------------ the ServerApp

_INSTALLED: list[Callable[..., dict[str, bytes]]] = []
_LIMIT: ContextVar[tuple[Limit, float] | None] = ContextVar("fedqc_reply_limit", default=None)


@contextmanager
def limiting(limit: Limit, patience: float) -> Iterator[None]:
    """Refuse larger replies inside the block, and wait for the parts of one for so many seconds.

    The block's pulls raise `ReplyTooLargeError`, once `install` was called.
    """
    token = _LIMIT.set((limit, patience))
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
        told = _LIMIT.get()  # here, for the objects are pulled in threads
        if told is None:
            return pull(object_ids, pull_object_fn, **options)
        limit, patience = told
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

        return pull(object_ids, pull_and_count, **{**options, "max_time": patience})

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


def bound_uploads(most: int) -> None:
    """Let Flower's server keep no more than so many bytes of one message, and of a site nothing but replies.

    Flower itself lets a site that it knows store messages from and to anybody, and many of them. With this,
    a site has one answer to each request that was sent to it.

    Args:
        most: bytes of all objects of a message; of one that brings more, the rest is not stored.
    """
    core = import_module("flwr.supercore.corestate.sql_corestate").SqlCoreState
    link = import_module("flwr.server.superlink.linkstate.sql_linkstate").SqlLinkState
    fleet = import_module("flwr.superlink.servicer.fleet.fleet_handlers")
    push_messages, store_message, store_object = (
        fleet.push_messages,
        link.store_message_and_object_tree,
        core.store_object,
    )
    lock = threading.Lock()
    answered = dict[str, str]()
    """What each session of uploads answers; one that is tried again is another session."""
    received = dict[str, int]()
    """Bytes of each answer."""

    def push_one_reply(request: Any, state: Any) -> Any:
        messages, trees = request.messages_list, request.message_object_trees
        if (
            len(messages) != 1
            or len(trees) != 1
            or messages[0].metadata.src_node_id != request.node.node_id
            or not messages[0].metadata.reply_to_message_id
            or trees[0].object_id != messages[0].metadata.message_id
        ):
            raise ValueError(f"node {request.node.node_id} sends something else than a reply of its own")
        return push_messages(request=request, state=state)

    def store_and_note(self: Any, message: Any, object_tree: Any, session_id: str) -> tuple[bool, list[str]]:
        with lock:
            answered[session_id] = message.metadata.reply_to_message_id or message.metadata.message_id
        found: tuple[bool, list[str]] = store_message(self, message, object_tree, session_id)
        return found

    def store_little(self: Any, run_id: int, session_id: str, object_id: str, object_content: bytes) -> bool:
        if not session_id:  # Flower would find one; the sites of its versions of today name theirs
            return False
        name, size = answered.get(session_id, session_id), len(object_content)
        with lock:  # not while it is stored: many sites upload at the same time
            if received.get(name, 0) + size > most:
                return False
            received[name] = received.get(name, 0) + size
        stored = bool(store_object(self, run_id, session_id, object_id, object_content))
        if not stored:
            with lock:
                received[name] -= size
        return stored

    vars(fleet).update(push_messages=push_one_reply)
    link.store_message_and_object_tree = store_and_note
    core.store_object = store_little


def main() -> NoReturn:
    """Run Flower's `flower-superlink` behind the count."""
    bound_uploads(int(os.environ[UPLOAD_VARIABLE]))
    import_module("flwr.superlink.cli").flower_superlink()
    raise SystemExit(0)


if __name__ == "__main__":
    main()
