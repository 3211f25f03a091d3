"""How the replicas of a server that is told to end let their requests finish."""

from __future__ import annotations

import logging
import time
from typing import Any, NamedTuple

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)


class Closed(NamedTuple):
    """What a replica says that takes no further requests.

    Attributes:
        grace_s: seconds that those under way are given to end.
        under_way: how many have been admitted and have not ended.
    """

    grace_s: float
    under_way: int


_POLL_S = 0.3
_CALL_S = 5.0
_FLUSH_S = 0.5  # for the last words of a stream to pass the proxy
_LATE = Closed(grace_s=60.0, under_way=1)
"""What stands for replicas that do not answer in time: they are busy, or Ray has yet to tell this
process which there are. Nobody's stream may be cut for that."""


def drain(handles: list[DeploymentHandle[Any]]) -> None:
    """Close every replica for new requests, and wait until those under way have ended.

    Args:
        handles: one of each deployment that has the method ``close`` of
            :class:`cluster.replica.EngineReplica`.
    """
    began, grace = time.monotonic(), 0.0
    told = False
    # Closed again each time: replicas that were just starting open for all who come.
    while closed := [answer for handle in handles for answer in _close(handle)]:
        running = sum(answer.under_way for answer in closed)
        # What a replica has said once holds, also when its next answer is late.
        grace = max(grace, *(answer.grace_s for answer in closed))
        if running and not told:
            logger.warning("%d running requests may finish, within %g s", running, grace)
            told = True
        if not running:
            break
        if time.monotonic() - began > grace:
            logger.warning("%d requests have not finished in time", running)
            break
        time.sleep(_POLL_S)
    time.sleep(_FLUSH_S)


def _close(handle: DeploymentHandle[Any]) -> list[Closed]:
    """Close the replicas of a deployment; returns what those say that can still be asked."""
    try:
        answers = handle.broadcast("close").results(timeout_s=_CALL_S, return_exceptions=True)
    except TimeoutError:
        answers = [_LATE]
    except (RayError, RayServeException) as error:  # no replica is left
        answers = [error]
    closed = []
    for answer in answers:
        if isinstance(answer, Closed):
            closed.append(answer)
        elif isinstance(answer, TimeoutError):
            closed.append(_LATE)
        else:
            logger.warning("%s does not close: %r", handle.deployment_name, answer)
    return closed
