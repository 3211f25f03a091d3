"""The client for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grpc

from memshare.client.errors import call_errors
from memshare.client.options import (
    JsonValue,
    Message,
    channel_options,
    chat_request,
    generate_request,
    metadata,
)
from memshare.proto import memshare_pb2 as pb
from memshare.proto.memshare_pb2_grpc import MemShareStub

Chunk = TypeVar("Chunk", pb.GenerateChunk, pb.ChatChunk)


class AsyncStream(Generic[Chunk]):
    """Pieces of a reply, as they come. Leaving it early aborts the request on the server.

    Iterating raises :class:`~memshare.client.errors.CallError`.
    """

    def __init__(self, call: Any) -> None:
        """Wrap gRPC's call."""
        self._call = call

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """The pieces; the last one has ``finish`` and ``usage``."""
        try:
            with call_errors():
                async for chunk in self._call:
                    yield chunk
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Abort the request. Idempotent; does nothing once the reply is whole."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        """For an ``async with`` block."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Abort what has not been read."""
        self.cancel()


class AsyncClient:
    """Calls a cluster: :class:`~memshare.client.sync.Client` with coroutines."""

    def __init__(
        self,
        address: str = "127.0.0.1:9000",
        *,
        key: str | None = None,
        session: str | None = None,
        app: str | None = None,
        retries: int = 3,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """Make a client, inside the event loop that will use it.

        Arguments and errors are those of :class:`~memshare.client.sync.Client`.
        """
        options = channel_options(retries)
        self._metadata = metadata(key, session, app)
        self._channel = (
            grpc.aio.insecure_channel(address, options)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options)
        )
        self._stub = MemShareStub(self._channel)

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling: pb.Sampling | None = None,
        *,
        memshare: pb.MemShareOptions | None = None,
        model: str = "",
        request_id: str = "",
        timeout: float | None = None,
    ) -> pb.GenerateResponse:
        """See :meth:`memshare.client.sync.Client.generate`."""
        request = generate_request(prompt, sampling, memshare, model, request_id)
        with call_errors():
            reply: pb.GenerateResponse = await self._stub.Generate(
                request, timeout=timeout, metadata=self._metadata
            )
            return reply

    def generate_stream(
        self,
        prompt: str | Sequence[int],
        sampling: pb.Sampling | None = None,
        *,
        memshare: pb.MemShareOptions | None = None,
        model: str = "",
        request_id: str = "",
        timeout: float | None = None,
    ) -> AsyncStream[pb.GenerateChunk]:
        """See :meth:`memshare.client.sync.Client.generate_stream`."""
        request = generate_request(prompt, sampling, memshare, model, request_id)
        return AsyncStream(
            self._stub.GenerateStream(request, timeout=timeout, metadata=self._metadata)
        )

    async def chat(
        self,
        messages: Iterable[Message],
        sampling: pb.Sampling | None = None,
        *,
        memshare: pb.MemShareOptions | None = None,
        model: str = "",
        request_id: str = "",
        reasoning_effort: str | None = None,
        template_kwargs: Mapping[str, JsonValue] | None = None,
        timeout: float | None = None,
    ) -> pb.ChatResponse:
        """See :meth:`memshare.client.sync.Client.chat`."""
        request = chat_request(
            messages, sampling, memshare, model, request_id, reasoning_effort, template_kwargs
        )
        with call_errors():
            reply: pb.ChatResponse = await self._stub.Chat(
                request, timeout=timeout, metadata=self._metadata
            )
            return reply

    def chat_stream(
        self,
        messages: Iterable[Message],
        sampling: pb.Sampling | None = None,
        *,
        memshare: pb.MemShareOptions | None = None,
        model: str = "",
        request_id: str = "",
        reasoning_effort: str | None = None,
        template_kwargs: Mapping[str, JsonValue] | None = None,
        timeout: float | None = None,
    ) -> AsyncStream[pb.ChatChunk]:
        """See :meth:`memshare.client.sync.Client.chat_stream`."""
        request = chat_request(
            messages, sampling, memshare, model, request_id, reasoning_effort, template_kwargs
        )
        return AsyncStream(self._stub.ChatStream(request, timeout=timeout, metadata=self._metadata))

    async def abort(self, request_id: str, *, timeout: float | None = 30.0) -> bool:
        """See :meth:`memshare.client.sync.Client.abort`."""
        with call_errors():
            reply: pb.AbortResponse = await self._stub.Abort(
                pb.AbortRequest(request_id=request_id), timeout=timeout, metadata=self._metadata
            )
            return reply.found

    async def model_info(
        self, model: str = "", *, timeout: float | None = 30.0
    ) -> pb.GetModelInfoResponse:
        """See :meth:`memshare.client.sync.Client.model_info`."""
        with call_errors():
            reply: pb.GetModelInfoResponse = await self._stub.GetModelInfo(
                pb.GetModelInfoRequest(model=model), timeout=timeout, metadata=self._metadata
            )
            return reply

    async def stats(self, *, timeout: float | None = 30.0) -> pb.GetStatsResponse:
        """See :meth:`memshare.client.sync.Client.stats`."""
        with call_errors():
            reply: pb.GetStatsResponse = await self._stub.GetStats(
                pb.GetStatsRequest(), timeout=timeout, metadata=self._metadata
            )
            return reply

    async def close(self) -> None:
        """Close the connection; calls under way are cancelled. Idempotent."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        """For an ``async with`` block."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connection."""
        await self.close()
