"""What Ray Serve's gRPC proxies import: the services, by name in ``grpc_servicer_functions``.

Kept light, and free of vLLM: a proxy that cannot import this does not start.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2

from memshare.proto import memshare_pb2

SERVICE: ServiceDescriptor = memshare_pb2.DESCRIPTOR.services_by_name["MemShare"]
HEALTH: ServiceDescriptor = health_pb2.DESCRIPTOR.services_by_name["Health"]


@dataclass(frozen=True, slots=True)
class Malformed:
    """Stands for a request whose bytes are not the message that they should be."""

    message: str


def add_memshare(servicer: Any, server: grpc.Server) -> None:
    """Add ``memshare.v1.MemShare`` to a server; for ``grpc_servicer_functions``."""
    _add(SERVICE, servicer, server)


def add_health(servicer: Any, server: grpc.Server) -> None:
    """Add ``grpc.health.v1.Health`` to a server; for ``grpc_servicer_functions``."""
    _add(HEALTH, servicer, server)


def _add(service: ServiceDescriptor, servicer: Any, server: grpc.Server) -> None:
    """As generated code does it, but for what :func:`_parser` and :class:`_Methods` see to."""
    handlers = {}
    for method in service.methods:
        make = (
            grpc.unary_stream_rpc_method_handler
            if method.server_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        handlers[method.name] = make(
            getattr(servicer, method.name),
            request_deserializer=_parser(GetMessageClass(method.input_type)),
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
    server.add_generic_rpc_handlers((_Methods(service.full_name, handlers),))


def _parser(message: type[Message]) -> Callable[[bytes], Message | Malformed]:
    """Lets a request that can't be parsed through to the replica.

    gRPC would end it with UNKNOWN, and a traceback in the proxy's log.
    """

    def parse(data: bytes) -> Message | Malformed:
        try:
            return message.FromString(data)
        except DecodeError:
            return Malformed(message.DESCRIPTOR.full_name)

    return parse


class _Methods(grpc.ServiceRpcHandler):
    """The methods of a service, whose streams end at the replica whenever they end here.

    Ray Serve cancels the call to the replica if the client leaves while the proxy waits for the
    replica's next message. If it leaves while the proxy writes one, Serve forgets the call, and the
    replica generates to the end for nobody (``send_request_to_replica`` in
    ``ray/serve/_private/proxy.py``).
    """

    def __init__(self, service: str, handlers: dict[str, grpc.RpcMethodHandler[Any, Any]]) -> None:
        self._service = service
        # By this name Serve replaces them with its own when we are added to its server, as it does
        # with generated code's (``gRPCGenericServer`` in ``ray/serve/_private/grpc_util.py``).
        self._method_handlers = {
            f"/{service}/{name}": handler for name, handler in handlers.items()
        }

    def service_name(self) -> str:
        return self._service

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = self._method_handlers.get(handler_call_details.method)
        if handler is None or not handler.response_streaming:
            return handler
        return grpc.unary_stream_rpc_method_handler(
            _ending(handler.unary_stream), handler.request_deserializer, handler.response_serializer
        )


def _ending(read: Any) -> Any:
    """A stream whose reading is always cancelled while it waits for a message."""

    async def stream(request: Any, context: Any) -> None:
        messages: AsyncGenerator[bytes, None] = read(request, context)
        async for message in messages:
            try:
                await context.write(message)
            except BaseException:
                await _cancel(messages)
                raise

    return stream


async def _cancel(messages: AsyncGenerator[bytes, None]) -> None:
    """Read on, and be cancelled at it."""
    reading: asyncio.Future[bytes] = asyncio.ensure_future(anext(messages))
    await asyncio.sleep(0)  # it waits now
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)  # its end is expected: no log of it
    await messages.aclose()
