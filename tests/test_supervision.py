"""Services are real processes here: small Python programs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedqc.errors import RunError
from fedqc.supervision import (
    FIRST_PAUSE,
    STEADY,
    Service,
    StopRequestedError,
    flower_environment,
    stopping_at_the_end,
)

FOREVER = "import time\nprint('here', flush=True)\nwhile True: time.sleep(0.05)\n"


def wait_for(is_true: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def service(folder: Path, program: str, **settings: object) -> Service:
    command = [sys.executable, "-c", program]
    return Service("helper", command, folder / "helper.log", **settings)  # type: ignore[arg-type]


def test_it_runs_and_is_stopped(tmp_path: Path) -> None:
    helper = service(tmp_path, FOREVER)
    helper.start()
    wait_for(lambda: "here" in helper.last_words())
    pid = helper.pid
    assert pid is not None
    assert helper.is_running
    helper.stop()
    assert not helper.is_running
    assert not runs(pid)
    assert helper.exit_status == -signal.SIGTERM


def test_one_that_does_not_listen_is_killed_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedqc.supervision._GRACE", 0.3)
    stubborn = (
        "import signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\ntime.sleep(60)\n"
    )
    helper = service(tmp_path, stubborn)
    helper.start()
    wait_for(lambda: helper.last_words().strip().isdigit())
    child = int(helper.last_words())
    assert runs(child)
    helper.stop()
    assert helper.exit_status == -signal.SIGKILL
    wait_for(lambda: not runs(child))


def test_it_is_started_again_with_growing_pauses(tmp_path: Path) -> None:
    clock = FakeClock()
    helper = service(tmp_path, "raise SystemExit(7)", clock=clock)
    helper.start()
    pauses = []
    for _ in range(8):
        wait_for(lambda: not helper.is_running)
        assert helper.tend() == 7
        begun, starts = clock.now, helper.starts
        while helper.starts == starts:
            assert helper.tend() is None
            clock.now += 0.25
        pauses.append(round(clock.now - begun))
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    clock.now += STEADY  # this time it held
    wait_for(lambda: not helper.is_running)
    assert helper.tend() == 7
    clock.now += FIRST_PAUSE
    helper.tend()
    assert helper.starts == 10
    helper.stop()


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    helper = Service("gateway", ["/nowhere/nginx"], tmp_path / "log")
    with pytest.raises(RunError, match="gateway: /nowhere/nginx cannot be started"):
        helper.start()
    helper.stop()


def test_its_environment_is_added(tmp_path: Path) -> None:
    helper = service(tmp_path, "import os; print(os.environ['FLWR_HOME'])", environment={"FLWR_HOME": "x"})
    helper.start()
    wait_for(lambda: not helper.is_running)
    assert helper.last_words() == "x"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_them_all(tmp_path: Path, number: signal.Signals) -> None:
    helpers = [service(tmp_path / name, FOREVER) for name in ("a", "b")]
    before = signal.getsignal(number)
    with pytest.raises(StopRequestedError), stopping_at_the_end(helpers):  # noqa: PT012 - the signal's place
        for helper in helpers:
            helper.start()
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert not any(helper.is_running for helper in helpers)
    assert signal.getsignal(number) == before


@pytest.mark.skipif(sys.platform != "linux", reason="the system has to tell a child that its parent died")
def test_none_outlives_a_parent_that_was_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom fedqc.supervision import Service\n"
        f"helper = Service('helper', [sys.executable, '-c', {FOREVER!r}], Path({str(tmp_path / 'log')!r}))\n"
        "helper.start()\nprint(helper.pid, flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert runs(pid)
        parent.kill()
    wait_for(lambda: not runs(pid))


def test_what_a_dead_process_left_behind_is_ended(tmp_path: Path) -> None:
    """As nginx does, whose workers hold on to the address when their master is killed."""
    fork = "import os, time\nif os.fork() == 0:\n    print(os.getpid(), flush=True)\n"
    helper = service(tmp_path, f"{fork}time.sleep(60)\n")
    helper.start()
    wait_for(lambda: helper.last_words().strip().isdecimal())
    left, leader = int(helper.last_words()), helper.pid
    assert leader is not None
    os.kill(leader, signal.SIGKILL)
    wait_for(lambda: not helper.is_running)
    assert runs(left)
    assert helper.tend() == -signal.SIGKILL
    wait_for(lambda: not runs(left))
    helper.stop()


def test_no_proxy_comes_between_processes_of_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    found = flower_environment()
    assert (found["NO_PROXY"], found["no_proxy"]) == ("127.0.0.1", "127.0.0.1")
    assert found["FLWR_TELEMETRY_ENABLED"] == "0"
    monkeypatch.setenv("NO_PROXY", "hospital.example.org")
    assert flower_environment()["no_proxy"] == "hospital.example.org,127.0.0.1"
