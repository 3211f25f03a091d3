"""The gRPC methods of a replica: ``memshare.v1.MemShare`` and ``grpc.health.v1.Health``.

Ray Serve's proxy calls them by name on the replica that it has chosen. What they mean is said in
``memshare/proto/memshare.proto`` and docs/grpc.md. A call that is cancelled, or whose deadline is
over, is cancelled here, too, which aborts the request in the engine.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from ray import serve
from ray.serve.grpc_util import RayServegRPCContext

from cluster.config import ClusterArgs
from cluster.grpc import keys as grpc_keys
from cluster.grpc import messages
from cluster.grpc.stats import model_info, stats
from cluster.grpc.status import StatusError, invalid, status_of, statuses
from cluster.grpc_ingress import HEALTH, SERVICE, Malformed, too_large
from cluster.telemetry.access_log import Line, access_line
from cluster.tenancy.call import Caller
from cluster.tenancy.gate import Gate
from memshare.proto import memshare_pb2 as pb

if TYPE_CHECKING:
    from cluster.engine.generation import Generation

M = TypeVar("M", bound=Message)

_ABORT_S = 5.0  # so long may the other replicas take to say whether they had the request
_SERVING: int = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING: int = health_pb2.HealthCheckResponse.NOT_SERVING
_HEALTH_OF = ("", SERVICE.full_name, HEALTH.full_name)  # "" is the server


@dataclass(frozen=True, slots=True)
class RequestKey:
    """A running request as callers know it: none can name another's."""

    owner: str
    request_id: str


class _Started(NamedTuple):
    """A request that runs."""

    request_id: str
    """As the caller knows it."""
    model: str
    pieces: AsyncIterator[messages.Piece]


