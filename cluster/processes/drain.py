"""Leave a node with care: ``python -m cluster.processes.drain``, run on it before it goes.

Ray is told that this node is going. Ray Serve then starts the node's replicas elsewhere, sends new
requests there, and lets the old replicas finish theirs. This command ends when none is left here,
or at the deadline. Kubernetes runs it as a pod's ``preStop`` hook.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable

import ray
from ray._private.state import actors
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # an extension module
from ray.core.generated import autoscaler_pb2
from ray.exceptions import RayError

logger = logging.getLogger(__name__)

_POLL_S = 1.0
_REPLICA = "ServeReplica:"  # how Ray Serve names the actor class of a replica


def drain(node_id: str, deadline_s: float, replicas: Callable[[str], int] | None = None) -> bool:
    """Drain one node of the cluster that this process is connected to.

    Args:
        node_id: the node, in hex.
        deadline_s: seconds from now at which what is left there is given up.
        replicas: counts the replicas on a node; by default Ray is asked.

    Returns:
        Whether every replica had left before the deadline.

    Raises:
        RuntimeError: Ray refuses to drain this node.
    """
    count = replicas or replicas_on
    end = time.monotonic() + deadline_s
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    accepted, why = client.drain_node(
        node_id,
        autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION,  # type: ignore[attr-defined]  # generated
        "the pod is about to go",
        int((time.time() + deadline_s) * 1000),
    )
    if not accepted:
        raise RuntimeError(f"Ray does not drain node {node_id}: {why}")
    while left := count(node_id):
        if time.monotonic() >= end:
            logger.warning("%d replicas are left at the deadline", left)
            return False
        time.sleep(_POLL_S)
    return True


def replicas_on(node_id: str) -> int:
    """Live replicas of Ray Serve on a node."""
    return sum(
        actor["Address"]["NodeID"] == node_id and actor["ActorClassName"].startswith(_REPLICA)
        for actor in actors(actor_state_name="ALIVE").values()
    )


def main() -> int:
    """Drain the node that this runs on; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--deadline-s", type=float, default=600.0, help="default: %(default)s")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
        done = drain(ray.get_runtime_context().get_node_id(), args.deadline_s)
    except (ConnectionError, RayError, RuntimeError) as error:
        # The whole cluster may be going: the pod must not be held up.
        logger.warning("not drained: %s", error)
        return 1
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
