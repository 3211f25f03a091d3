"""What Ray Serve's gRPC proxies import: the services, by name in ``grpc_servicer_functions``.

Kept light, and free of vLLM: a proxy that cannot import this does not start.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2

from cluster.config import MAX_REQUEST_BYTES
from cluster.http.timeouts import timeouts
from cluster.telemetry.serve_logs import log_no_refusals
from memshare.proto import memshare_pb2

SERVICE: ServiceDescriptor = memshare_pb2.DESCRIPTOR.services_by_name["MemShare"]
HEALTH: ServiceDescriptor = health_pb2.DESCRIPTOR.services_by_name["Health"]

_RAYS_SERVICE = "ray.serve.RayServeAPIService"
# Of who does not say it: the default of `replica.retry_after_s`, which a proxy does not know; and
# of a replica that has ended, which the next try does not meet again.
_RETRY_AFTER_S = {grpc.StatusCode.RESOURCE_EXHAUSTED: 2, grpc.StatusCode.UNAVAILABLE: 1}
_AGAIN = re.compile(r"try again in (\d+) s")
_DEAD = "The actor "  # how the errors of ray.exceptions begin


@dataclass(frozen=True, slots=True)
class Malformed:
    """Stands for a request whose bytes are not the message that they should be."""

    problem: str


def add_memshare(servicer: Any, server: grpc.Server) -> None:
    """Add ``memshare.v1.MemShare`` to a server, and close Ray Serve's own list of applications; for
    ``grpc_servicer_functions``."""
    log_no_refusals()
    _close_list(server)
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
    methods = _Methods(service.full_name, handlers, timeouts(os.environ).body)
    server.add_generic_rpc_handlers((methods,))


def _close_list(server: Any) -> None:
    """Close the list of applications that Ray Serve's proxies give to whoever asks.

    Of two handlers of a method gRPC takes the registered one. ``Healthz`` of the same service stays
    open: it tells only that the proxy lives.
    """
    from ray.serve._private.grpc_util import gRPCGenericServer

    if isinstance(server, gRPCGenericServer):
        # Or Ray Serve would put its own in the place of this handler, too.
        server.add_passthrough_service(_RAYS_SERVICE)
        closed: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(
            _refuse_to_list
        )
        server.add_registered_method_handlers(_RAYS_SERVICE, {"ListApplications": closed})


async def _refuse_to_list(request: bytes, context: Any) -> None:
    await context.abort(
        grpc.StatusCode.PERMISSION_DENIED, "ListApplications is closed; ask Ray: serve status"
    )


def _parser(message: type[Message]) -> Callable[[bytes], Message | Malformed]:
    """Lets a request that can't be parsed, or is too large, through to the replica.

    gRPC would end it with UNKNOWN, and a traceback in the proxy's log.
    """

    def parse(data: bytes) -> Message | Malformed:
        if len(data) > MAX_REQUEST_BYTES:
            return Malformed(too_large(len(data), MAX_REQUEST_BYTES))
        try:
            return message.FromString(data)
        except DecodeError:
            return Malformed(f"its bytes are no {message.DESCRIPTOR.full_name}")

    return parse


def too_large(size: int, limit: int) -> str:
    """What is wrong with a request of so many bytes."""
    return f"has {size} bytes, more than {limit}; send a shorter prompt"


class _Methods(grpc.ServiceRpcHandler):
    """The methods of a service, around what Ray Serve makes of them: see :func:`_amend`.

    To gRPC each is one with a stream of messages, which is the same on the wire: it would wait for
    the single message of another one without end, before anything of ours runs.
    """

    def __init__(
        self, service: str, handlers: dict[str, grpc.RpcMethodHandler[Any, Any]], timeout_s: float
    ) -> None:
        self._service = service
        self._timeout_s = timeout_s
        # By this name Serve replaces them with its own when we are added to its server, as it does
        # with generated code's (``gRPCGenericServer`` in ``ray/serve/_private/grpc_util.py``).
        self._method_handlers = {
            f"/{service}/{name}": handler for name, handler in handlers.items()
        }

    def service_name(self) -> str:
        return self._service

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = self._method_handlers.get(handler_call_details.method)
        if handler is None:
            return None
        serializers = handler.request_deserializer, handler.response_serializer
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                _streamed(handler.unary_stream, self._timeout_s), *serializers
            )
        return grpc.stream_unary_rpc_method_handler(
            _whole(handler.unary_unary, self._timeout_s), *serializers
        )


async def _message(messages: AsyncIterator[Any], context: Any, timeout_s: float) -> Any:
    """The message of a call; without one in time, the call ends."""
    try:
        async with asyncio.timeout(timeout_s):
            return await anext(messages)
    except TimeoutError:
        late = f"the message did not arrive within {timeout_s:g} s; send it faster"
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, late)
    except StopAsyncIteration:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message; send one")


def _whole(call: Any, timeout_s: float) -> Any:
    async def unary(messages: AsyncIterator[Any], context: Any) -> bytes:
        reply: bytes = await call(await _message(messages, context, timeout_s), context)
        _amend(context)
        if context.code() not in (None, grpc.StatusCode.OK):
            # Ray Serve returns an empty reply beside the status. With a reply, empty or not, a
            # client takes the call for answered, and does not try again by itself.
            await context.abort(context.code(), _text(context.details()))
        return reply

    return unary


def _streamed(read: Any, timeout_s: float) -> Any:
    """A stream that ends at the replica whenever it ends here.

    Ray Serve cancels the call to the replica if the client leaves while the proxy waits for the
    replica's next message. If it leaves while the proxy writes one, Serve forgets the call, and the
    replica generates to the end for nobody (``send_request_to_replica`` in
    ``ray/serve/_private/proxy.py``). So the reading is cancelled while it waits for a message.
    """

    async def stream(messages: AsyncIterator[Any], context: Any) -> None:
        request = await _message(messages, context, timeout_s)
        replies: AsyncGenerator[bytes, None] = read(request, context)
        async for reply in replies:
            try:
                await context.write(reply)
            except BaseException:
                await _cancel(replies)
                raise
        _amend(context)

    return stream


def _amend(context: Any) -> None:
    """Say what Ray Serve leaves unsaid of a call that has failed before or at the replica.

    Of a failed call only code and details come from a replica, no metadata.

    - A replica that was killed would be INTERNAL, as if another try were no use.
    - Who may try again is told when, as over HTTP: what the text says (see
      :class:`cluster.tenancy.limits.LimitReachedError`, :func:`cluster.routing.outage.try_again`),
      or the usual time.
    """
    code, details = context.code(), _text(context.details())
    if code == grpc.StatusCode.INTERNAL and details.startswith(_DEAD):
        code = grpc.StatusCode.UNAVAILABLE
        context.set_code(code)
        context.set_details("the replica has ended and is being replaced; try again")
    if code in _RETRY_AFTER_S:
        said = _AGAIN.search(details)
        seconds = int(said[1]) if said else _RETRY_AFTER_S[code]
        context.set_trailing_metadata(
            [
                *(context.trailing_metadata() or ()),
                # As gRPC's own retries heed it, and as in HTTP.
                ("grpc-retry-pushback-ms", str(1000 * seconds)),
                ("retry-after", str(seconds)),
            ]
        )


def _text(details: bytes | str) -> str:
    return details.decode(errors="replace") if isinstance(details, bytes) else details


async def _cancel(messages: AsyncGenerator[bytes, None]) -> None:
    """Read on, and be cancelled at it.

    A failed write is followed by gRPC's cancellation of the call's task, which is this one. It must
    neither reach a read that has not begun, where it would be lost, nor let the call end before the
    read: Serve asks the call for its peer then, which crashes the proxy if the call is gone.

    Raises:
        asyncio.CancelledError: this task was cancelled meanwhile.
    """
    reading: asyncio.Future[bytes] = asyncio.ensure_future(anext(messages))
    # Right after its first step, in which it begins to wait for the replica.
    asyncio.get_running_loop().call_soon(reading.cancel)
    cancelled = None
    while not reading.done():
        try:
            await asyncio.wait([reading])
        except asyncio.CancelledError as error:
            cancelled = error
    await asyncio.gather(reading, return_exceptions=True)  # its end is expected: no log of it
    if cancelled is not None:
        raise cancelled
