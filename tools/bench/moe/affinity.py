"""Simulate requests of several kinds on a mixture of experts: what meeting on a replica gains.

The product's routing on simulated replicas (``simulate_cluster``), whose steps take time for every
distinct expert that their requests choose. How kinds choose comes from a model that was measured:
``memshare moe affinity MODEL --popularity FILE`` writes it.

    python -m tools.bench.moe.affinity FILE --replicas 2,4
    python -m tools.bench.moe.affinity FILE --replicas 1000 --chats 300
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from cluster.config import RoutingConfig
from cluster.simulation.engine import ExpertMix, SimulatedMachine
from cluster.simulation.world import ChatWorkload, Cluster, SimulatedOutcome, World, imbalance
from memshare.lab.markdown import table_head, table_row

HEADS = [
    "replicas", "sessions", "routing", "distinct experts a step", "of the first", "KV, max/mean",
    "requests, max/mean", "first token p50, ms", "p99", "ms/token p50", "p99", "back home",
    "decisions/s",
]  # fmt: skip
BARE = {
    "by requests": RoutingConfig(sessions=False, load="requests"),
    "by KV": RoutingConfig(sessions=False),
    "kinds": RoutingConfig(sessions=False, kinds=True),
}
SESSIONS = {"homes": RoutingConfig(), "homes within kinds": RoutingConfig(kinds=True)}


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("popularity", type=Path, help="how kinds choose experts")
    parser.add_argument("--replicas", default="2,4", help="sizes")
    parser.add_argument("--shares", help="of the kinds; alike if left out")
    parser.add_argument("--chats", type=int, default=600, help="for each replica")
    parser.add_argument("--duration", type=float, default=1200, help="chats start within it, s")
    parser.add_argument("--kv-tokens", type=int, default=60_000, help="of each replica")
    parser.add_argument("--step", type=float, default=0.004, help="seconds without experts")
    parser.add_argument("--expert", type=float, default=0.0008, help="seconds for each, all layers")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    kinds = json.loads(options.popularity.read_text())["popularity"]
    mix = ExpertMix(tuple(tuple(tuple(row) for row in kind) for kind in kinds), options.expert)
    shares = tuple(map(float, options.shares.split(","))) if options.shares else (1,) * len(kinds)
    machine = SimulatedMachine(kv_tokens=options.kv_tokens, step_s=options.step, experts=mix)
    print(table_head(HEADS))
    for replicas in map(int, options.replicas.split(",")):
        for named, routings in ((False, BARE), (True, SESSIONS)):
            first = None
            for name, routing in routings.items():
                workload = ChatWorkload(
                    options.chats * replicas, options.duration, output=400, longest=4096,
                    kinds=shares, has_sessions=named,
                )  # fmt: skip
                cluster = Cluster(replicas, routing=routing, machine=machine)
                outcomes = [World(cluster, workload, seed).run() for seed in range(options.seeds)]
                distinct = _mean([o.distinct / o.steps for o in outcomes])
                first = first or distinct
                cells = [str(replicas), "named" if named else "none", name, f"{distinct:.2f}"]
                print(table_row([*cells, f"{distinct / first:.2f}", *_cells(outcomes)]), flush=True)


def _cells(outcomes: list[SimulatedOutcome]) -> list[str]:
    """Means over the runs."""
    return [
        f"{_mean([imbalance(o.kv_means) for o in outcomes]):.2f}",
        f"{_mean([imbalance(o.per_replica) for o in outcomes]):.2f}",
        f"{1e3 * _mean([o.first_token(0.5) for o in outcomes]):,.0f}",
        f"{1e3 * _mean([o.first_token(0.99) for o in outcomes]):,.0f}",
        f"{1e3 * _mean([o.latency(0.5) for o in outcomes]):.1f}",
        f"{1e3 * _mean([o.latency(0.99) for o in outcomes]):.1f}",
        f"{_mean([o.returned / max(1, o.later_turns) for o in outcomes]):.0%}",
        f"{_mean([o.requests / o.decision_s for o in outcomes]):,.0f}",
    ]


def _mean(values: list[float]) -> float:
    return statistics.fmean(values)


if __name__ == "__main__":
    main()
