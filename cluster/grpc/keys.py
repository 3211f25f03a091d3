"""Keys on gRPC: the gate of :mod:`cluster.tenancy.gate` for Ray Serve's gRPC calls."""

from __future__ import annotations

from urllib.parse import unquote

import grpc
from ray.serve.grpc_util import RayServegRPCContext

from cluster.tenancy.call import Caller
from cluster.tenancy.gate import Gate, key_of

CODES = {
    "unauthenticated": grpc.StatusCode.UNAUTHENTICATED,
    "forbidden": grpc.StatusCode.PERMISSION_DENIED,
    "limited": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "unavailable": grpc.StatusCode.UNAVAILABLE,
}


def identify(gate: Gate, context: RayServegRPCContext) -> Caller:
    """Say who is calling, by ``authorization: Bearer KEY`` or ``x-api-key`` among the metadata.

    Raises:
        RefusedError: unauthenticated.
    """
    metadata, peer = dict(context.invocation_metadata()), context.peer()
    return gate.identify(key_of(metadata.get), host_of(peer), connection=str(peer))


def host_of(peer: str | None) -> str | None:
    """The address in gRPC's ``ipv4:127.0.0.1:5000`` or ``ipv6:%5B::1%5D:5000``; None for others."""
    kind, _, address = unquote(peer or "").partition(":")
    if kind not in ("ipv4", "ipv6"):
        return None
    return address.rpartition(":")[0]
