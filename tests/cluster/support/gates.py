"""Gates with tenants of a test, and clients in front of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import yaml
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from cluster.http.asgi import KeyGate
from cluster.tenancy.gate import Gate
from cluster.tenancy.keys import (
    KeylessConfig,
    KeySource,
    WatchedKeys,
    hash_key,
)
from cluster.tenancy.limits import Ledger, Limiter, LocalLedgerClient
from memshare.telemetry.metrics import REPLICA

CHAT = "/v1/chat/completions"
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Work:
    """Stands in for a request in the engine."""

    def __init__(self, prompt: int, generated: int) -> None:
        self.counts = (prompt, generated)

    def tokens(self) -> tuple[int, int]:
        return self.counts


class Counts:
    """Counts as the exporters do, and refuses labels that they would refuse."""

    def __init__(self) -> None:
        self.seen: Counter[tuple[str, ...]] = Counter()

    def count(self, name: str, *values: str, by: int = 1) -> None:
        for label, value in zip(REPLICA[name].labels, values, strict=True):
            assert not label.values or value in label.values
        self.seen[(name, *values)] += by


def counted(gate: Gate, *key: str) -> int:
    assert isinstance(gate._counts, Counts)
    return gate._counts.seen[key]


def gate_for(tmp_path: Path, **tenants: dict[str, object]) -> Gate:
    """A gate for tenants whose keys are their names."""
    file = tmp_path / "keys.yaml"
    entries = {n: {"keys": {"k": hash_key(n)}} | fields for n, fields in tenants.items()}
    file.write_text(yaml.safe_dump({"tenants": entries}))
    return Gate(
        WatchedKeys(KeySource(file, None)), Limiter(LocalLedgerClient(Ledger()), "r0"), Counts()
    )


def open_gate(**bounds: int) -> Gate:
    limiter = Limiter(LocalLedgerClient(Ledger()), "r0")
    return Gate(None, limiter, Counts(), KeylessConfig(**bounds))


def client_of(gate: Gate, app: App, peer: str = "10.0.0.9") -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=KeyGate(app, gate), client=(peer, 1))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")


async def ok(scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse({"path": scope["path"]})(scope, receive, send)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
