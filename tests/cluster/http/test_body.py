"""Bodies that are refused before vLLM's app sees them (cluster/http/body.py)."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from cluster.http.body import BodyError, StrictBody, require_strict


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    await Response(await Request(scope, receive).body())(scope, receive, send)


def client(max_bytes: int = 100, timeout_s: float = 60.0) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=StrictBody(echo, max_bytes, timeout_s))
    return httpx.AsyncClient(transport=transport, base_url="http://server")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


def is_strict(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return not any(0xD800 <= ord(c) <= 0xDFFF for c in value)
    if isinstance(value, dict):
        return all(map(is_strict, [*value, *value.values()]))
    return all(map(is_strict, value)) if isinstance(value, list) else True


@given(
    JSON | st.builds(lambda t, n: [t, n], st.text(st.characters(categories=["Cs", "L"])), JSON),
    st.booleans(),
)
def test_what_json_has_passes_and_nothing_else(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    try:
        body = text.encode()
    except UnicodeEncodeError:
        body = json.dumps(value).encode()
    if is_strict(value):
        require_strict(body)
    else:
        with pytest.raises(BodyError):
            require_strict(body)


@given(st.binary(max_size=60))
def test_bytes_that_are_no_json_are_left_to_the_app(body: bytes) -> None:
    try:
        json.loads(body)
    except ValueError:
        require_strict(body)


@pytest.mark.parametrize(
    "body", [b"1e300", b"1e100", b"x NaN \\ud800", b"[" * 100_000 + b"NaN", b'"NaN', b""]
)
def test_signs_alone_are_no_reason(body: bytes) -> None:
    require_strict(body)


@pytest.mark.parametrize("number", ["1e999", "-1E+400", "[1e12, 1e1234]", "1" * 400 + ".5"])
def test_numbers_beyond_all_bounds_are_refused(number: str) -> None:
    with pytest.raises(BodyError, match="no finite number"):
        require_strict(f'{{"logit_bias": {number}}}'.encode())


@pytest.mark.parametrize(
    "text", ['{"prompt": "NaN, Infinity"}', r'{"prompt": "\ud83d\ude00"}', r'{"a": "\\ud800"}']
)
def test_text_about_such_things_is_text(text: str) -> None:
    require_strict(text.encode())


async def test_a_body_passes_whole() -> None:
    assert (await client().post("/", content=b'{"a": 1}')).content == b'{"a": 1}'
    assert (await client().post("/", content=b"")).content == b""

    async def pieces() -> object:
        for piece in (b'{"a"', b": ", b"2}"):
            yield piece

    answer = await client().post("/", content=pieces())  # type: ignore[arg-type]
    assert answer.content == b'{"a": 2}'


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [(b"x" * 101, 413, "body_too_large"), (b'{"a": NaN}', 400, "invalid_json")],
)
async def test_refusals_have_openais_form(content: bytes, status: int, code: str) -> None:
    answer = await client().post("/", content=content)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


async def test_a_body_that_never_ends_is_not_kept() -> None:
    read = 0
    sent: list[Message] = []

    async def receive() -> Message:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": b"x" * 40, "more_body": True}

    async def send(message: Message) -> None:
        sent.append(message)

    await StrictBody(echo, 100, 60.0)({"type": "http", "method": "POST"}, receive, send)
    assert (read, sent[0]["status"]) == (3, 413)


async def test_a_body_that_does_not_arrive_is_not_waited_for() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        while True:  # each piece is in time
            yield b" "
            await asyncio.sleep(0.02)

    began = time.monotonic()
    answer = await client(timeout_s=0.2).post("/", content=pieces())
    assert time.monotonic() - began < 60
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "request_timeout")
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize("value", ["true", "false"])
def test_a_switch_is_no_number(value: str) -> None:
    """vLLM's parser would make 1 or 0 of it."""
    body = f'{{"vllm_xargs": {{"memshare_step_threshold" : {value}}}}}'
    with pytest.raises(BodyError, match=r"vllm_xargs\.memshare_step_threshold = (True|False)"):
        require_strict(body.encode())


@pytest.mark.parametrize(
    "body",
    [
        r'{"prompt": "\"memshare_step_threshold\": true"}',
        '{"vllm_xargs": {"mine": true, "memshare_step_threshold": 0.5}}',
        '{"metadata": {"memshare_step_threshold": true}}',
        '[{"memshare": true}]',
        '{"vllm_xargs": null, "memshare": true}',
    ],
)
def test_what_is_no_option_may_be_a_switch(body: str) -> None:
    require_strict(body.encode())


async def test_a_client_that_leaves_in_the_middle_is_told_to_the_app() -> None:
    messages: list[Message] = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.disconnect"},
    ]
    seen: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(await receive())

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        raise AssertionError("nothing is sent")

    await StrictBody(app, 100, 60.0)({"type": "http", "method": "POST"}, receive, send)
    assert seen == [{"type": "http.disconnect"}]


def test_digits_take_no_time_to_look_through() -> None:
    """They are searched on the event loop, while every other request waits."""

    def seconds(digits: int) -> float:
        body = b"[" + b",".join([b"1" * digits] * (4_000_000 // digits)) + b"]"
        start = time.thread_time()
        require_strict(body)
        return time.thread_time() - start

    # Four times as much, if each digit is tried as the first.
    assert min(seconds(308), seconds(308)) < 2 * seconds(77)
