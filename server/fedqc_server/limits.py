"""How large a reply may be before it is loaded.

A message travels as a tree of objects of up to 5 MiB, and Flower loads all of them before our code sees one:
a site could fill the coordinator's memory with an answer of many small parts. So the function with which
Flower pulls them is put behind a count, here and nowhere else.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from fedqc.errors import ProtocolError

_OBJECT = 2**22  # bytes; Flower's are 5 MiB, and the last of an array is smaller
_PLENTY_OBJECTS, _PLENTY_BYTES = 256, 2**20  # for records and names, whatever else there is


class ReplyTooLargeError(ProtocolError):
    """A reply holds more than an answer to its request can hold."""


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
        if len(object_ids) > limit.objects:
            raise ReplyTooLargeError(f"a reply of {len(object_ids)} objects, at most {limit.objects} are due")
        lock, total = threading.Lock(), 0

        def pull_and_count(object_id: str) -> bytes:
            nonlocal total
            content = pull_object_fn(object_id)
            with lock:
                total += len(content)
                if total > limit.size:
                    raise ReplyTooLargeError(f"a reply of more than {limit.size} bytes")
            return content

        return pull(object_ids, pull_and_count, **options)

    return pull_objects
