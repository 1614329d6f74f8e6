"""A federation in one process: the real ServerApp and the real ClientApp, without a network between them.

With `ray_engine`, the one file of the simulations that touches names inside Flower.
"""

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fedqc_client.app import app as client_app
from fedqc_server.app import app as server_app
from fedqc_server.run_folder import Listener, listening
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

_SERVER_NODE, _FIRST_SITE = 1, 2


class LocalGrid(Grid):
    """Carries messages to the sites by calling the ClientApp.

    A message is worked on when its reply is asked for, so one site computes at a time and one reply is in
    memory. The time to live of a message bounds the site's own work, as it would where all sites work at
    once: a reply that took longer never arrives.
    """

    def __init__(self, sites: Mapping[str, Path], client: ClientApp = client_app) -> None:
        """Set up the sites.

        Args:
            sites: `site.toml` of each site, by name.
            client: answers for all of them.
        """
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, _SERVER_NODE, 1
        self._client = client
        self._run = Run.create_empty(1)
        self._waiting: dict[str, Message] = {}
        self._names = dict(enumerate(sorted(sites), start=_FIRST_SITE))
        self._contexts = {
            number: Context(
                run_id=1,
                node_id=number,
                node_config={"site": str(sites[name])},
                state=RecordDict(),
                run_config={},
            )
            for number, name in self._names.items()
        }

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message (Flower's older way)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the sites' nodes."""
        return list(self._names)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The sites' nodes with their names."""
        return [NodeInfo(node_id=number, name=name) for number, name in self._names.items()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages in; nothing is worked on yet."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            ids.append(message.metadata.message_id)
            self._waiting[message.metadata.message_id] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Have the sites work on their messages and return the replies that came in time."""
        replies = []
        for message_id in message_ids:
            message = self._waiting.pop(message_id, None)
            if message is None:
                continue
            begin = time.monotonic()
            reply = self._work(message)
            if time.monotonic() - begin <= message.metadata.ttl:
                replies.append(reply)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and pull their replies."""
        return self.pull_messages(self.push_messages(messages))

    def _work(self, message: Message) -> Message:
        try:
            return self._client(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:
            # As Flower's own runtime does.
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, repr(error)), reply_to=message)


def run_config(
    federation: Path, out: Path, *, seed: int, resume: bool, phases: Sequence[str]
) -> dict[str, bool | float | int | str]:
    """What the ServerApp is told; see `fedqc_server.app`."""
    return {
        "federation": str(federation),
        "out": str(out),
        "seed": seed,
        "resume": resume,
        "phases": ",".join(phases),
    }


def run_local(
    federation: Path,
    sites: Mapping[str, Path],
    out: Path,
    *,
    seed: int,
    resume: bool = False,
    phases: Sequence[str] = (),
    listener: Listener | None = None,
) -> None:
    """Run a whole federation in this process.

    Args:
        federation: the `federation.toml`.
        sites: `site.toml` of each site, by name.
        out: the run's folder.
        seed: seed of the run.
        resume: go on with the run that the folder may hold.
        phases: the phases wanted; all of them where none is named.
        listener: is told every event, see `fedqc_server.run_folder`.

    Raises:
        FedQCError: whatever ends the run.
    """
    lead(LocalGrid(sites), run_config(federation, out, seed=seed, resume=resume, phases=phases), listener)


def lead(grid: Grid, config: dict[str, bool | float | int | str], listener: Listener | None = None) -> None:
    """Have the real ServerApp lead one run in this process.

    Args:
        grid: the way to the sites.
        config: see `run_config`.
        listener: is told every event.

    Raises:
        FedQCError: whatever ends the run.
    """
    context = Context(run_id=1, node_id=_SERVER_NODE, node_config={}, state=RecordDict(), run_config=config)
    with listening(listener):
        server_app(grid, context)
