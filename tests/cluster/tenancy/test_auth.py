"""The gate (cluster/tenancy/gate.py) and its HTTP side; the app is a stand-in."""

from __future__ import annotations

import asyncio
import weakref
from pathlib import Path

import httpx
import pytest
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.http.asgi import FREE_PATHS, INFERENCE_PATHS, OPEN_PATHS, KeyGate
from cluster.tenancy.call import LOCAL, Call, RefusedError
from cluster.tenancy.gate import is_local, key_of
from cluster.tenancy.keys import (
    SEQUENCES_PER_REQUEST,
    KeylessConfig,
    hash_key,
)
from tests.cluster.support.gates import (
    CHAT,
    Work,
    bearer,
    client_of,
    counted,
    gate_for,
    ok,
    open_gate,
)


async def test_errors_have_openais_form(tmp_path: Path) -> None:
    client = client_of(gate_for(tmp_path, acme={}), ok)
    for headers in ({}, bearer("wrong"), {"Authorization": "Basic YTpi"}, bearer(hash_key("acme"))):
        answer = await client.post(CHAT, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")


@pytest.mark.parametrize(
    "headers", [bearer("acme"), {"authorization": "bearer  acme"}, {"x-api-key": "acme"}]
)
async def test_a_key_opens_inference(tmp_path: Path, headers: dict[str, str]) -> None:
    client = client_of(gate_for(tmp_path, acme={}), ok)
    for path in (CHAT, "/v1/models", "/tokenize"):
        assert (await client.post(path, headers=headers)).status_code == 200


async def test_what_is_no_inference_is_for_operators(tmp_path: Path) -> None:
    gate = gate_for(tmp_path, acme={}, root={"operator": True})
    client = client_of(gate, ok)
    closed = ("/metrics", "/openapi.json", "/memshare/api/state", "//v1/chat/completions")
    for path in closed:
        answer = await client.post(f"http://server{path}", headers=bearer("acme"))
        assert answer.status_code == 403, path
        assert "for operators" in answer.json()["error"]["message"]
        answer = await client.post(f"http://server{path}", headers=bearer("root"))
        assert answer.status_code == 200, path
    assert counted(gate, "tenant_refusals", "acme", "not_operator") == 4


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
async def test_probes_need_no_key(tmp_path: Path, path: str) -> None:
    client = client_of(gate_for(tmp_path, acme={}), ok)
    assert (await client.get(path)).status_code == 200


async def test_who_comes_after_closing_is_told_when_to_come_again(tmp_path: Path) -> None:
    gate = gate_for(tmp_path, acme={})
    client = client_of(gate, ok)
    gate.close(retry_after_s=7)
    for answer in (await client.post(CHAT, headers=bearer("acme")), await client.get("/health")):
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "7"
        assert "try again in 7 s" in answer.json()["error"]["message"]
    assert counted(gate, "tenant_refusals", "acme", "closed") == 1
    assert counted(gate, "tenant_requests", "acme", "refused") == 1
    assert (await client.post(CHAT, headers=bearer("wrong"))).status_code == 401
    assert (await client.get("/v1/models", headers=bearer("acme"))).status_code == 200, "no work"


def test_no_path_is_in_two_lists() -> None:
    assert len(OPEN_PATHS | FREE_PATHS | INFERENCE_PATHS) == sum(
        map(len, (OPEN_PATHS, FREE_PATHS, INFERENCE_PATHS))
    )


async def test_a_prefix_of_the_route_is_not_part_of_the_path(tmp_path: Path) -> None:
    called: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        called.append(scope["path"])
        await ok(scope, receive, send)

    transport = httpx.ASGITransport(
        app=KeyGate(app, gate_for(tmp_path, acme={})), root_path="/llm", client=("10.0.0.9", 1)
    )
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        assert (await client.get("/llm/health")).status_code == 200
        assert (await client.post(f"/llm{CHAT}")).status_code == 401
    assert called == ["/llm/health"]


async def test_without_keys_only_this_machine_is_served() -> None:
    gate = open_gate()
    for peer in ("127.0.0.1", "::1", "127.9.9.9", "::ffff:127.0.0.1"):
        assert (await client_of(gate, ok, peer).post(CHAT)).status_code == 200, peer
        assert (await client_of(gate, ok, peer).get("/metrics")).status_code == 200, peer
    for peer in ("10.0.0.9", "::2", "::ffff:10.0.0.9", "localhost.evil.example"):
        answer = await client_of(gate, ok, peer).post(CHAT)
        assert answer.status_code == 401, peer
        assert "set 'auth'" in answer.json()["error"]["message"]
    assert counted(gate, "tenant_refusals", "-", "not_local") == 4


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Host": "rebound.example:8000"}, 401),
        ({"Host": "localhost.rebound.example"}, 401),
        ({"Origin": "https://page.example"}, 401),
        ({"Origin": "null"}, 401),
        ({"Origin": "http://[broken"}, 401),
    ],
)
async def test_without_keys_no_page_of_others_is_served_by_a_local_browser(
    headers: dict[str, str], status: int
) -> None:
    gate = open_gate()
    for call in ("get", "post"):
        answer = await getattr(client_of(gate, ok, "127.0.0.1"), call)(CHAT, headers=headers)
        assert answer.status_code == status
    assert counted(gate, "tenant_refusals", "-", "not_local") == (2 if status == 401 else 0)


