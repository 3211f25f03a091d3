"""HTTP between Ray Serve and vLLM's OpenAI app."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_DISCONNECT: Message = {"type": "http.disconnect"}


class DisconnectOnCancel:
    """ASGI middleware that tells the app of a client that left, the way the app expects it.

    When a client disconnects, Ray Serve cancels the task that runs the app. vLLM reacts to the
    message ``http.disconnect`` only: without it, a non-streamed request would go on to its last
    token for nobody. The app gets the message and a little time to abort; then it is cancelled.
    """

    def __init__(self, app: ASGIApp, grace_s: float = 1.0) -> None:
        """Wrap ``app``; it has ``grace_s`` seconds to end by itself after the message."""
        self._app = app
        self._grace_s = grace_s

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
