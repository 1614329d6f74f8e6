"""The web application behind the review page; `fedqc.loopback` says who is let in."""

import json
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from fedqc.loopback import LoopbackPage, told
from fedqc.review.worklist import Worklist

STATIC = Path(__file__).parent / "static"
VIEWER = STATIC / "niivue.js"
"""NiiVue, which the build of the wheel puts there."""
_LONGEST_BODY = 10_000


class ReviewApp:
    """The page, the worklist, the volumes, and the decisions.

    Args:
        worklist: what is reviewed.
        port: on which it is served, on 127.0.0.1.
    """

    def __init__(self, worklist: Worklist, port: int) -> None:
        self._worklist = worklist
        files = ("page.html", "page.css", "page.js", "drawing.js", VIEWER.name)
        page = LoopbackPage(port, {name: STATIC / name for name in files})
        self.address = page.address
        """To open once."""
        case = "/api/cases/{number:int}"
        self.app = page.app(
            [
                Route("/api/worklist", page.known(self._overview)),
                Route(case, page.known(self._case)),
                Route(f"{case}/decision", page.known(self._decide), methods=["POST"]),
                Route(f"{case}/volumes/{{name}}", page.known(self._volume)),
            ]
        )

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
            return told(chosen, 400)
        number = request.path_params["number"]
        return JSONResponse(await run_in_threadpool(self._worklist.decide, number, **chosen))


def _file(path: Path | None) -> Response:
    """A volume's file; what is wrong with it is said before anything is sent."""
    if path is None:
        raise HTTPException(404)
    try:
        with path.open("rb"):
            return FileResponse(path, media_type="application/octet-stream")
    except OSError as error:
        return told(f"{path}: {error.strerror or error}", 404)


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
