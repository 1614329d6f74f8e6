"""Which sites are expected, which are online, and which node of Flower is which site."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from fedqc.config import SitesConfig
from fedqc.errors import QuorumError


@dataclass(frozen=True)
class Node:
    """A node of Flower."""

    id: int
    name: str
    """The name its key was registered under; empty where the coordinator registers no keys."""


@dataclass(frozen=True)
class Clock:
    """The time, as far as waiting needs it."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    poll: float = 1.0
    """Seconds between two looks."""


@dataclass
class Roster:
    """The sites that take part in a run."""

    joined: dict[str, int] = field(default_factory=dict)
    """Node id of each site that passed the handshake."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why a site or node does not take part, by name."""

    def online(self, grid: Grid) -> dict[str, int]:
        """Node id of each joined site that is online now, in the order of the names.

        Looked up anew for every phase: a site that restarts may come back as another node under its name.
        """
        nodes = online_nodes(grid)
        by_name = {node.name: node.id for node in nodes if node.name}
        ids = {node.id for node in nodes}
        found: dict[str, int] = {}
        for name in sorted(self.joined):
            if name in by_name:
                found[name] = by_name[name]
            elif self.joined[name] in ids:
                found[name] = self.joined[name]
        return found


def online_nodes(grid: Grid) -> list[Node]:
    """All nodes that are online, in the order of name and id."""
    nodes = [Node(id=info.node_id, name=info.name) for info in grid.get_nodes()]
    return sorted(nodes, key=lambda node: (node.name, node.id))


def wait_for_nodes(
    grid: Grid, sites: SitesConfig, clock: Clock, tell: Callable[[list[str], list[str], float], None]
) -> list[Node]:
    """Wait until every expected site is online, or any `minimum` nodes where none is named.

    Args:
        grid: Flower's way to the sites.
        sites: who is expected, and for how long.
        clock: time, for waiting.
        tell: is told whenever somebody came or went: who is there, who is missing, and the seconds left.

    Returns:
        The nodes that may be asked who they are: those with an expected name and those without a name.

    Raises:
        QuorumError: fewer than `sites.minimum` when the time is over.
    """
    deadline = clock.now() + sites.wait
    wanted = max(len(sites.expected), sites.minimum)
    before: list[str] | None = None
    while True:
        nodes = [node for node in online_nodes(grid) if not node.name or is_expected(node.name, sites)]
        if len(nodes) >= wanted:
            return nodes
        there = [node.name or f"node {node.id}" for node in nodes]
        remaining = deadline - clock.now()
        if remaining <= 0:
            break
        if there != before:
            before = there
            tell(there, sorted(set(sites.expected) - set(there)), remaining)
        clock.sleep(min(clock.poll, remaining))
    if len(nodes) >= sites.minimum:
        return nodes
    raise QuorumError(
        f"{len(nodes)} of at least {sites.minimum} sites came online within {sites.wait:g} s "
        f"(online: {', '.join(there) or 'none'}; expected: {', '.join(sites.expected) or 'any'}); "
        "start the missing sites or lower sites.minimum"
    )


def is_expected(name: str, sites: SitesConfig) -> bool:
    """Whether a site of this name may take part; an empty list of expected sites lets all in."""
    return not sites.expected or name in sites.expected
