"""How large a message may be between Ray Serve's proxies and replicas, where they speak gRPC.

A limit of Ray Serve's own, beside the one for clients; by default gRPC's 4 MiB. The receiver has
it: a replica for requests, a proxy for replies. Each process reads it from its environment when it
starts. Replicas get it from us (:func:`cluster.app.build`); proxies have that of Ray's processes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ray.serve._private import constants

from cluster.config import MAX_REQUEST_BYTES

_VARIABLE = "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"
MAX_MESSAGE_BYTES = MAX_REQUEST_BYTES + 8 * 2**20
"""A request of the largest size, and what Ray Serve sends with it."""

_SERVE = logging.getLogger("ray.serve")


def replica_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The environment of a replica that takes requests of every size; what ``env`` sets stays."""
    return {_VARIABLE: str(MAX_MESSAGE_BYTES), **env}


def warn_of_small_replies() -> None:
    """Say so if large replies can't reach this proxy."""
    limit = constants.RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH
    if constants.RAY_SERVE_PROXY_USE_GRPC and limit < MAX_MESSAGE_BYTES:
        _SERVE.warning(
            "this proxy takes replies of at most %d bytes from replicas, larger ones end with an "
            "error; set %s=%d where Ray starts",
            limit,
            _VARIABLE,
            MAX_MESSAGE_BYTES,
        )