async def test_with_keys_the_site_does_not_matter(tmp_path: Path) -> None:
    client = client_of(gate_for(tmp_path, acme={}), ok, "10.0.0.9")
    headers = bearer("acme") | {"Host": "llm.example", "Origin": "https://page.example"}
    assert (await client.post(CHAT, headers=headers)).status_code == 200


def test_an_unknown_peer_is_not_local() -> None:
    assert not is_local(None)
    assert not is_local("")
    assert not is_local("unix:")


def test_the_key_of_a_call() -> None:
    assert key_of({"authorization": "Bearer a", "x-api-key": "b"}.get) == "a"
    assert key_of({"authorization": "Basic a", "x-api-key": "b"}.get) == "b"
    assert key_of({"authorization": "Bearer "}.get) is None
    assert key_of({}.get) is None


async def test_a_tenant_at_its_limit_is_told_when_to_come_again(tmp_path: Path) -> None:
    gate = gate_for(tmp_path, acme={"concurrent_requests": 1}, bravo={})
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def body() -> object:
            yield b"data: 1\n\n"
            inside.set()
            await go_on.wait()

        await StreamingResponse(body())(scope, receive, send)  # type: ignore[arg-type]

    client = client_of(gate, app)
    streamed = asyncio.create_task(client.post(CHAT, headers=bearer("acme")))
    await inside.wait()
    answer = await client.post(CHAT, headers=bearer("acme"))
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert (await client_of(gate, ok).post(CHAT, headers=bearer("bravo"))).status_code == 200
    go_on.set()
    assert (await streamed).status_code == 200
    assert (await client_of(gate, ok).post(CHAT, headers=bearer("acme"))).status_code == 200
    assert counted(gate, "tenant_refusals", "acme", "requests") == 1
    assert counted(gate, "tenant_requests", "acme", "refused") == 1
    assert counted(gate, "tenant_requests", "acme", "served") == 2
    assert counted(gate, "tenant_requests", "bravo", "served") == 1


@pytest.mark.parametrize("way", ["error", "cancel"])
async def test_a_call_that_ends_badly_is_counted_out(tmp_path: Path, way: str) -> None:
    gate = gate_for(tmp_path, acme={"concurrent_requests": 1})

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if way == "error":
            raise RuntimeError("broken")
        await asyncio.Event().wait()

    call = asyncio.create_task(client_of(gate, app).post(CHAT, headers=bearer("acme")))
    await asyncio.sleep(0.05)
    call.cancel()
    with pytest.raises((RuntimeError, asyncio.CancelledError)):
        await call
    outcome = {"error": "failed", "cancel": "aborted"}[way]
    assert counted(gate, "tenant_requests", "acme", outcome) == 1
    assert (await client_of(gate, ok).post(CHAT, headers=bearer("acme"))).status_code == 200


