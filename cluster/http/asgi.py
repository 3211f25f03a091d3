"""HTTP between Ray Serve and vLLM's OpenAI app."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.dashboard.routes import OPEN_PATHS as PAGE_FILES
from cluster.telemetry.access_log import Line, access_line
from cluster.tenancy.call import CallOutcome, RefusedError
from cluster.tenancy.gate import Gate, key_of

_DISCONNECT: Message = {"type": "http.disconnect"}

# For probes, which learn whether the server takes requests.
PROBE_PATHS = frozenset({"/health", "/ping"})
# For everybody: probes, and the files of the live page, without data.
OPEN_PATHS = PROBE_PATHS | PAGE_FILES
# For every key, and nothing is computed.
FREE_PATHS = frozenset({"/v1/models", "/version"})
# For every key. Whatever is not listed here is for operators, so that a route that another version
# of vLLM adds is closed until somebody has looked at it.
INFERENCE_PATHS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/generative_scoring",
        "/tokenize",
        "/detokenize",
    }
)

# Statuses, and types and codes of OpenAI's error format.
_ANSWERS = {
    "no_key": (401, "invalid_request_error", "invalid_api_key"),
    "unknown_key": (401, "invalid_request_error", "invalid_api_key"),
    "not_local": (401, "invalid_request_error", "invalid_api_key"),
    "not_operator": (403, "permission_error", "insufficient_permissions"),
    "model": (403, "permission_error", "insufficient_permissions"),
    "memshare": (403, "permission_error", "insufficient_permissions"),
    "requests": (429, "requests", "rate_limit_exceeded"),
    "tokens": (429, "tokens", "rate_limit_exceeded"),
    "closed": (503, "ServiceUnavailableError", "shutting_down"),
}


class KeyGate:
    """ASGI middleware: who has no key, or is at a limit, does not reach the app. All are logged.

    Of a WebSocket, which no route of ours uses, the handshake is checked in the same way.
    """

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        """Wrap ``app``."""
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        path = str(scope["path"]).removeprefix(scope.get("root_path", ""))
        method = scope.get("method", "GET")
        with access_line(method, path) as line:
            exchange = _Exchange(receive, send, line)
            await self._serve(path, method, scope, exchange, line)

    async def _serve(
        self, path: str, method: str, scope: Scope, exchange: _Exchange, line: Line
    ) -> None:
        receive, send = exchange.receive, exchange.send
        # A browser asks by OPTIONS, without a key, what it may send.
        is_open = path in OPEN_PATHS or method == "OPTIONS"
        client = scope.get("client")
        try:
            if path in PROBE_PATHS:
                self._gate.require_open()
            if is_open:
                await self._app(scope, receive, send)
                return
            headers = Headers(scope=scope)
            caller = self._gate.identify(
                key_of(headers.get),
                client[0] if client else None,
                *_sites(headers),
                connection=str(client),
            )
            line.tenant = caller.tenant
            if path not in FREE_PATHS and path not in INFERENCE_PATHS:
                self._gate.require_operator(caller, f"{path}, which is no inference route,")
            if method in ("GET", "HEAD"):  # starts nothing: limits are not for it
                await self._app(scope, receive, send)
                return
            async with self._gate.admit(caller) as call:
                await self._app(scope, receive, send)
                call.end(exchange.outcome)
        except RefusedError as refusal:
            await _refuse(refusal, scope, receive, send)


def _sites(headers: Headers) -> list[str]:
    """Hosts of the headers Host and Origin; what can't be read is a host of its own."""
    urls = [f"//{host}" for host in headers.getlist("host")] + headers.getlist("origin")
    return [_host(url) or url for url in urls]


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


class _Exchange:
    """One request and its answer, watched for how it ends."""

    def __init__(self, receive: Receive, send: Send, line: Line) -> None:
        self._receive = receive
        self._send = send
        self._line = line
        self._status = 0
        self._left = False
        self._done = False

    @property
    def outcome(self) -> CallOutcome:
        """To be asked when the app has returned."""
        if self._left or not self._done:
            return "aborted"
        return "failed" if self._status >= 500 else "served"

    async def receive(self) -> Message:
        message = await self._receive()
        # After the answer every client leaves.
        self._left |= message["type"] == "http.disconnect" and not self._done
        self._line.aborted = self._left
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._line.status = str(self._status)
        elif message["type"] == "http.response.body":
            self._done = not message.get("more_body", False)
        await self._send(message)


async def _refuse(refusal: RefusedError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
        return
    await error_response(refusal)(scope, receive, send)


def error_response(refusal: RefusedError) -> Response:
    """A refusal in OpenAI's error format."""
    status, kind, code = _ANSWERS[refusal.why]
    headers: dict[str, str] = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if refusal.retry_after_s is not None:
        headers["Retry-After"] = str(refusal.retry_after_s)
    error = {"message": str(refusal), "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers)


class RetryAfter:
    """ASGI middleware: what is unavailable says when to come again, whichever route it is."""

    def __init__(self, app: ASGIApp, seconds: Callable[[], float]) -> None:
        """Wrap ``app``; ``seconds`` are for answers with status 503 that name none."""
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""

        async def send_amended(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 503:
                seconds = str(math.ceil(self._seconds()))
                MutableHeaders(scope=message).setdefault("Retry-After", seconds)
            await send(message)

        await self._app(scope, receive, send_amended)


class DisconnectOnCancel:
    """ASGI middleware that tells the app of a client that left, the way the app expects it.

    When a client disconnects, Ray Serve cancels the task that runs the app. vLLM reacts to the
    message ``http.disconnect`` only: without it, a non-streamed request would go on to its last
    token for nobody. The app gets the message and a little time to abort; then it is cancelled.
    """

    def __init__(
        self, app: ASGIApp, grace_s: float = 1.0, routes: Sequence[BaseRoute] = ()
    ) -> None:
        """Wrap an app.

        Args:
            app: has ``grace_s`` seconds to end by itself after the message.
            grace_s: seconds.
            routes: of the app inside, by which Ray Serve's proxies log and count requests.
        """
        self._app = app
        self._grace_s = grace_s
        self.routes = list(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection. Other protocols than HTTP pass through untouched."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        left = asyncio.Event()
        request = asyncio.ensure_future(self._app(scope, _until(left, receive), send))
        try:
            await asyncio.shield(request)
        except asyncio.CancelledError:
            left.set()
            try:
                await asyncio.wait({request}, timeout=self._grace_s)
            finally:
                request.cancel()
            raise


def _until(left: asyncio.Event, receive: Receive) -> Receive:
    """``receive`` that answers with a disconnect as soon as ``left`` is set."""

    async def receive_or_disconnect() -> Message:
        if left.is_set():
            return _DISCONNECT
        message = asyncio.ensure_future(receive())
        leaving = asyncio.ensure_future(left.wait())
        try:
            await asyncio.wait({message, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return message.result() if message.done() else _DISCONNECT
        finally:
            message.cancel()
            leaving.cancel()

    return receive_or_disconnect
