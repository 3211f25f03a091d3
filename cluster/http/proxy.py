"""What Ray Serve's HTTP proxies run of ours: time limits for clients, and a route that is closed.

Ray Serve calls :func:`middlewares` in every proxy that starts, if the environment variable
``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` names it. A middleware sees a request when its head
has come, and so can't bound how long that takes. Nor can Ray Serve or uvicorn, its HTTP server:
neither has an option for it. But uvicorn takes the class of a connection by name, from a table; so
the callback puts a class with time limits there, in the process of the proxy alone.
"""

from __future__ import annotations

import asyncio
import logging
import os

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cluster.http.timeouts import Timeouts, timeouts

logger = logging.getLogger(__name__)

_ROUTES = "/-/routes"
# The replica, which has a time limit for bodies too, answers in better words if it is first.
_ANSWER_S = 5.0
_TOO_LATE = (
    b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
)  # fmt: skip


def middlewares() -> list[Middleware]:
    """For ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH``.

    Raises:
        ConfigError: see :func:`cluster.http.timeouts.timeouts`. The proxy does not start.
    """
    BoundedProtocol.timeouts = timeouts(os.environ)
    if "auto" in HTTP_PROTOCOLS:  # what Ray Serve leaves uvicorn to choose
        HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedProtocol.__name__}"
    else:
        logger.warning("this uvicorn has no place for time limits: slow clients are waited for")
    return [Middleware(ClosedRoutes)]


class BoundedProtocol(HttpToolsProtocol):
    """A connection of uvicorn, closed when its client takes too long to send a request.

    How long the answer takes does not matter, nor how long a connection is idle between two
    requests: that is ``http_options.keep_alive_timeout_s``.
    """

    timeouts = Timeouts()
    _deadline: asyncio.TimerHandle | None = None  # of the request that is being received
    _has_head = False  # of that request

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._expect(self.timeouts.head)

    def data_received(self, data: bytes) -> None:
        """Take bytes, of a request's beginning if none is being received."""
        if self._deadline is None:
            self._expect(self.timeouts.head)
        super().data_received(data)

    def on_message_begin(self) -> None:
        """Begin a request, perhaps in the bytes that ended the one before."""
        super().on_message_begin()
        if self._deadline is None:
            self._expect(self.timeouts.head)

    def on_headers_complete(self) -> None:
        """Go on to the body."""
        self._received()
        self._has_head = True
        self._expect(self.timeouts.body + _ANSWER_S)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """End a request."""
        self._received()
        super().on_message_complete()

    def handle_websocket_upgrade(self) -> None:
        """Leave the connection to another protocol."""
        self._received()
        super().handle_websocket_upgrade()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._received()
        super().connection_lost(exc)

    def _expect(self, seconds: float) -> None:
        self._deadline = self.loop.call_later(seconds, self._late, seconds)

    def _received(self) -> None:
        self._has_head = False
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self, seconds: float) -> None:
        """Close, unless it is us who don't read, or the answer to another request would be cut."""
        # None before the first request, whatever uvicorn's type says.
        answering = self.cycle is not None and not self.cycle.response_complete  # type: ignore[redundant-expr]
        another = bool(self.pipeline) or (answering and not self._has_head)
        if self.flow.read_paused or another:
            self._expect(seconds)
            return
        self._deadline = None
        if answering and not self.cycle.response_started:
            self.transport.write(_TOO_LATE)
        self.transport.close()


class ClosedRoutes:
    """ASGI middleware of a proxy: Ray Serve's list of applications, open to everybody, is closed.

    ``/-/healthz``, which tells only that the proxy lives, stays open for probes.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Wrap the proxy's ``app``."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        path = str(scope.get("path", "")).removeprefix(scope.get("root_path", ""))
        if path != _ROUTES:
            await self._app(scope, receive, send)
            return
        error = {
            "message": f"{_ROUTES} is closed; ask Ray with 'serve status'",
            "type": "invalid_request_error",
            "param": None,
            "code": "not_found",
        }
        await JSONResponse({"error": error}, 404)(scope, receive, send)
