"""The ASGI middleware that turns a cancelled request into a disconnect."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest
from starlette.types import Message, Receive, Scope, Send

from cluster.http.asgi import DisconnectOnCancel, RetryAfter

HTTP: Scope = {"type": "http"}
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Client:
    """The server side of a connection whose client sends a body and then waits."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self._messages: list[Message] = [{"type": "http.request", "body": b"hello"}]

    async def receive(self) -> Message:
        if self._messages:
            return self._messages.pop(0)
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def send(self, message: Message) -> None:
        self.sent.append(message)


async def cancelled(app: App, grace_s: float = 1.0, after_s: float = 0.02) -> None:
    """Run ``app`` behind the middleware and cancel it, as Ray Serve does."""
    client = Client()
    request = asyncio.create_task(
        DisconnectOnCancel(app, grace_s)(HTTP, client.receive, client.send)
    )
    await asyncio.sleep(after_s)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request


async def test_a_request_passes_unchanged() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "echo", "body": (await receive())["body"], "scope": scope})

    client = Client()
    await DisconnectOnCancel(app)(HTTP, client.receive, client.send)
    assert client.sent == [{"type": "echo", "body": b"hello", "scope": HTTP}]


async def test_an_error_of_the_app_passes() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("broken")

    client = Client()
    with pytest.raises(RuntimeError, match="broken"):
        await DisconnectOnCancel(app)(HTTP, client.receive, client.send)


async def test_a_waiting_app_hears_of_the_disconnect() -> None:
    heard: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while not heard or heard[-1] != "http.disconnect":
            heard.append((await receive())["type"])
        heard.append((await receive())["type"])

    await cancelled(app)
    assert heard == ["http.request", "http.disconnect", "http.disconnect"]


async def test_an_app_that_listens_in_a_second_task_can_abort_its_work() -> None:
    """The way of vLLM's own ``with_cancellation``."""
    aborted = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def generate() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                aborted.set()
                raise

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        work, listening = asyncio.create_task(generate()), asyncio.create_task(listen())
        await asyncio.wait({work, listening}, return_when=asyncio.FIRST_COMPLETED)
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work

    await cancelled(app)
    assert aborted.is_set()


async def test_an_app_that_does_not_listen_is_cancelled_after_the_grace() -> None:
    ended: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    await cancelled(app, grace_s=0.02)
    await asyncio.sleep(0)
    assert ended == ["cancelled"]


async def test_no_task_is_left_behind() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    before = asyncio.all_tasks()
    await cancelled(app)
    await asyncio.sleep(0.01)
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
async def test_other_protocols_are_left_alone(kind: str) -> None:
    client = Client()
    seen: list[tuple[Scope, Receive, Send]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((scope, receive, send))

    scope = {"type": kind}
    await DisconnectOnCancel(app)(scope, client.receive, client.send)
    assert seen == [(scope, client.receive, client.send)]


@pytest.mark.parametrize(
    ("status", "said", "heard"),
    [(503, None, b"3"), (503, b"9", b"9"), (500, None, None), (200, None, None)],
)
async def test_what_is_unavailable_says_when_to_come_again(
    status: int, said: bytes | None, heard: bytes | None
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [] if said is None else [(b"retry-after", said)]
        await send({"type": "http.response.start", "status": status, "headers": headers})

    client = Client()
    await RetryAfter(app, lambda: 2.5)(HTTP, client.receive, client.send)
    (start,) = client.sent
    assert dict(start["headers"]).get(b"retry-after") == heard
