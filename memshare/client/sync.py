"""The client for ordinary code. One client serves many threads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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


class Stream(Generic[Chunk]):
    """Pieces of a reply, as they come. Leaving it early aborts the request on the server.

    Iterating raises :class:`~memshare.client.errors.CallError`.
    """

    def __init__(self, call: Any) -> None:
        """Wrap gRPC's call."""
        self._call = call

    def __iter__(self) -> Iterator[Chunk]:
        """The pieces; the last one has ``finish`` and ``usage``."""
        try:
            with call_errors():
                yield from self._call
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Abort the request. Idempotent; does nothing once the reply is whole."""
        self._call.cancel()

    def __enter__(self) -> Self:
        """For a ``with`` block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Abort what has not been read."""
        self.cancel()


class Client:
    """Calls a cluster.

    Every method raises :class:`~memshare.client.errors.CallError`, and takes a ``timeout`` in
    seconds, over all attempts, after which the request is aborted; None waits for ever.
    """

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
        """Make a client; the server is not asked anything yet.

        Args:
            address: host and port.
            key: opens the server, if it has keys.
            session: calls of one session go to one replica, if the cluster routes by it.
            app: name of Ray Serve's application; needed only if several offer this service.
            retries: how often a call with one reply is sent again while the server is unavailable,
                0 to 4.
            credentials: for TLS, such as ``grpc.ssl_channel_credentials()``; None speaks plainly.

        Raises:
            ValueError: ``retries`` is out of range.
        """
        options = channel_options(retries)
        self._metadata = metadata(key, session, app)
        self._channel = (
            grpc.insecure_channel(address, options)
            if credentials is None
            else grpc.secure_channel(address, credentials, options)
        )
        self._stub = MemShareStub(self._channel)

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling: pb.Sampling | None = None,
        *,
        memshare: pb.MemShareOptions | None = None,
        model: str = "",
        request_id: str = "",
        timeout: float | None = None,
    ) -> pb.GenerateResponse:
        """Continue a prompt.

        Args:
            prompt: text, or token ids.
            sampling: how tokens are chosen, and when to stop.
            memshare: what the request asks of MemShare.
            model: empty is the served model.
            request_id: for :meth:`abort`.
            timeout: in seconds.
        """
        request = generate_request(prompt, sampling, memshare, model, request_id)
        with call_errors():
            reply: pb.GenerateResponse = self._stub.Generate(
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
    ) -> Stream[pb.GenerateChunk]:
        """Continue a prompt, piece by piece; see :meth:`generate`."""
        request = generate_request(prompt, sampling, memshare, model, request_id)
        return Stream(self._stub.GenerateStream(request, timeout=timeout, metadata=self._metadata))

    def chat(
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
        """Answer a conversation.

        Args:
            messages: the conversation so far.
            sampling: how tokens are chosen, and when to stop.
            memshare: what the request asks of MemShare.
            model: empty is the served model.
            request_id: for :meth:`abort`.
            reasoning_effort: for models that know it: none, minimal, low, medium, high, ...
            template_kwargs: for the model's chat template, such as ``{"enable_thinking": False}``.
            timeout: in seconds.
        """
        request = chat_request(
            messages, sampling, memshare, model, request_id, reasoning_effort, template_kwargs
        )
        with call_errors():
            reply: pb.ChatResponse = self._stub.Chat(
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
    ) -> Stream[pb.ChatChunk]:
        """Answer a conversation, piece by piece; see :meth:`chat`."""
        request = chat_request(
            messages, sampling, memshare, model, request_id, reasoning_effort, template_kwargs
        )
        return Stream(self._stub.ChatStream(request, timeout=timeout, metadata=self._metadata))

    def abort(self, request_id: str, *, timeout: float | None = 30.0) -> bool:
        """End a request of the same tenant; its own call returns what it has written so far.

        Returns:
            Whether such a request was running.
        """
        with call_errors():
            reply: pb.AbortResponse = self._stub.Abort(
                pb.AbortRequest(request_id=request_id), timeout=timeout, metadata=self._metadata
            )
            return reply.found

    def model_info(
        self, model: str = "", *, timeout: float | None = 30.0
    ) -> pb.GetModelInfoResponse:
        """Describe the model and how it is served."""
        with call_errors():
            reply: pb.GetModelInfoResponse = self._stub.GetModelInfo(
                pb.GetModelInfoRequest(model=model), timeout=timeout, metadata=self._metadata
            )
            return reply

    def stats(self, *, timeout: float | None = 30.0) -> pb.GetStatsResponse:
        """What one replica is doing and has done; for keys of operators."""
        with call_errors():
            reply: pb.GetStatsResponse = self._stub.GetStats(
                pb.GetStatsRequest(), timeout=timeout, metadata=self._metadata
            )
            return reply

    def close(self) -> None:
        """Close the connection; calls under way are cancelled. Idempotent."""
        self._channel.close()

    def __enter__(self) -> Self:
        """For a ``with`` block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connection."""
        self.close()
