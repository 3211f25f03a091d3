"""What Ray Serve's gRPC proxies import: the services, by name in ``grpc_servicer_functions``.

Kept light, and free of vLLM: a proxy that cannot import this does not start.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """As generated code does it, but for requests that can't be parsed.

    gRPC would end those with UNKNOWN, and a traceback in the proxy's log.
    """
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
    handler = grpc.method_handlers_generic_handler(service.full_name, handlers)
    server.add_generic_rpc_handlers((handler,))


def _parser(message: type[Message]) -> Callable[[bytes], Message | Malformed]:
    def parse(data: bytes) -> Message | Malformed:
        try:
            return message.FromString(data)
        except DecodeError:
            return Malformed(message.DESCRIPTOR.full_name)

    return parse
