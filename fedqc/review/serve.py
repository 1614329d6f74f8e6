"""Serves the review page on this machine, to whoever has the address."""

import contextlib
from collections.abc import Callable

from fedqc.errors import ConfigError
from fedqc.loopback import Server, listening
from fedqc.review.app import VIEWER, ReviewApp
from fedqc.review.worklist import Worklist


def serve_review(worklist: Worklist, port: int, opened: Callable[[str], None]) -> None:
    """Serve until stopped with Ctrl-C.

    Args:
        worklist: what is reviewed.
        port: on 127.0.0.1; 0: one that is free.
        opened: told the address, which works once, when the page can be opened.

    Raises:
        ConfigError: the port is taken, or this installation has no viewer.
    """
    if not VIEWER.is_file():
        raise ConfigError(
            f"{VIEWER}: there is no viewer in this installation; install Node.js with npm and fedqc "
            "once more (pip install --force-reinstall --no-deps), or its wheel, which has it"
        )
    with listening(port, "--port") as found, contextlib.suppress(KeyboardInterrupt):  # the way to stop it
        review = ReviewApp(worklist, found.getsockname()[1])
        Server(review.app, lambda: opened(review.address)).run([found])
