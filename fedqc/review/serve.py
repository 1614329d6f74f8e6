"""Serves the review page on this machine, to whoever has the address."""

import contextlib
import socket
from collections.abc import Callable

import uvicorn

from fedqc.errors import ConfigError
from fedqc.review.app import VIEWER, ReviewApp
from fedqc.review.worklist import Worklist


class _Server(uvicorn.Server):
    """Says when it answers."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets)
        self._started()


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
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(f"--port {port}: {error.strerror}; name another one, or leave it out") from None
        review = ReviewApp(worklist, listening.getsockname()[1])
        # Errors are answered to the page; what else goes wrong is worth a line here.
        config = uvicorn.Config(review.app, log_level="warning", server_header=False)
        with contextlib.suppress(KeyboardInterrupt):  # the way to stop it
            _Server(config, lambda: opened(review.address)).run([listening])
