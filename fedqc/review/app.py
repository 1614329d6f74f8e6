"""The web application behind the review page. It serves one person on the same machine.

Whoever opens it has to know a token that is used up by that; then a cookie stands for it. Another host name
(a page elsewhere that was made to point here) and requests that come from another page are refused.
"""

import hmac
import json
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from fedqc.errors import FedQCError
from fedqc.review.worklist import Worklist

STATIC = Path(__file__).parent / "static"
VIEWER = STATIC / "niivue.js"
"""NiiVue, which the build of the wheel puts there."""
_FILES = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "niivue.js": "text/javascript",
}
_HEADERS = {
    # NiiVue inflates and reads in WebAssembly and workers that it makes of its own text.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
        "font-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
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
        self._cookie = f"fedqc-review-{port}"  # cookies of all ports of a host are one set
        self._session = secrets.token_urlsafe(32)
        self._token: str | None = secrets.token_urlsafe(32)
        self.address = f"http://127.0.0.1:{port}/?token={self._token}"
        """To open once."""
        self.app = Starlette(
            routes=[
                Route("/", self._guarded(self._page)),
                Route("/static/{name}", self._guarded(self._static)),
                Route("/api/worklist", self._guarded(self._overview)),
                Route("/api/cases/{number:int}", self._guarded(self._case)),
                Route("/api/cases/{number:int}/decision", self._guarded(self._decide), methods=["POST"]),
                Route("/api/cases/{number:int}/volumes/{name}", self._guarded(self._volume)),
            ]
        )

    def _guarded(self, handler: Handler) -> Handler:
        """A handler that is only reached by the person who opened the page."""

        async def guarded(request: Request) -> Response:
            refused = self._refusal(request)
            try:
                response = refused or await handler(request)
            except IndexError:
                response = JSONResponse({"error": "there is no such case"}, status_code=404)
            except (FedQCError, OSError) as error:
                response = JSONResponse({"error": str(error)}, status_code=409)
            response.headers.update(_HEADERS)
            response.headers.setdefault("Cache-Control", "no-store")
            return response

        return guarded

    def _refusal(self, request: Request) -> Response | None:
        if request.headers.get("host") not in self._hosts:
            return PlainTextResponse("this page has another address", status_code=421)
        origin = request.headers.get("origin")
        if origin is not None and origin not in {f"http://{host}" for host in self._hosts}:
            return PlainTextResponse("this page answers no other page", status_code=403)
        if request.headers.get("sec-fetch-site", "none") not in {"none", "same-origin"}:
            return PlainTextResponse("this page answers no other page", status_code=403)
        if self._is_new(request):
            return None
        given = request.cookies.get(self._cookie, "")
        if not hmac.compare_digest(given.encode(), self._session.encode()):
            return PlainTextResponse(
                "open the address that fedqc review printed; it works once, and the next start gives another",
                status_code=403,
            )
        return None

    def _is_new(self, request: Request) -> bool:
        """Whether someone opens the page for the first time, with the token."""
        given = request.query_params.get("token")
        if request.url.path != "/" or given is None or self._token is None:
            return False
        return hmac.compare_digest(given.encode(), self._token.encode())

    async def _page(self, request: Request) -> Response:
        if self._is_new(request):
            self._token = None
            response = RedirectResponse("/", status_code=303)
            response.set_cookie(self._cookie, self._session, httponly=True, samesite="strict")
            return response
        return FileResponse(STATIC / "page.html", media_type="text/html")

    @staticmethod
    async def _static(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _FILES:
            return PlainTextResponse("there is no such file", status_code=404)
        return FileResponse(STATIC / name, media_type=_FILES[name])

    async def _overview(self, request: Request) -> Response:
        del request
        return JSONResponse(await run_in_threadpool(self._worklist.overview))

    async def _case(self, request: Request) -> Response:
        return JSONResponse(self._worklist.case(request.path_params["number"]))

    async def _volume(self, request: Request) -> Response:
        name = request.path_params["name"].removesuffix(".gz").removesuffix(".nii")
        path = self._worklist.volume(request.path_params["number"], name)
        if path is None or not path.is_file():
            return JSONResponse({"error": f"{path or name}: there is no such file"}, status_code=404)
        return FileResponse(path, media_type="application/octet-stream")

    async def _decide(self, request: Request) -> Response:
        if request.headers.get("origin") is None:  # browsers always say where a POST comes from
            return PlainTextResponse("this page answers no other page", status_code=403)
        chosen = await _chosen(request)
        if isinstance(chosen, str):
            return JSONResponse({"error": chosen}, status_code=400)
        number = request.path_params["number"]
        return JSONResponse(
            await run_in_threadpool(self._worklist.decide, number, chosen["decision"], chosen["reason"])
        )


async def _chosen(request: Request) -> dict[str, Any] | str:
    """Decision and reason of a request, or what is wrong with it."""
    body = await request.body()
    if len(body) > _LONGEST_BODY:
        return "the reason is too long"
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or set(values) != {"decision", "reason"}:
        return "a decision and a reason are expected"
    if values["decision"] not in ("keep", "drop", None) or not isinstance(values["reason"], str):
        return "a decision is keep, drop or null, a reason is text"
    return values
