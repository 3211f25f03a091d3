"""Simulate a large cluster: the product's routing, scaling and placement on simulated replicas.

One line for each size and each way of routing: how good the choices were, and what they cost. With
``--scaling`` the cluster starts small and grows and shrinks by KV pressure.

    python -m tools.bench.simulate_cluster --replicas 100,300,1000
    python -m tools.bench.simulate_cluster --replicas 40 --scaling

The same seed gives the same events. Without engines and without Ray Serve's own work: it shows the
decisions, not what a proxy, a controller or a GPU can do. Costs are CPU time of one core.
"""

from __future__ import annotations

import argparse
import resource
import time
import tracemalloc
from random import Random

from cluster.config import RoutingConfig, ScalingConfig
from cluster.routing.choice import Routing
from cluster.routing.load import Load
from cluster.simulation.engine import SimulatedMachine
from cluster.simulation.world import (
    ChatWorkload,
    Cluster,
    SimulatedOutcome,
    World,
    deviation,
    imbalance,
)
from memshare.lab.markdown import table_head, table_row

ROUTINGS = {
    "sessions, KV": RoutingConfig(),
    "sessions, requests": RoutingConfig(load="requests"),
    "KV": RoutingConfig(sessions=False),
    "requests": RoutingConfig(sessions=False, load="requests"),
}
HEADS = [
    "replicas", "sessions", "routing", "requests", "decisions/s",
    "longest update, ms", "one replica more, ms", "router, MB",
    "requests, max/mean", "KV, deviation", "evaluators, max/mean", "back home", "prompts computed",
    "preemptions/100", "ms/token p50", "ms/token p99", "events/s", "run, s", "memory, MB",
]  # fmt: skip


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", default="100", help="sizes, as in 100,300,1000")
    parser.add_argument("--sessions", type=int, default=100, help="for each replica")
    parser.add_argument("--duration", type=float, default=600, help="sessions start within it, s")
    parser.add_argument("--kv-tokens", type=int, default=60_000, help="of each replica")
    parser.add_argument("--documents", type=float, default=0.0, help="fraction of long prompts")
    parser.add_argument("--proxies", type=int, default=4)
    parser.add_argument("--evaluators", type=int, default=4, help="actors for 100 replicas")
    parser.add_argument("--routing", choices=ROUTINGS, help="all if left out")
    parser.add_argument("--scaling", action="store_true", help="start with a quarter and scale")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(table_head(HEADS))
    for replicas in map(int, options.replicas.split(",")):
        workload = ChatWorkload(
            options.sessions * replicas,
            duration_s=options.duration,
            documents=options.documents,
        )
        for name, routing in ROUTINGS.items():
            if options.routing in (None, name):
                cluster = Cluster(
                    max(1, replicas // 4) if options.scaling else replicas,
                    routing=routing,
                    scaling=ScalingConfig(max_replicas=replicas) if options.scaling else None,
                    machine=SimulatedMachine(kv_tokens=options.kv_tokens),
                    proxies=options.proxies,
                    evaluators=max(1, options.evaluators * replicas // 100),
                )
                outcome = World(cluster, workload, options.seed).run()
                print(table_row(_cells(replicas, name, routing, outcome, workload)), flush=True)
                if options.scaling:
                    changes = outcome.replicas_over_time
                    print("\n" + ", ".join(f"{count} at {at:.0f} s" for at, count in changes))


def _cells(
    replicas: int,
    name: str,
    routing: RoutingConfig,
    outcome: SimulatedOutcome,
    workload: ChatWorkload,
) -> list[str]:
    size, one_more_s = _router_costs(replicas, routing)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [
        f"{replicas:,}",
        f"{workload.sessions:,}",
        name,
        f"{outcome.requests:,}",
        f"{outcome.requests / outcome.decision_s:,.0f}",
        f"{1e3 * outcome.update_s:.0f}",
        f"{1e3 * one_more_s:.1f}",
        f"{size / 1e6:.1f}",
        f"{imbalance(outcome.per_replica):.2f}",
        f"{deviation(outcome.kv_means):.2f}",
        f"{imbalance(outcome.per_evaluator):.2f}",
        f"{outcome.returned / max(1, outcome.later_turns):.0%}",
        f"{outcome.prefilled / outcome.prompts:.0%}",
        f"{100 * outcome.preemptions / outcome.requests:.1f}",
        f"{1e3 * outcome.latency(0.5):.1f}",
        f"{1e3 * outcome.latency(0.99):.1f}",
        f"{outcome.events / outcome.cpu_s:,.0f}",
        f"{outcome.cpu_s:.1f}",
        f"{memory:.0f}",
    ]


def _router_costs(replicas: int, config: RoutingConfig) -> tuple[int, float]:
    """Bytes of one router that has heard of all replicas, and CPU seconds to hear of one more."""
    names = [f"replica-{i}" for i in range(replicas)]
    tracemalloc.start()
    router = Routing(config, Random(0))
    router.set_replicas(names)
    for name in names:
        router.report(name, Load(0.5, 1, 0, 1, 0))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    began = time.thread_time()
    router.set_replicas([*names, "one-more"])
    return size, time.thread_time() - began


if __name__ == "__main__":
    main()
