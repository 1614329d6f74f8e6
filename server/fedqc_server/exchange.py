"""One request to many sites, and their replies."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import httpx
from flwr.app import Message
from flwr.serverapp import Grid

from fedqc.errors import ProtocolError
from fedqc.protocol import (
    ErrorReply,
    HandshakeReply,
    ModelRequest,
    Reply,
    Request,
    StatisticsReply,
    TrainReply,
    reply_from_records,
    request_to_records,
)
from fedqc.statistics.allowed import not_allowed
from fedqc.task import Task
from fedqc_server.limits import Limit, ReplyTooLargeError, discard, limiting
from fedqc_server.roster import Clock

# Flower's own codes: a message or its reply outlived its time, or the node went away.
_FLOWER_ERRORS = {3: "late", 4: "late", 5: "unavailable"}
_MARGIN = 10.0  # seconds before the messages expire, or a twentieth of their time
_SHORTEST_UPLOAD = 30.0  # seconds
Answer = TypeVar("Answer", HandshakeReply, StatisticsReply, TrainReply)


@dataclass(frozen=True)
class Exchange:
    """The way to the sites.

    Args:
        grid: Flower's.
        clock: time, for waiting.
        task: by which the names of statistics are known.
    """

    grid: Grid
    clock: Clock
    task: Task

    def ask(
        self, request: Request, targets: Mapping[str, int], kind: type[Answer], deadline: float
    ) -> Iterator[tuple[str, Answer | str]]:
        """Send one request to many sites and hand on their replies one at a time, as they come.

        One of them is in memory. Whoever has not answered shortly before the deadline, when the messages
        expire and Flower drops their replies with them, is late.

        Args:
            request: what every site is asked.
            targets: node id of each site, in the order of the names.
            kind: the reply that answers the request.
            deadline: seconds for all of them together; also the messages' time to live, so that a straggler
                does not work through stale ones.

        Yields:
            Site, and its reply or the code of the reason why there is none.
        """
        if not targets:
            return
        content = request_to_records(request)
        weights = request.weights if isinstance(request, ModelRequest) and kind is TrainReply else {}
        limit = Limit.of(sum(values.nbytes for values in weights.values()), len(weights))
        messages = [
            Message(content, node, request.kind, ttl=deadline, group_id=str(request.round))
            for node in targets.values()
        ]
        # One by one: of many messages, Flower may leave out the rejected ones and tell nobody which.
        ids = [next(iter(self.grid.push_messages([message])), None) for message in messages]
        end = self.clock.now() + deadline - min(_MARGIN, deadline / 20)
        del content, messages
        waiting = dict(zip(targets, ids, strict=True))
        while True:
            for site, message_id in list(waiting.items()):
                # A part of the time for one upload, so that nobody can use up the time of all others.
                patience = max(_SHORTEST_UPLOAD, (end - self.clock.now()) / 4)
                with limiting(limit, patience):
                    reply = self._pull(message_id, request.kind, kind)
                if reply is not None:
                    del waiting[site]
                    yield site, reply
            remaining = end - self.clock.now()
            if not waiting or remaining <= 0:
                break
            self.clock.sleep(min(self.clock.poll, remaining))
        yield from dict.fromkeys(waiting, "late").items()

    def _pull(self, message_id: str | None, message_type: str, kind: type[Answer]) -> Answer | str | None:
        """The reply to one message, or why there is none, or None where there is none yet."""
        if message_id is None:
            return "not-sent"
        try:
            for message in self.grid.pull_messages([message_id]):
                if message.metadata.reply_to_message_id == message_id:
                    return self._read(message, message_type, kind)
        except ReplyTooLargeError as error:
            with contextlib.suppress(Exception):  # what cannot be dropped costs disk, not the run
                discard(self.grid, error.message_id)
            return "reply-too-large"
        except httpx.HTTPError:
            return None  # Flower's server does not answer, which is no site's fault; it may soon again
        except Exception as error:
            # Bytes made to break their reader cost that site, not the run.
            return f"unreadable-reply-{type(error).__name__}"
        return None

    def _read(self, message: Message, message_type: str, kind: type[Answer]) -> Answer | str:
        if message.has_error():
            # Its text was written at the site by code other than ours; only the number is taken over.
            code = message.error.code
            return _FLOWER_ERRORS.get(code, f"flower-error-{code}")
        try:
            reply: Reply = reply_from_records(message.content, message_type)
        except ProtocolError:
            return "bad-reply"
        if isinstance(reply, ErrorReply):
            return str(reply.code)
        if not_allowed(reply, message_type, self.task):
            return "bad-reply"
        return reply if isinstance(reply, kind) else "bad-reply"
