"""Processes that have to run: started, watched, started again when they die, and stopped in the end.

What was started ends with whoever started it, in whatever way that ends: the system tells the processes when
their parent dies (`PR_SET_PDEATHSIG` of Linux), and each leads a process group of its own, so that Ctrl-C at
a terminal reaches only the parent, which then stops them in turn.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from fedqc.errors import RunError

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds before a process that died is started again; each pause is twice the one before."""
STEADY = 60.0
"""A process that ran so many seconds starts with the first pause again."""
_GRACE = 10.0  # seconds for a process to end by itself
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class StopRequestedError(RunError):
    """Somebody asked this process to end: Ctrl-C, or SIGTERM of a service manager."""

    exit_code = 130


@dataclass
class Service:
    """A process that has to run."""

    name: str
    command: Sequence[str]
    log: Path
    """What it prints is added here."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's own."""
    clock: Callable[[], float] = time.monotonic
    starts: int = 0
    """How often it was started."""
    _process: subprocess.Popen[bytes] | None = None
    _started: float = 0.0
    _pause: float = FIRST_PAUSE
    _next: float = 0.0

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._process.pid if self.is_running and self._process is not None else None

    @property
    def is_running(self) -> bool:
        """Whether it runs now."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_status(self) -> int | None:
        """How it ended the last time; a signal is a negative number."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        """Start it now.

        Raises:
            RunError: the program is not there.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(  # noqa: S603 - a list, no shell
                    list(self.command),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **self.environment},
                    start_new_session=True,
                    preexec_fn=_end_with_parent,  # noqa: PLW1509 - it takes no lock and makes no memory
                )
        except OSError as error:
            raise RunError(
                f"{self.name}: {self.command[0]} cannot be started ({error.strerror}); install it, see the "
                "documentation of the command"
            ) from None
        self.starts += 1
        self._started = self.clock()

    def tend(self) -> int | None:
        """Start it again where it died and its pause is over.

        Returns:
            The exit status, once, when it was found dead; else None.
        """
        if self.is_running:
            return None
        status = self.exit_status
        now = self.clock()
        if status is not None and not self._next:
            self._end_group()  # what it left behind would hold its address, or work for nobody
            if now - self._started >= STEADY:
                self._pause = FIRST_PAUSE
            self._next = now + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            return status
        if now >= self._next:
            self._next = 0.0
            self.start()
        return None

    def stop(self) -> None:
        """End it and what it started; it may tidy up first."""
        if self._process is None:
            return
        for number, patience in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, _GRACE)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
                break
        self._end_group()

    def _end_group(self) -> None:
        """End what it started and is still there."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def last_words(self, lines: int = 30) -> str:
        """The end of its log."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 16384))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])


@contextlib.contextmanager
def stopping_at_the_end(services: Sequence[Service]) -> Iterator[None]:
    """Stop all services when the block ends, in whatever way, the last one first.

    SIGTERM ends the block as Ctrl-C does, with `StopRequestedError`.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise StopRequestedError(f"asked to stop ({signal.Signals(number).name})")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C does not leave half of them behind
        for service in reversed(services):
            service.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def flower_environment() -> dict[str, str]:
    """Environment in which Flower asks nothing of the internet, and no proxy comes between its processes."""
    known = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
    value = ",".join(filter(None, [known, "127.0.0.1"]))
    return {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PYTHONUNBUFFERED": "1",
        "NO_PROXY": value,
        "no_proxy": value,
    }


def find_program(name: str) -> str:
    """A program that was installed beside this Python, or else the first on the path."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name) or name


def _end_with_parent() -> None:
    """In the child: SIGTERM for it when its parent dies, even by SIGKILL."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
