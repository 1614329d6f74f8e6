"""Any part may be killed at any moment of training: the run completes, and no finished round is repeated."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.deployment.consortium import (
    SITES,
    Consortium,
    Program,
    assert_nothing_was_done_twice,
    finished_rounds,
    process_called,
    processes_of,
    running,
    wait_until,
    write_consortium,
)

ROUNDS = 3
LONG_ROUNDS = 8
"""So many that a site which is away for a minute is back before they are over."""
KILLED = "hospital-b"


def start(consortium: Consortium) -> Program:
    """Coordinator and sites, until the first round is over and a random moment has passed."""
    server = consortium.serve()
    for name in SITES:
        consortium.join(name)
    wait_until(lambda: finished_rounds(consortium), say=server.said)
    time.sleep(random.SystemRandom().uniform(0, 8))
    return server


def kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def kill_if_there(pid: int | None) -> bool:
    """Processes for single messages come and go."""
    with contextlib.suppress(ProcessLookupError):
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            return True
    return False


def assert_complete(consortium: Consortium, rounds: int) -> None:
    assert_nothing_was_done_twice(consortium)
    numbers = [number for _, number in finished_rounds(consortium, "qc")]
    assert numbers[-1] == rounds
    # Whoever is killed between checkpoint and event leaves a round that is finished and not in the events.
    assert len(numbers) >= rounds - 1
    assert [one["round"] for one in consortium.record()["rounds"]["qc"]] == list(range(1, rounds + 1))
    assert (consortium.run / "report.html").is_file()


@pytest.mark.parametrize(
    "killed",
    [
        pytest.param("flwr-serverapp", marks=pytest.mark.deploy),
        pytest.param("fedqc_server.limits", marks=pytest.mark.deploy_long),  # SuperLink
        pytest.param("nginx", marks=pytest.mark.deploy_long),
    ],
)
def test_a_part_of_the_coordinator(tmp_path: Path, killed: str) -> None:
    with running(write_consortium(tmp_path, rounds=ROUNDS, local_steps=4)) as consortium:
        server = start(consortium)
        kill(process_called(consortium.folder, killed))
        consortium.finish(server)
        assert_complete(consortium, ROUNDS)


@pytest.mark.deploy
def test_the_whole_coordinator(tmp_path: Path) -> None:
    with running(write_consortium(tmp_path, rounds=ROUNDS, local_steps=4)) as consortium:
        server = start(consortium)
        server.process.kill()
        for pid in processes_of(consortium.run):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.process.wait()
        consortium.finish(consortium.serve())
        assert_complete(consortium, ROUNDS)


@pytest.mark.deploy_long
@pytest.mark.parametrize("killed", ["fedqc_client.supernode", "fedqc_client.bundle"])
def test_a_part_of_a_site(tmp_path: Path, killed: str) -> None:
    """The others go on; the site is back for the phases behind the training."""
    with running(write_consortium(tmp_path, rounds=LONG_ROUNDS, local_steps=4)) as consortium:
        server = start(consortium)
        folder = consortium.site(KILLED).parent
        wait_until(lambda: kill_if_there(process_called(folder, killed)), say=server.said)
        consortium.finish(server)
        assert_complete(consortium, LONG_ROUNDS)


@pytest.mark.deploy_long
def test_a_coordinator_that_was_stopped_goes_on(tmp_path: Path) -> None:
    with running(write_consortium(tmp_path, rounds=ROUNDS)) as consortium:
        server = start(consortium)
        assert server.stop() == 130
        assert not [line for line in processes_of(consortium.run).values() if "client" not in line]
        consortium.finish(consortium.serve())
        assert_complete(consortium, ROUNDS)
