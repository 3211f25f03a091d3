"""What a Ray Serve proxy runs of ours (cluster/http/proxy.py), in Ray Serve's own HTTP server; the
app behind it is a stand-in for the proxy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import pytest
from ray.serve._private.http_util import start_asgi_http_server
from ray.serve.config import HTTPOptions
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS

from cluster.http import proxy as http_proxy
from cluster.http.proxy import BoundedProtocol, middlewares
from cluster.http.timeouts import Timeouts, timeouts
from memshare.config import ConfigError
from tools.bench.local_cluster import free_port

HEAD_S, BODY_S = 0.15, 0.45
PATIENCE_S = 30.0  # a loaded machine is slow, not wrong
POST = b"POST /echo HTTP/1.1\r\nHost: 127.0.0.1\r\n"
HALF_BODY = POST + b"Content-Length: 9\r\n\r\n{"


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the body; ``/refuse`` at once, ``/stream`` slowly."""
    response = PlainTextResponse("refused", 401)
    if scope["path"] == "/stream":
        response = StreamingResponse(words())  # type: ignore[assignment]
    elif scope["path"] != "/refuse":
        response = PlainTextResponse(await Request(scope, receive).body())
    await response(scope, receive, send)


async def words() -> AsyncIterator[str]:
    for _ in range(6):
        await asyncio.sleep(BODY_S / 3)
        yield "word "
    yield "end"


@dataclass
class Proxy:
    """The server."""

    port: int

    async def talk(self, *pieces: bytes, every_s: float = 0.05) -> tuple[bytes, float]:
        """Send pieces, the last again and again; what came until the server closed, and when."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        began = time.monotonic()

        async def write() -> None:
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(every_s)
            while pieces:
                writer.write(pieces[-1])
                await asyncio.sleep(every_s)

        writing = asyncio.create_task(write())
        try:
            async with asyncio.timeout(20):
                return await reader.read(), time.monotonic() - began
        except ConnectionError:  # closed while we wrote
            return b"", time.monotonic() - began
        finally:
            writing.cancel()
            writer.close()


@pytest.fixture
async def proxy(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Proxy]:
    monkeypatch.setattr(http_proxy, "_ANSWER_S", 0.0)
    monkeypatch.setitem(HTTP_PROTOCOLS, "auto", HTTP_PROTOCOLS["auto"])  # to be restored
    monkeypatch.setattr(BoundedProtocol, "timeouts", Timeouts())
    monkeypatch.setenv("PROXY_HEAD_TIMEOUT_S", str(HEAD_S))
    monkeypatch.setenv("PROXY_BODY_TIMEOUT_S", str(BODY_S))
    async with served() as proxy:
        yield proxy


@asynccontextmanager
async def served() -> AsyncIterator[Proxy]:
    options = HTTPOptions(host="127.0.0.1", port=free_port(), keep_alive_timeout_s=1)
    options.middlewares.extend(middlewares())  # as a proxy does it
    loop = asyncio.get_running_loop()
    serving, server = await start_asgi_http_server(app, options, event_loop=loop)
    while not server.started:
        await asyncio.sleep(0.01)
    yield Proxy(options.port)
    server.should_exit = True
    await serving


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [b"POST /echo HT", b""],
        [POST, b"X"],
        [POST + b"Content-Length: 2\r\n\r\n{}", b"", b"", POST, b""],
        [POST + b"Content-Length: 2\r\n\r\n{}", b"\r\n"],
    ],
    ids=["nothing", "half a line", "a header in drops", "second request", "empty lines"],
)
async def test_a_head_that_does_not_end_is_not_waited_for(
    proxy: Proxy, pieces: list[bytes]
) -> None:
    answer, seconds = await proxy.talk(*pieces)
    assert HEAD_S * 0.9 < seconds < PATIENCE_S
    assert b"HTTP/1.1 408" not in answer


@pytest.mark.parametrize("rest", [b"", b" "], ids=["half a body", "a body in drops"])
async def test_a_body_that_does_not_end_is_not_waited_for(proxy: Proxy, rest: bytes) -> None:
    head = POST + b"Content-Length: 999\r\n\r\n{"
    answer, seconds = await proxy.talk(head, rest)
    assert BODY_S * 0.9 < seconds < PATIENCE_S
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\nConnection: close")


async def test_nor_is_one_of_a_request_that_was_refused(proxy: Proxy) -> None:
    head = HALF_BODY.replace(b"/echo", b"/refuse").replace(b": 9", b": 999")
    answer, seconds = await proxy.talk(head, b" ")
    assert BODY_S * 0.9 < seconds < PATIENCE_S
    assert answer.startswith(b"HTTP/1.1 401")
    assert answer.count(b"HTTP/1.1") == 1, "one answer"


async def test_an_answer_may_take_its_time(proxy: Proxy) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{proxy.port}") as client:
        began = time.monotonic()
        assert (await client.get("/stream")).text.endswith("end")
        assert time.monotonic() - began > BODY_S + HEAD_S
        await asyncio.sleep(HEAD_S * 2)  # idle is not late
        assert (await client.post("/echo", content=b"{}")).text == "{}"


@pytest.mark.parametrize("more", [b"\r\n", POST, HALF_BODY])
async def test_an_answer_is_not_cut_for_what_comes_behind_its_request(
    proxy: Proxy, more: bytes
) -> None:
    answer, _ = await proxy.talk(POST.replace(b"POST /echo", b"GET /stream") + b"\r\n" + more, b"")
    assert b"end\r\n0\r\n" in answer


async def test_rays_list_of_applications_is_closed(proxy: Proxy) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{proxy.port}") as client:
        assert (await client.get("/-/routes")).status_code == 404
        assert (await client.get("/-/healthz")).status_code == 200


@pytest.mark.parametrize("name", ["PROXY_HEAD_TIMEOUT_S", "PROXY_BODY_TIMEOUT_S"])
@pytest.mark.parametrize("value", ["", "soon", "0", "-1", "nan", "inf"])
def test_a_wrong_time_is_named_with_its_fix(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} = '{value}' is no positive number\n    fix: "):
        timeouts({name: value})


def test_the_defaults() -> None:
    assert timeouts({}) == (10.0, 60.0)


async def test_a_uvicorn_without_a_place_for_it_serves_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(HTTP_PROTOCOLS, "auto")
    closed: Callable[..., Awaitable[None]] = middlewares()[0].cls  # type: ignore[assignment]
    assert closed is http_proxy.ClosedRoutes
    assert "slow clients are waited for" in caplog.text
