"""`fedqc check` on folders that nobody would make on purpose. `make fuzz` goes on for longer."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.fuzz.material import HEALTHY, TASK
from tests.fuzz.promises import IMAGES, LISTS
from tests.fuzz.properties import MEMORY, SECONDS, holds
from tests.fuzz.targets import TARGETS

EXAMPLES = {"headers": 200, "bytes": 200, "trees": 250, "commands": 25}


@pytest.mark.parametrize("layout", sorted(HEALTHY))
def test_what_is_damaged_below_was_right_before(layout: str) -> None:
    found = holds(HEALTHY[layout], TASK)
    assert found is not None
    assert found.checked.layout == layout.replace("tsv", "csv")
    assert [str(problem) for problem in found.problems] == []
    assert len(found.checked.usable) == 2


@pytest.mark.parametrize(("name", "target"), TARGETS.items())
def test_every_promise_is_kept(name: str, target: Callable[[], None]) -> None:
    settings(
        max_examples=EXAMPLES[name],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )(target)()


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """Figures of a process of its own, for this one holds what other tests left in it."""
    finished = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.promises"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    figures: dict[str, Any] = json.loads(finished.stdout)
    return figures


@pytest.mark.parametrize("name", [*IMAGES, *LISTS])
def test_more_than_memory_holds_or_time_allows(measured: dict[str, Any], name: str) -> None:
    expected = IMAGES[name][0] if name in IMAGES else None
    found = measured[name]["codes"]
    assert (None if found is None else frozenset(found)) == expected
    assert measured[name]["seconds"] < SECONDS
    assert measured[name]["memory"] < MEMORY
