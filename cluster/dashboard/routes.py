"""The page's part of the HTTP app: ``/memshare/`` and, below it, ``api/``.

The files are the same for everybody. What they show comes from ``api/`` alone, so that is what has
to be guarded where keys are configured: all of it is for operators.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.dashboard.sample_reporter import CountFault

logger = logging.getLogger(__name__)

PREFIX = "/memshare"
_STATIC = Path(__file__).with_name("static")
OPEN_PATHS = frozenset(
    {PREFIX, f"{PREFIX}/", *(f"{PREFIX}/{file.name}" for file in _STATIC.iterdir())}
)
"""The files, which need no key. Everything else below ``PREFIX`` is for operators."""

_TIMEOUT_S = 12.0
_POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"

Handler = Callable[[Request], Awaitable[Response]]


def page_app(
    board: DeploymentHandle[Any], config: dict[str, object], count_fault: CountFault
) -> ASGIApp:
    """The app to be mounted at ``PREFIX``.

    Args:
        board: the :class:`~cluster.dashboard.hub.DashboardHub`.
        config: the application's arguments as they may be shown.
        count_fault: called with ``answer`` when the board fails.
    """

    async def state(request: Request) -> Response:
        try:
            after = int(request.query_params.get("after", "0"))
        except ValueError:
            return _refusal(400, "after is a whole number: the number of the last answer")
        known = request.query_params.get("board", "")
        return JSONResponse(await asyncio.wait_for(board.state.remote(known, after), _TIMEOUT_S))

    async def trace(request: Request) -> Response:
        replica = request.query_params.get("replica", "")
        name = request.query_params.get("request", "")
        found = await asyncio.wait_for(board.trace.remote(replica, name), _TIMEOUT_S)
        if found is None:
            return _refusal(404, "no replica knows this request now")
        return JSONResponse(asdict(found))

    async def let_go_on(request: Request) -> Response:
        replica = request.query_params.get("replica", "")
        if await asyncio.wait_for(board.let_go_on.remote(replica), _TIMEOUT_S):
            return JSONResponse({"replica": replica}, status_code=202)
        return _refusal(404, "replica: no replica of this id has been stopped by its guard")

    async def show_config(request: Request) -> Response:
        return JSONResponse(config)

    def guarded(handler: Handler) -> Handler:
        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except Exception as error:
                count_fault("answer")
                logger.debug("live page: %s: %r", request.url.path, error)  # a page asks often
                return _refusal(503, "the page's board does not answer; serving goes on")

        return answer

    return Starlette(
        routes=[
            Route("/api/state", guarded(state)),
            Route("/api/trace", guarded(trace)),
            Route("/api/config", guarded(show_config)),
            Route("/api/guard", guarded(let_go_on), methods=["POST"]),
            Mount("/", StaticFiles(directory=_STATIC, html=True)),
        ],
        middleware=[Middleware(_Headers)],
    )


def _refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status_code=status)


class _Headers:
    """Nothing from elsewhere, in no frame, and no old version from a browser's cache."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["content-security-policy"] = _POLICY
                headers["x-content-type-options"] = "nosniff"
                headers["cache-control"] = "no-cache"
            await send(message)

        await self._app(scope, receive, send_with_headers)
