"""One replica becomes two under KV pressure, and one again without: real engines, a real load.

    python -m tools.bench.scaling --streams 16

Serves ``configs/autoscale.yaml`` with at most two replicas, each with so few KV blocks that the
streams do not fit into one, and waits half as long as the file says before it scales. The load runs
until two replicas have shared it for a while, and stops. One line for every change, with seconds
since the load began; then how the streams ended. Exits with status 1 if a stream failed, or if the
replicas did not come and go.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from memshare.lab.markdown import table_head, table_row
from tools.bench.load import StreamLoad, http_streams
from tools.bench.local_cluster import (
    Server,
    cluster_file,
    local_ray,
    replica_states,
    running_server,
)

WAIT_S = 600.0
PROMPT = "Story {index}. The keeper of the lighthouse counts the ships, one after another:"


def main() -> None:
    """Run, print, and say by the exit status whether all went well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=600, help="of a stream")
    parser.add_argument("--blocks", type=int, default=160, help="KV blocks of a replica")
    parser.add_argument("--shared-s", type=float, default=60, help="load on both replicas, seconds")
    args = parser.parse_args()
    with (
        local_ray(),
        tempfile.TemporaryDirectory(prefix="memshare-scaling-") as folder,
        running_server(Path(folder), document(args.blocks)) as server,
    ):
        endings = asyncio.run(Scaling(server, args).run())
    print(f"\nstreams: {', '.join(f'{count} {ending}' for ending, count in endings.items())}")
    sys.exit(bool(endings["failed"]))


def document(blocks: int) -> dict[str, Any]:
    """The cluster file."""
    found = cluster_file("autoscale.yaml")
    found["http_options"]["host"] = "127.0.0.1"
    args = found["applications"][0]["args"]
    args["scaling"] |= {"max_replicas": 2, "up_delay_s": 15, "down_delay_s": 60}
    args["engine"]["num_gpu_blocks_override"] = blocks
    args["replica"]["pin_cpus"] = False
    args["replica"]["env"]["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return found


class Scaling:
    """The load, and what is seen of the replicas meanwhile."""

    def __init__(self, server: Server, args: argparse.Namespace) -> None:
        self._server = server
        self._args = args
        self._load = StreamLoad(
            lambda: http_streams(f"{server.url}/v1/completions", self._body), args.streams
        )

    def _body(self, index: int) -> dict[str, Any]:
        return {
            "model": "smollm2", "prompt": PROMPT.format(index=index),
            "max_tokens": self._args.tokens, "ignore_eos": True,
        }  # fmt: skip

    async def run(self) -> Counter[str]:
        """Returns how streams ended."""
        print(table_head(("s", "replicas", "streams done", "what")))
        self._began = time.monotonic()
        load = asyncio.create_task(self._load.run())
        self._tell("the load begins")
        await self._until(2)
        self._tell("a second replica answers")
        await asyncio.sleep(self._args.shared_s)
        self._tell("the load ends")
        self._load.stop()
        await load
        self._tell("the last stream has ended")
        await self._until(1)
        self._tell("one is left")
        return Counter(outcome.ending for outcome in self._load.outcomes)

    async def _until(self, replicas: int) -> None:
        end = time.monotonic() + WAIT_S
        while await asyncio.to_thread(running) != replicas:
            if time.monotonic() > end:
                sys.exit(f"not {replicas} replicas within {WAIT_S:.0f} s")
            await asyncio.sleep(0.5)

    def _tell(self, what: str) -> None:
        seconds = f"{time.monotonic() - self._began:.0f}"
        row = [seconds, str(running()), str(len(self._load.outcomes)), what]
        print(table_row(row), flush=True)


def running() -> int:
    """Replicas that run."""
    from ray.serve.schema import ReplicaState

    return replica_states().get(ReplicaState.RUNNING, 0)


if __name__ == "__main__":
    main()
