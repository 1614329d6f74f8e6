from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from fedqc_server.roster import Node, Roster, wait_for_nodes
from fedqc_simulations.engine import LocalGrid
from flwr.proto.node_pb2 import NodeInfo

from fedqc.config import SitesConfig
from fedqc.errors import QuorumError


class ArrivingGrid(LocalGrid):
    """Nodes that come online one after another, one each time someone looks."""

    def __init__(self, arriving: list[NodeInfo]) -> None:
        super().__init__({"x": Path("x")})
        self.arriving = arriving
        self.looks = 0

    def get_nodes(self) -> Iterable[NodeInfo]:
        self.looks += 1
        return self.arriving[: self.looks]


class Heard(list[tuple[list[str], list[str], float]]):
    """What is said while somebody waits."""

    def __call__(self, there: list[str], missing: list[str], seconds: float) -> None:
        self.append((there, missing, seconds))


def node(number: int, name: str = "") -> NodeInfo:
    return NodeInfo(node_id=number, name=name)


def test_waits_for_every_expected_site(fake_time: Any) -> None:
    grid = ArrivingGrid([node(7, "b"), node(8, "stranger"), node(9, "a")])
    sites = SitesConfig(expected=("a", "b"), minimum=1, wait=10)
    assert wait_for_nodes(grid, sites, fake_time.clock, Heard()) == [Node(9, "a"), Node(7, "b")]
    assert fake_time.now == 2.0


def test_goes_on_with_the_minimum_when_the_time_is_over(fake_time: Any) -> None:
    grid = ArrivingGrid([node(7, "b")])
    sites = SitesConfig(expected=("a", "b"), minimum=1, wait=2.5)
    assert wait_for_nodes(grid, sites, fake_time.clock, Heard()) == [Node(7, "b")]
    assert fake_time.now == 2.5


def test_who_is_missing_is_said_whenever_that_changes(fake_time: Any) -> None:
    grid = ArrivingGrid([node(8, "stranger"), node(7, "b")])
    heard = Heard()
    sites = SitesConfig(expected=("a", "b"), minimum=1, wait=10)
    wait_for_nodes(grid, sites, fake_time.clock, heard)
    assert heard == [([], ["a", "b"], 10), (["b"], ["a"], 9)]


def test_too_few_sites_end_the_wait_with_a_sentence(fake_time: Any) -> None:
    grid = ArrivingGrid([node(7, "b"), node(8, "stranger")])
    sites = SitesConfig(expected=("a", "b"), minimum=2, wait=30)
    with pytest.raises(QuorumError, match=r"1 of at least 2 sites .* 30 s \(online: b; expected: a, b\)"):
        wait_for_nodes(grid, sites, fake_time.clock, Heard())
    assert fake_time.now == 30


def test_without_expected_names_the_minimum_is_enough(fake_time: Any) -> None:
    grid = ArrivingGrid([node(3), node(4), node(5)])
    sites = SitesConfig(minimum=2, wait=30)
    assert wait_for_nodes(grid, sites, fake_time.clock, Heard()) == [Node(3, ""), Node(4, "")]


def test_a_site_that_restarted_is_found_under_its_name() -> None:
    roster = Roster(joined={"b": 1, "a": 2, "gone": 3, "unnamed": 4})
    grid = ArrivingGrid([node(11, "b"), node(2, "a"), node(4), node(12, "late")])
    grid.looks = 4
    found = roster.online(grid)
    assert found == {"a": 2, "b": 11, "unnamed": 4}
    assert list(found) == ["a", "b", "unnamed"]