@pytest.mark.parametrize(
    ("status", "leaves", "outcome"),
    [
        (200, False, "served"),
        (400, False, "served"),
        (500, False, "failed"),
        (200, True, "aborted"),
    ],
)
async def test_how_an_exchange_ended(
    tmp_path: Path, status: int, leaves: bool, outcome: str
) -> None:
    gate = gate_for(tmp_path, acme={})
    messages: list[Message] = [{"type": "http.request", "body": b"{}", "more_body": False}]
    messages += [{"type": "http.disconnect"}] * leaves

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in list(messages):
            await receive()
        await JSONResponse({}, status)(scope, receive, send)  # vLLM answers to nobody, too

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        pass

    headers = [(b"authorization", b"Bearer acme")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers}
    await KeyGate(app, gate)(scope, receive, send)
    assert counted(gate, "tenant_requests", "acme", outcome) == 1


async def test_tokens_are_counted_while_they_are_generated_and_once(tmp_path: Path) -> None:
    gate = gate_for(tmp_path, acme={"tokens_per_minute": 100})
    work = Work(10, 0)
    async with gate.admit(gate.identify("acme", None)) as call:
        call.began("r", work)
        work.counts = (10, 60)
        gate._note(call)
        assert counted(gate, "tenant_tokens", "acme", "output") == 60
        work.counts = (10, 95)
    assert counted(gate, "tenant_tokens", "acme", "prompt") == 10
    assert counted(gate, "tenant_tokens", "acme", "output") == 95
    with pytest.raises(RefusedError) as caught:
        async with gate.admit(gate.identify("acme", None)):
            raise AssertionError("admitted")
    assert (caught.value.kind, caught.value.why) == ("limited", "tokens")
    assert caught.value.retry_after_s == 3, "a debt of 5 at 100 a minute"


async def test_of_what_has_ended_only_the_sum_is_kept(tmp_path: Path) -> None:
    """Beam search makes a request of every beam for every token."""
    gate = gate_for(tmp_path, acme={})
    async with gate.admit(gate.identify("acme", None)) as call:
        works: list[weakref.ref[Work]] = []
        for token in range(200):
            for beam in range(4):
                work = Work(100 + token, 1)
                works.append(weakref.ref(work))
                call.began(f"{token}-{beam}", work)
                del work
            for beam in range(4):
                call.ended(f"{token}-{beam}")
            gate._note(call)
        assert not [work for work in works if work() is not None]
        call.ended("nobody")
    assert counted(gate, "tenant_tokens", "acme", "output") == 800
    assert counted(gate, "tenant_tokens", "acme", "prompt") == 4 * sum(range(100, 300))


async def test_without_keys_a_request_and_a_connection_have_bounds() -> None:
    gate = open_gate(requests_per_connection=2)
    a, b = (gate.identify(None, "127.0.0.1", connection=name) for name in "ab")
    assert a.sequences_per_request == SEQUENCES_PER_REQUEST
    assert gate.call().caller.sequences_per_request == SEQUENCES_PER_REQUEST
    async with gate.admit(a), gate.admit(a):
        with pytest.raises(RefusedError, match="of 2 requests at one time by one conn") as caught:
            async with gate.admit(a):
                raise AssertionError("admitted")
        async with gate.admit(b):
            pass
    assert (caught.value.kind, caught.value.retry_after_s) == ("limited", 1)
    assert "try again in 1 s" in str(caught.value), "what the gRPC proxy looks for"
    async with gate.admit(a):
        pass
    assert not gate._connections
    assert counted(gate, "tenant_refusals", LOCAL, "requests") == 1


