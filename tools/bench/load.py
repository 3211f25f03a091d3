"""Streams for a server under test: so many at once, each with its times and how it ended."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp

from memshare.client import AsyncClient, CallError, OverloadedError, Sampling

Ending = Literal["whole", "refused", "failed"]
Body = dict[str, Any]

_REFUSALS = (429, 503)  # back-pressure: the client is told to come back
_WAIT_S = 1.0  # before the next try, where the server does not say how long


@dataclass(slots=True)
class StreamOutcome:
    """What became of one request.

    Attributes:
        index: number of the request.
        sent: when it was sent, by ``time.monotonic``.
        ended: when its last byte came, or it failed.
        ending: ``whole``; ``refused``, the server was full and said so; or ``failed``.
        first_token: when its first token came.
        chunks: pieces of text that came.
        text: all of them.
        detail: what the client saw of a failure.
    """

    index: int
    sent: float
    ended: float = 0.0
    ending: Ending = "failed"
    first_token: float | None = None
    chunks: int = 0
    text: str = ""
    detail: str = ""

    @property
    def seconds_to_first_token(self) -> float:
        """Seconds from the request to its first token. Only of whole answers."""
        assert self.first_token is not None
        return self.first_token - self.sent


Send = Callable[[int], Awaitable[StreamOutcome]]
"""Sends the request of a number and reads its stream to the end; never raises for a failure."""


@asynccontextmanager
async def http_streams(url: str, body: Callable[[int], Body]) -> AsyncIterator[Send]:
    """Streamed completions or chats by OpenAI's HTTP.

    Args:
        url: of the route.
        body: makes the request of a number.
    """
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=300)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        yield lambda index: _http(session, url, body(index), index)


@asynccontextmanager
async def grpc_streams(
    address: str, prompt: Callable[[int], str], tokens: int
) -> AsyncIterator[Send]:
    """Streamed completions of ``tokens`` tokens by gRPC."""
    async with AsyncClient(address, retries=0) as client:
        yield lambda index: _grpc(client, prompt(index), tokens, index)


async def _grpc(client: AsyncClient, prompt: str, tokens: int, index: int) -> StreamOutcome:
    outcome = StreamOutcome(index, time.monotonic())
    sampling = Sampling(max_tokens=tokens, ignore_eos=True)
    pieces = []
    try:
        async for chunk in client.generate_stream(prompt, sampling, timeout=300):
            if chunk.text:
                outcome.first_token = outcome.first_token or time.monotonic()
                outcome.chunks += 1
                pieces.append(chunk.text)
            if chunk.HasField("finish"):
                outcome.ending = "whole"
    except OverloadedError as error:
        outcome.ending, outcome.detail = "refused", str(error)[:200]
        await asyncio.sleep(_WAIT_S)
    except CallError as error:
        outcome.ending, outcome.detail = "failed", str(error)[:200]
    outcome.text = "".join(pieces)
    outcome.ended = time.monotonic()
    return outcome


async def _http(session: aiohttp.ClientSession, url: str, body: Body, index: int) -> StreamOutcome:
    outcome = StreamOutcome(index, time.monotonic())
    try:
        async with session.post(url, json={**body, "stream": True}) as answer:
            if answer.status in _REFUSALS:
                outcome.ending, outcome.detail = "refused", f"HTTP {answer.status}"
                await asyncio.sleep(float(answer.headers.get("Retry-After", _WAIT_S)))
            elif answer.status != 200:
                outcome.detail = f"HTTP {answer.status}: {(await answer.text())[:200]}"
            else:
                await _read(answer, outcome)
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        outcome.detail = f"{type(error).__name__}: {error}"[:200]
    outcome.ended = time.monotonic()
    return outcome


async def _read(answer: aiohttp.ClientResponse, outcome: StreamOutcome) -> None:
    """Read server-sent events. Whole is only what names a reason for its end."""
    pieces = []
    async for line in answer.content:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            outcome.detail = f"error event: {event['error'].get('message', '')[:200]}"
            return
        for choice in event.get("choices", ()):
            piece = choice.get("text") or (choice.get("delta") or {}).get("content")
            if piece:
                outcome.first_token = outcome.first_token or time.monotonic()
                outcome.chunks += 1
                pieces.append(piece)
            if choice.get("finish_reason"):
                outcome.ending = "whole"
    outcome.text = "".join(pieces)
    if outcome.ending != "whole":
        outcome.detail = "the stream ended without a reason"


@dataclass
class StreamLoad:
    """Streams that run until they are told to stop, a fixed number at once.

    Attributes:
        senders: opens what sends requests.
        at_once: streams.
        outcomes: of all that ended.
        paused: while set, no new request is sent.
    """

    senders: Callable[[], AbstractAsyncContextManager[Send]]
    at_once: int

    def __post_init__(self) -> None:
        self.outcomes: list[StreamOutcome] = []
        self.paused = False
        self._next = 0
        self._stopping = False
        self._running = 0

    async def run(self, requests: int | None = None) -> None:
        """Run until :meth:`stop`, or until so many requests were sent."""
        async with self.senders() as send:
            await asyncio.gather(*(self._one_by_one(send, requests) for _ in range(self.at_once)))

    def stop(self) -> None:
        """Send no more; what runs may end."""
        self._stopping = True

    async def quiet(self) -> None:
        """Pause, and return when nothing runs."""
        self.paused = True
        while self._running:
            await asyncio.sleep(0.05)

    async def _one_by_one(self, send: Send, requests: int | None) -> None:
        while not self._stopping and (requests is None or self._next < requests):
            if self.paused:
                await asyncio.sleep(0.05)
                continue
            index = self._next
            self._next += 1
            self._running += 1
            try:
                outcome = await send(index)
            finally:
                self._running -= 1
            self.outcomes.append(outcome)
            if outcome.ending == "failed":
                await asyncio.sleep(_WAIT_S)  # as a client that tries again would


@dataclass(frozen=True, slots=True)
class Summary:
    """Of many outcomes; times in seconds, of whole answers.

    Attributes:
        endings: how many ended how.
        requests_per_s: whole answers a second, from the first request to the last end.
        first_token_p50: median time to the first token.
        first_token_p99: its 99th percentile.
        between_tokens_p50: median over requests of the mean time between tokens.
    """

    endings: dict[str, int]
    requests_per_s: float
    first_token_p50: float
    first_token_p99: float
    between_tokens_p50: float


def summarize(outcomes: Sequence[StreamOutcome]) -> Summary:
    """Sum up; zeros where nothing ended whole."""
    endings = dict(Counter(outcome.ending for outcome in outcomes))
    whole = [o for o in outcomes if o.ending == "whole" and o.first_token is not None]
    if not whole:
        return Summary(endings, 0.0, 0.0, 0.0, 0.0)
    first = sorted(outcome.seconds_to_first_token for outcome in whole)
    between = [
        (o.ended - o.first_token) / (o.chunks - 1)
        for o in whole
        if o.first_token is not None and o.chunks > 1
    ]
    seconds = max(o.ended for o in outcomes) - min(o.sent for o in outcomes)
    return Summary(
        endings,
        len(whole) / seconds,
        statistics.median(first),
        first[min(len(first) - 1, int(0.99 * len(first)))],
        statistics.median(between) if between else 0.0,
    )