class GrpcService:
    """To be mixed into the replica's class, which calls :meth:`_start_grpc` when it is ready."""

    def _start_grpc(self, args: ClusterArgs, gate: Gate, generation: Generation) -> None:
        self._args = args
        self._gate = gate
        self._generation = generation
        self._running: dict[RequestKey, str] = {}  # to the engine's ids

    # ---- memshare.v1.MemShare ----

    async def Generate(  # noqa: N802 - gRPC methods are called by their names
        self, request: pb.GenerateRequest | Malformed, grpc_context: RayServegRPCContext
    ) -> pb.GenerateResponse:
        """Continue a prompt."""
        async with self._started("Generate", request, grpc_context, stream=False) as started:
            piece = await _last(started.pieces)
            return messages.generate_response(started.request_id, started.model, piece)

    async def GenerateStream(  # noqa: N802
        self, request: pb.GenerateRequest | Malformed, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.GenerateChunk]:
        """Continue a prompt, piece by piece."""
        async with self._started("GenerateStream", request, grpc_context, stream=True) as started:
            async for piece in started.pieces:
                yield messages.generate_chunk(started.request_id, piece)

    async def Chat(  # noqa: N802
        self, request: pb.ChatRequest | Malformed, grpc_context: RayServegRPCContext
    ) -> pb.ChatResponse:
        """Answer a conversation."""
        async with self._started("Chat", request, grpc_context, stream=False) as started:
            piece, role = await _last(started.pieces), self._generation.role
            return messages.chat_response(started.request_id, started.model, role, piece)

    async def ChatStream(  # noqa: N802
        self, request: pb.ChatRequest | Malformed, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.ChatChunk]:
        """Answer a conversation, piece by piece."""
        async with self._started("ChatStream", request, grpc_context, stream=True) as started:
            role = self._generation.role
            async for piece in started.pieces:
                yield messages.chat_chunk(started.request_id, role, piece)
                role = ""

    async def Abort(  # noqa: N802
        self, request: pb.AbortRequest | Malformed, grpc_context: RayServegRPCContext
    ) -> pb.AbortResponse:
        """End a request of the same caller, on whichever replica it runs."""
        with self._identified("Abort", grpc_context) as caller:
            asked = _parsed(request)
            if not asked.request_id:
                raise invalid("request_id", "is empty; give the id of a running request")
            key = RequestKey(caller.tenant, asked.request_id)
            if await self.abort_here(key):
                return pb.AbortResponse(found=True)
            if self._args.most_replicas == 1:
                return pb.AbortResponse(found=False)
            context = serve.get_replica_context()
            replicas = serve.get_deployment_handle(context.deployment, context.app_name)
            answers = await replicas.broadcast("abort_here", key).results_async(
                timeout_s=_ABORT_S, return_exceptions=True
            )
            return pb.AbortResponse(found=any(answer is True for answer in answers))

    async def abort_here(self, key: RequestKey) -> bool:
        """End a request if it runs on this replica; called by another replica's :meth:`Abort`."""
        engine_id = self._running.get(key)
        if engine_id is None:
            return False
        await self._generation.abort(engine_id)
        return True

    async def GetModelInfo(  # noqa: N802
        self, request: pb.GetModelInfoRequest | Malformed, grpc_context: RayServegRPCContext
    ) -> pb.GetModelInfoResponse:
        """Describe the model and how it is served."""
        with self._identified("GetModelInfo", grpc_context):
            asked = _parsed(request)
            self._generation.require_model(asked.model)
            return model_info(
                self._args, self._generation, asked.model or self._generation.model_name
            )

    async def GetStats(  # noqa: N802
        self, request: pb.GetStatsRequest | Malformed, grpc_context: RayServegRPCContext
    ) -> pb.GetStatsResponse:
        """Say what this replica is doing and has done."""
        with self._identified("GetStats", grpc_context) as caller:
            _parsed(request)
            self._gate.require_operator(caller, "GetStats")
            return stats(serve.get_replica_context().replica_id.unique_id)

    # ---- grpc.health.v1.Health: of the replica that gets the call, open to everybody ----

    async def Check(  # noqa: N802
        self,
        request: health_pb2.HealthCheckRequest | Malformed,
        grpc_context: RayServegRPCContext,
    ) -> health_pb2.HealthCheckResponse:
        """Say whether a service is served."""
        with _answering(HEALTH, "Check", grpc_context):
            service = _parsed(request).service
            if service not in _HEALTH_OF:
                raise StatusError(
                    grpc.StatusCode.NOT_FOUND, f"service: there is no {service!r} here"
                )
            return health_pb2.HealthCheckResponse(status=self._health())

    async def List(  # noqa: N802
        self, request: health_pb2.HealthListRequest | Malformed, grpc_context: RayServegRPCContext
    ) -> health_pb2.HealthListResponse:
        """Say the same of all services."""
        with _answering(HEALTH, "List", grpc_context):
            _parsed(request)
            status = health_pb2.HealthCheckResponse(status=self._health())
            return health_pb2.HealthListResponse(statuses=dict.fromkeys(_HEALTH_OF, status))

    async def Watch(  # noqa: N802
        self,
        request: health_pb2.HealthCheckRequest | Malformed,
        grpc_context: RayServegRPCContext,
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Refused: a watcher would take a place among the requests for as long as it watches."""
        with _answering(HEALTH, "Watch", grpc_context):
            _refuse_to_watch()
        yield health_pb2.HealthCheckResponse()  # never: makes this a stream

    def _health(self) -> int:
        ends = self._generation.has_died or self._gate.is_closed
        return _NOT_SERVING if ends else _SERVING

    # ---- around every call ----

    @contextmanager
    def _identified(self, method: str, context: RayServegRPCContext) -> Iterator[Caller]:
        """Around a method that every key may call, outside the limits."""
        with _answering(SERVICE, method, context) as line:
            caller = grpc_keys.identify(self._gate, context)
            line.tenant = caller.tenant
            yield caller

    @asynccontextmanager
    async def _admitted(self, method: str, context: RayServegRPCContext) -> AsyncIterator[Line]:
        """Around a method that uses the engine. What it does there is done for the caller.

        Yields:
            What is logged of the call; its tenant owns the requests that the call starts.
        """
        with _answering(SERVICE, method, context) as line:
            failure: Exception | None = None
            caller = grpc_keys.identify(self._gate, context)
            line.tenant = caller.tenant
            async with self._gate.admit(caller) as call:
                try:
                    yield line
                except Exception as error:
                    # Kept from the gate, which would count a refused request as our failure.
                    failure = error
                    call.end("failed" if status_of(error).is_ours else "served")
            if failure is not None:
                raise failure

    @asynccontextmanager
    async def _started(
        self,
        method: str,
        request: pb.GenerateRequest | pb.ChatRequest | Malformed,
        context: RayServegRPCContext,
        stream: bool,
    ) -> AsyncIterator[_Started]:
        """Around a method that generates: the request, checked and on its way."""
        async with self._admitted(method, context) as line:
            if isinstance(request, Malformed):
                raise _malformed(request)
            if (size := request.ByteSize()) > self._args.replica.max_body_bytes:
                raise invalid("request", too_large(size, self._args.replica.max_body_bytes))
            asked, metadata = request, dict(context.invocation_metadata())
            own_id = messages.request_id(asked)
            with self._registered(line.tenant, own_id) as (request_id, engine_id):
                line.engine_id = engine_id
                if isinstance(asked, pb.ChatRequest):
                    body = messages.chat_body(asked, stream)
                    pieces = self._generation.chat(body, engine_id, metadata)
                else:
                    body = messages.completion_body(asked, stream)
                    pieces = self._generation.complete(body, engine_id, metadata)
                async with aclosing(pieces):  # whoever stops reading aborts
                    yield _Started(request_id, asked.model or self._generation.model_name, pieces)

    @contextmanager
    def _registered(self, owner: str, request_id: str | None) -> Iterator[tuple[str, str]]:
        """A request that can be aborted for as long as it runs.

        Yields:
            Its id for the caller, and its id in the engine.
        """
        # Logs, spans and the page show the engine's: the caller's must be found in it.
        engine_id = "-".join(filter(None, ("grpc", request_id, uuid.uuid4().hex)))
        key = RequestKey(owner, request_id or engine_id)
        if key in self._running:
            raise StatusError(
                grpc.StatusCode.ALREADY_EXISTS,
                f"request_id: {request_id!r} is running; choose another, or leave it out",
            )
        self._running[key] = engine_id
        try:
            yield key.request_id, engine_id
        finally:
            del self._running[key]


@contextmanager
def _answering(
    service: ServiceDescriptor, method: str, context: RayServegRPCContext
) -> Iterator[Line]:
    """Around every call: it is logged, and ends with a status whatever is raised inside."""
    with access_line("gRPC", f"/{service.full_name}/{method}") as line:
        try:
            with statuses(context):
                yield line
        except StatusError as failure:
            line.status = failure.code.name
            raise
        line.status = grpc.StatusCode.OK.name


def _parsed(request: M | Malformed) -> M:
    """The request, if the proxy could parse it.

    Raises:
        StatusError: INVALID_ARGUMENT.
    """
    if isinstance(request, Malformed):
        raise _malformed(request)
    return request


def _malformed(request: Malformed) -> StatusError:
    return invalid("request", request.problem)


def _refuse_to_watch() -> None:
    raise StatusError(grpc.StatusCode.UNIMPLEMENTED, "Watch is not offered; call Check")


async def _last(pieces: AsyncIterator[messages.Piece]) -> messages.Piece:
    """The only piece of a request that is not streamed."""
    last = None
    async for piece in pieces:
        last = piece
    assert last is not None, "the engine ends with an output, or raises"
    return last
