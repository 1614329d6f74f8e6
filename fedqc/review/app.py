"""The web application behind the review page. It serves one person on the same machine.

The page itself holds nothing of the site. Whoever opens it has to know a token, which stands behind the `#`
of the address, where neither logs nor other pages see it. It is used up by exchanging it for a secret that
the page sends with every request, in a header of its own: unlike a cookie it goes to no other port of this
machine. Another host name (a page elsewhere that was made to point here) and other pages are refused.
"""

import hmac
import json
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedqc.errors import FedQCError
from fedqc.review.worklist import Worklist

STATIC = Path(__file__).parent / "static"
VIEWER = STATIC / "niivue.js"
"""NiiVue, which the build of the wheel puts there."""
SECRET = "x-fedqc-review"  # noqa: S105 - the header's name
_FILES = {
    "page.html": "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "niivue.js": "text/javascript",
}
_HEADERS = {
    # NiiVue inflates and reads in WebAssembly and workers that it makes of its own text.
    "content-security-policy": (
        "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
        "font-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_LONGEST_BODY = 10_000
Handler = Callable[[Request], Awaitable[Response]]


class ReviewApp:
    """The page, the worklist, the volumes, and the decisions.

    Args:
        worklist: what is reviewed.
        port: on which it is served, on 127.0.0.1.
    """

    def __init__(self, worklist: Worklist, port: int) -> None:
        self._worklist = worklist
        self._hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        self._secret = secrets.token_urlsafe(32)
        self._token: str | None = secrets.token_urlsafe(32)
        self.address = f"http://127.0.0.1:{port}/#{self._token}"
        """To open once."""
        case = "/api/cases/{number:int}"
        self.app = Starlette(
            routes=[
                Route("/", self._static),
                Route("/static/{name}", self._static),
                Route("/api/enter", self._answering(self._enter), methods=["POST"]),
                Route("/api/worklist", self._known(self._overview)),
                Route(case, self._known(self._case)),
                Route(f"{case}/decision", self._known(self._decide), methods=["POST"]),
                Route(f"{case}/volumes/{{name}}", self._known(self._volume)),
            ],
            middleware=[Middleware(_OwnHeaders)],
        )

    def _known(self, handler: Handler) -> Handler:
        """A handler for the page that was opened with the token."""

        async def known(request: Request) -> Response:
            given = request.headers.get(SECRET, "")
            if not hmac.compare_digest(given.encode(), self._secret.encode()):
                return _told("open the address that fedqc review prints; it works once for each start", 403)
            return await handler(request)

        return self._answering(known)

    def _answering(self, handler: Handler) -> Handler:
        """A handler that answers nobody but a page of this very server, and whose errors are sentences."""

        async def answering(request: Request) -> Response:
            if request.headers.get("host") not in self._hosts:
                return _told("this page has another address", 421)
            origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "same-origin")
            own = {f"http://{host}" for host in self._hosts}
            if (origin is not None and origin not in own) or site != "same-origin":
                return _told("this page answers no other page", 403)
            try:
                return await handler(request)
            except IndexError:
                return _told("there is no such case", 404)
            except (FedQCError, OSError) as error:
                return _told(str(error), 409)

        return answering

    async def _static(self, request: Request) -> Response:
        if request.headers.get("host") not in self._hosts:
            return _told("this page has another address", 421)
        name = request.path_params.get("name", "page.html")
        if name not in _FILES:
            return _told("there is no such file", 404)
        return FileResponse(STATIC / name, media_type=_FILES[name])

    async def _enter(self, request: Request) -> Response:
        """The secret, in exchange for the token."""
        given = (await request.body())[:1000]
        if self._token is None or not hmac.compare_digest(given, self._token.encode()):
            return _told("this address was used already, or is not the one; start fedqc review again", 403)
        self._token = None
        return JSONResponse({"secret": self._secret})

    async def _overview(self, request: Request) -> Response:
        del request
        return JSONResponse(await run_in_threadpool(self._worklist.overview))

    async def _case(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self._worklist.case, request.path_params["number"]))

    async def _volume(self, request: Request) -> Response:
        name = request.path_params["name"].removesuffix(".gz").removesuffix(".nii")
        number = request.path_params["number"]
        return await run_in_threadpool(_file, self._worklist.volume(number, name))

    async def _decide(self, request: Request) -> Response:
        chosen = await _chosen(request)
        if isinstance(chosen, str):
            return _told(chosen, 400)
        number = request.path_params["number"]
        return JSONResponse(await run_in_threadpool(self._worklist.decide, number, **chosen))


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


def _told(sentence: str, status: int) -> JSONResponse:
    return JSONResponse({"error": sentence}, status_code=status)


def _file(path: Path | None) -> Response:
    """A volume's file; what is wrong with it is said before anything is sent."""
    if path is None:
        raise HTTPException(404)
    try:
        with path.open("rb"):
            return FileResponse(path, media_type="application/octet-stream")
    except OSError as error:
        return _told(f"{path}: {error.strerror or error}", 404)


async def _chosen(request: Request) -> dict[str, Any] | str:
    """Decision, reason and what was seen, or what is wrong with the request."""
    body = await request.body()
    if len(body) > _LONGEST_BODY:
        return "the reason is too long"
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or set(values) != {"choice", "reason", "seen"}:
        return "a choice, a reason and what was seen are expected"
    if values["choice"] not in ("keep", "drop", None):
        return "a choice is keep, drop or null"
    if not (isinstance(values["reason"], str) and isinstance(values["seen"], str)):
        return "a reason, and what was seen, are text"
    return values
