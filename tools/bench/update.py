"""A rolling update of a real engine under load: which requests fail, and how long do they wait?

Clients stream short answers without pause, half by HTTP and half by gRPC, and one a long answer,
while the application of configs/cluster.yaml is deployed again with another max_num_seqs.

    python -m tools.bench.update --surge 100
    python -m tools.bench.update --surge 0

The exit status is 1 if a request has failed. With a surge there are two engines at a time: about
8 GB of memory.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from memshare.lab.bench.report import machine
from memshare.lab.markdown import table
from tools.bench.load import StreamLoad, StreamOutcome, grpc_streams, http_streams, summarize
from tools.bench.local_cluster import cluster_file, free_port, local_ray
from tools.runtime_env import runtime_env

PROMPT = "Tell me a long story about a lighthouse."
AROUND_S = 8.0  # of load before the update, and after it


def main() -> int:
    """Deploy, load, deploy again, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--surge", type=int, default=100, help="replica.max_surge_percent")
    parser.add_argument("--clients", type=int, default=4, help="streams of short answers at once")
    parser.add_argument("--tokens", type=int, default=30, help="of a short answer")
    parser.add_argument("--long", type=int, default=800, help="tokens of the long answer")
    parser.add_argument("--timeout", type=float, default=600, help="of each of the two starts, s")
    options = parser.parse_args()
    if options.clients < 2:
        parser.error(f"--clients {options.clients}: one for each protocol at least, so 2 or more")
    os.environ.update(runtime_env(os.environ))
    with local_ray():
        return asyncio.run(_run(options))


async def _run(options: argparse.Namespace) -> int:
    from ray import serve

    document = cluster_file()
    port, grpc_port = free_port(), free_port()
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": "127.0.0.1", "port": port},
        grpc_options={**document["grpc_options"], "port": grpc_port},
    )
    args: dict[str, Any] = document["applications"][0]["args"]
    args["replica"]["max_surge_percent"] = options.surge
    took = await _deploy(args, options.timeout)
    print(f"first start: {took:.0f} s", flush=True)

    url = f"http://127.0.0.1:{port}/v1/completions"
    by_http = StreamLoad(lambda: http_streams(url, _body(options.tokens)), options.clients // 2)
    by_grpc = StreamLoad(
        lambda: grpc_streams(f"127.0.0.1:{grpc_port}", lambda index: PROMPT, options.tokens),
        options.clients - options.clients // 2,
    )
    long = StreamLoad(lambda: http_streams(url, _body(options.long)), 1)
    running = asyncio.gather(by_http.run(), by_grpc.run(), long.run(requests=1))
    await asyncio.sleep(AROUND_S)
    args["engine"]["max_num_seqs"] = 16
    began = time.monotonic()
    took = await _deploy(args, options.timeout)
    ended = time.monotonic()
    await asyncio.sleep(AROUND_S)
    by_http.stop()
    by_grpc.stop()
    await running

    print(f"update: {took:.0f} s, surge {options.surge} %, {machine()}\n")
    outcomes = {"HTTP": by_http.outcomes, "gRPC": by_grpc.outcomes, "HTTP, long": long.outcomes}
    heads = [
        "requests",
        "whole",
        "failed",
        "first token, s: p50 before / most during the update",
    ]
    print(table(heads, [_row(name, those, began, ended) for name, those in outcomes.items()]))
    (story,) = long.outcomes
    print(f"\nlong answer: {story.chunks} pieces in {story.ended - story.sent:.0f} s")
    failed = [o for those in outcomes.values() for o in those if o.ending != "whole"]
    for outcome in failed[:5]:
        at = outcome.sent - began
        print(f"{outcome.ending}, sent {at:.1f} s after the update began: {outcome.detail}")
    await asyncio.to_thread(serve.shutdown)
    return 1 if failed else 0


def _row(name: str, outcomes: Sequence[StreamOutcome], began: float, ended: float) -> list[str]:
    during = [o for o in outcomes if o.ended > began and o.sent < ended and o.first_token]
    before = summarize([o for o in outcomes if o.ended <= began])
    return [
        name,
        str(sum(o.ending == "whole" for o in outcomes)),
        str(sum(o.ending != "whole" for o in outcomes)),
        f"{before.first_token_p50:.2f} / "
        f"{max((o.seconds_to_first_token for o in during), default=0.0):.2f}",
    ]


async def _deploy(args: dict[str, Any], timeout_s: float) -> float:
    """Deploy and wait until one replica, of the new version, is all there is; seconds."""
    from ray import serve

    from cluster.app import build

    began = time.monotonic()
    application = build(args)
    await asyncio.to_thread(
        serve._run, application, name="memshare", route_prefix="/", _blocking=False
    )
    calm = 0
    while calm < 4:  # right after a deployment the old state may still be shown
        if time.monotonic() - began > timeout_s:
            raise TimeoutError(f"not deployed within {timeout_s:.0f} s: {serve.status()}")
        await asyncio.sleep(0.5)
        found = (await asyncio.to_thread(serve.status)).applications["memshare"]
        states = found.deployments.get("Engine")
        is_done = states is not None and states.replica_states == {"RUNNING": 1}
        calm = calm + 1 if is_done and found.status == "RUNNING" else 0
    return time.monotonic() - began


def _body(tokens: int) -> Any:
    body = {"model": "smollm2", "prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True}
    return lambda index: body


if __name__ == "__main__":
    sys.exit(main())
