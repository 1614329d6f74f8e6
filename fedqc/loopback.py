"""Pages for one person on the same machine: who is let in, and how they are served.

A page itself holds nothing that is anybody's business. Whoever opens it has to know a token, which stands
behind the `#` of the address, where neither logs nor other pages see it. It is used up by exchanging it for
a secret that the page sends with every request, in a header of its own: unlike a cookie it goes to no other
port of this machine. Other host names (of a page elsewhere, made to point here) and other pages are refused.
"""

import contextlib
import hmac
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedqc.errors import ConfigError, FedQCError

STATIC = Path(__file__).parent / "static"
"""What all such pages share."""
SECRET = "x-fedqc"  # noqa: S105 - the header's name
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    # NiiVue inflates and reads in WebAssembly and workers that it makes of its own text.
    "content-security-policy": (
        "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
        "font-src 'self' data:; frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    ),
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
Handler = Callable[[Request], Awaitable[Response]]


class LoopbackPage:
    """A page on 127.0.0.1 and what it may ask of its server.

    Args:
        port: on which it is served.
        files: what is open to anybody on this machine, by name; `page.html` is the page.
    """

    def __init__(self, port: int, files: Mapping[str, Path]) -> None:
        self._files = {path.name: path for path in STATIC.iterdir()} | dict(files)
        self._hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        self._secret = secrets.token_urlsafe(32)
        self._token: str | None = secrets.token_urlsafe(32)
        self.address = f"http://127.0.0.1:{port}/#{self._token}"
        """To open once."""

    def app(self, routes: Sequence[Route]) -> Starlette:
        """The application: the page, how to enter, and further routes, whose handlers are `known`."""
        own = [
            Route("/", self._static),
            Route("/static/{name}", self._static),
            Route("/api/enter", self._answering(self._enter), methods=["POST"]),
        ]
        return Starlette(routes=[*own, *routes], middleware=[Middleware(_OwnHeaders)])

    def known(self, handler: Handler) -> Handler:
        """A handler for the page that was opened with the token."""

        async def known(request: Request) -> Response:
            given = request.headers.get(SECRET, "")
            if not hmac.compare_digest(given.encode(), self._secret.encode()):
                return told("open the address that the command printed; it works once for each start", 403)
            return await handler(request)

        return self._answering(known)

    def _answering(self, handler: Handler) -> Handler:
        """A handler that answers nobody but a page of this very server, and whose errors are sentences."""

        async def answering(request: Request) -> Response:
            if request.headers.get("host") not in self._hosts:
                return told("this page has another address", 421)
            origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "same-origin")
            own = {f"http://{host}" for host in self._hosts}
            if (origin is not None and origin not in own) or site != "same-origin":
                return told("this page answers no other page", 403)
            try:
                return await handler(request)
            except IndexError:
                return told("there is no such case", 404)
            except (FedQCError, OSError) as error:
                return told(str(error), 409)

        return answering

    async def _static(self, request: Request) -> Response:
        if request.headers.get("host") not in self._hosts:
            return told("this page has another address", 421)
        path = self._files.get(request.path_params.get("name", "page.html"))
        if path is None:
            return told("there is no such file", 404)
        return FileResponse(path, media_type=_TYPES[path.suffix])

    async def _enter(self, request: Request) -> Response:
        """The secret, in exchange for the token."""
        given = (await request.body())[:1000]
        if self._token is None or not hmac.compare_digest(given, self._token.encode()):
            return told("this address was used already, or is not the one; start the command again", 403)
        self._token = None
        return JSONResponse({"secret": self._secret})


class _OwnHeaders:
    """Adds the headers of all answers, errors of the router included."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message["headers"], *own]
            await send(message)

        await self._app(scope, receive, with_headers)


class Server(uvicorn.Server):
    """Says when it answers."""

    def __init__(self, app: Starlette, started: Callable[[], None]) -> None:
        # Errors are answered to the page; what else goes wrong is worth a line.
        super().__init__(uvicorn.Config(app, log_level="warning", server_header=False, ws="none"))
        self._started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets)
        self._started()


@contextlib.contextmanager
def listening(port: int, option: str) -> Iterator[socket.socket]:
    """A socket on 127.0.0.1.

    Args:
        port: 0: one that is free.
        option: of the command line that names it.

    Raises:
        ConfigError: the port is taken.
    """
    with socket.socket() as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(
                f"{option} {port}: {error.strerror}; name another one, or leave it out"
            ) from None
        yield found


def told(sentence: str, status: int) -> JSONResponse:
    """An answer that is an error, in words."""
    return JSONResponse({"error": sentence}, status_code=status)