async def test_over_http_a_connection_is_known_by_its_port() -> None:
    gate = open_gate(requests_per_connection=1)
    statuses: list[int] = []

    def connection(app: ASGIApp, port: int) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=KeyGate(app, gate), client=("127.0.0.1", port))
        return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for port in (1, 2):
            statuses.append((await connection(ok, port).post(CHAT)).status_code)
        await ok(scope, receive, send)

    assert (await connection(app, 1).post(CHAT)).status_code == 200
    assert statuses == [429, 200]


async def test_with_keys_the_tenants_limits_hold_alone(tmp_path: Path) -> None:
    gate = gate_for(tmp_path, acme={})
    gate._keyless = KeylessConfig(requests_per_connection=1)
    caller = gate.identify("acme", None, connection="gateway")
    async with gate.admit(caller), gate.admit(caller):
        pass


async def test_models_are_checked_by_name(tmp_path: Path) -> None:
    gate = gate_for(tmp_path, acme={"models": ["small"]}, bravo={})
    async with gate.admit(gate.identify("bravo", None)) as call:
        gate.require_model(call, "large")
    async with gate.admit(gate.identify("acme", None)) as call:
        gate.require_model(call, "small")
        with pytest.raises(RefusedError, match="use one of: small") as caught:
            gate.require_model(call, "large")
    assert caught.value.kind == "forbidden"
    assert counted(gate, "tenant_requests", "bravo", "served") == 1
    assert counted(gate, "tenant_requests", "acme", "refused") == 1, "and not served as well"
    assert counted(gate, "tenant_refusals", "acme", "model") == 1


async def test_what_runs_for_a_call_knows_it(tmp_path: Path) -> None:
    gate = gate_for(tmp_path, acme={}, bravo={})
    salts: dict[str, set[str]] = {"acme": set(), "bravo": set()}

    async def one(tenant: str) -> None:
        async def deep() -> Call:
            await asyncio.sleep(0)
            return gate.call()

        async with gate.admit(gate.identify(tenant, None)):
            call = await asyncio.create_task(deep())
            assert call.caller.tenant == tenant
            salts[tenant].add(call.salt)

    await asyncio.gather(*(one(tenant) for tenant in ("acme", "bravo") * 20))
    assert [len(found) for found in salts.values()] == [1, 1], "a tenant has one salt"
    assert salts["acme"].isdisjoint(salts["bravo"])


async def test_a_front_end_that_forgot_the_gate_is_refused_if_there_are_keys(
    tmp_path: Path,
) -> None:
    with pytest.raises(RefusedError, match="does not check keys"):
        gate_for(tmp_path, acme={}).call()
    assert open_gate().call().caller.tenant == LOCAL


async def test_salts_of_two_replicas_and_of_a_guess_differ(tmp_path: Path) -> None:
    import hashlib

    salts = []
    for _ in range(2):
        gate = gate_for(tmp_path, acme={})
        async with gate.admit(gate.identify("acme", None)) as call:
            salts.append(call.salt)
    assert len({*salts, hashlib.sha256(b"acme").hexdigest(), "acme"}) == 4
    assert all(len(salt) == 64 for salt in salts)


async def test_a_revoked_key_ends_with_the_next_look(tmp_path: Path) -> None:
    gate = gate_for(tmp_path, acme={}, bravo={})
    tending = asyncio.create_task(gate.tend())
    assert (await client_of(gate, ok).post(CHAT, headers=bearer("bravo"))).status_code == 200
    gate_for(tmp_path, acme={})  # writes the file anew
    async with asyncio.timeout(60):
        while counted(gate, "key_table_reloads", "used") < 1:
            await asyncio.sleep(0.1)
    answer = await client_of(gate, ok).post(CHAT, headers=bearer("bravo"))
    assert answer.status_code == 401
    tending.cancel()
