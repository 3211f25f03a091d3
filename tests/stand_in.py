"""A stand-in for the engine behind the gRPC methods."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from typing import Any

import grpc

from cluster.grpc.messages import Cost, Piece
from cluster.grpc.status import StatusError

COST = Cost(3, 0, 2, 0, {"blocks_shared": 0, "peak_kv_blocks": 1, "preemptions": 0})
WORDS = ["one ", "two ", "three"]


class StandIn:
    """In place of cluster.generation.Generation: says three words, or goes on until aborted, or, if
    asked to ``say 1000``, so many letters."""

    model_name = "m"
    adapters = ("an-adapter",)
    role = "assistant"

    def __init__(self) -> None:
        self.has_died = False
        self.bodies: list[Mapping[str, Any]] = []
        self.running: dict[str, asyncio.Event] = {}
        self.idle = asyncio.Event()  # set whenever the last of its requests has ended
        self.failures: list[Exception] = []
        self.metadata: Mapping[str, str] = {}

    def require_model(self, name: str) -> None:
        if name not in ("", "m", "an-adapter"):
            raise StatusError(grpc.StatusCode.NOT_FOUND, f"model: there is no {name!r}")

    async def abort(self, request_id: str) -> None:
        self.running[request_id].set()

    async def complete(
        self, body: Mapping[str, Any], request_id: str, metadata: Mapping[str, str]
    ) -> AsyncGenerator[Piece, None]:
        self.bodies.append(body)
        self.metadata = metadata
        if self.failures:
            raise self.failures.pop(0)
        self.require_model(body.get("model", ""))
        aborted = self.running[request_id] = asyncio.Event()
        self.idle.clear()
        try:
            if body.get("ignore_eos"):
                while not aborted.is_set():
                    yield Piece("one ", [0])
                    with suppress(TimeoutError):
                        await asyncio.wait_for(aborted.wait(), 0.002)
                yield Piece("", [], finish_reason="abort", cost=COST)
            elif str(body.get("prompt", "")).startswith("say "):
                size = int(body["prompt"].removeprefix("say "))
                yield Piece("x" * size, [0], finish_reason="stop", cost=COST)
            elif body["stream"]:
                for i, word in enumerate(WORDS[:-1]):
                    yield Piece(word, [i])
                yield Piece(WORDS[-1], [2], finish_reason="stop", cost=COST)
            else:
                yield Piece("".join(WORDS), [0, 1, 2], finish_reason="stop", cost=COST)
        finally:
            del self.running[request_id]
            if not self.running:
                self.idle.set()

    chat = complete
