"""A rolling update of a real engine under load: which requests fail, and how long do they wait?

Clients stream short answers without pause, and one a long answer, while the application of
``configs/cluster.yaml`` is deployed again with another ``max_num_seqs``.

    python tools/bench_update.py --surge 100
    python tools/bench_update.py --surge 0

Two engines at a time with a surge: about 8 GB of memory.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclass
class Seen:
    """What the clients saw.

    Attributes:
        waits: seconds until the first token, of each request.
        failures: of requests, in words.
        long_tokens: that the long answer had.
        long_s: seconds that it took.
    """

    waits: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    long_tokens: int = 0
    long_s: float = 0.0


def main() -> None:
    """Deploy, load, deploy again, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--surge", type=int, default=100, help="replica.max_surge_percent")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=30, help="of a short answer")
    parser.add_argument("--long", type=int, default=800, help="tokens of the long answer")
    parser.add_argument("--timeout", type=float, default=170, help="of each of the two starts, s")
    options = parser.parse_args()
    os.environ |= {
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
    }
    os.environ.pop("RAY_ADDRESS", None)
    import ray

    with tempfile.TemporaryDirectory(prefix="memshare-", dir="/tmp") as folder:
        ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        try:
            _run(options)
        finally:
            ray.shutdown()


def _run(options: argparse.Namespace) -> None:
    import yaml
    from ray import serve
    from vllm.utils.network_utils import get_open_port

    port = get_open_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    file = yaml.safe_load((ROOT / "configs" / "cluster.yaml").read_text())
    args: dict[str, Any] = file["applications"][0]["args"]
    args["replica"]["max_surge_percent"] = options.surge
    args["memshare"]["evaluator"] = {"source": "in_process"}
    print(f"first start: {_deploy(args, options.timeout):.0f} s", flush=True)
    seen, done = Seen(), threading.Event()
    url = f"http://127.0.0.1:{port}/v1"
    clients = [
        threading.Thread(target=_ask, args=(url, options.tokens, seen, done))
        for _ in range(options.clients)
    ]
    long = threading.Thread(target=_ask_long, args=(url, options.long, seen))
    for thread in (*clients, long):
        thread.start()
    time.sleep(5)
    before = len(seen.waits)
    args["engine"]["max_num_seqs"] = 16
    try:
        took = _deploy(args, options.timeout)
        during = seen.waits[before:]
        time.sleep(5)
    finally:
        done.set()
        for thread in (*clients, long):
            thread.join()
    print(f"update: {took:.0f} s, surge {options.surge} %")
    print(f"requests: {len(seen.waits)} answered, {len(seen.failures)} failed {seen.failures[:3]}")
    print(f"time to the first token: {max(seen.waits[:before]):.2f} s at most before the update")
    print(f"                         {max(during, default=0.0):.2f} s at most during it")
    print(f"long answer: {seen.long_tokens} of {options.long} tokens in {seen.long_s:.0f} s")
    serve.shutdown()


def _deploy(args: dict[str, Any], timeout_s: float) -> float:
    """Deploy and wait until one replica, of the new version, is all there is; seconds."""
    from ray import serve

    from cluster.app import build

    began = time.monotonic()
    serve._run(build(args), name="memshare", route_prefix="/", _blocking=False)
    calm = 0
    while calm < 4:  # right after a deployment the old state may still be shown
        if time.monotonic() - began > timeout_s:
            raise SystemExit(f"not deployed within {timeout_s:.0f} s: {serve.status()}")
        time.sleep(0.5)
        application = serve.status().applications["memshare"]
        states = application.deployments.get("Engine")
        is_done = states is not None and states.replica_states == {"RUNNING": 1}
        calm = calm + 1 if is_done and application.status == "RUNNING" else 0
    return time.monotonic() - began


def _ask(url: str, tokens: int, seen: Seen, done: threading.Event) -> None:
    while not done.is_set():
        began = time.monotonic()
        try:
            stream = _stream(url, tokens)
            next(stream)
            seen.waits.append(time.monotonic() - began)
            count = 1 + sum(1 for _ in stream)
        except Exception as error:
            seen.failures.append(repr(error)[:200])
            time.sleep(1)
        else:
            if count < tokens // 2:
                seen.failures.append(f"{count} of {tokens} tokens")


def _ask_long(url: str, tokens: int, seen: Seen) -> None:
    began = time.monotonic()
    try:
        for _ in _stream(url, tokens):
            seen.long_tokens += 1
    except Exception as error:
        seen.failures.append(f"the long answer: {error!r:.200}")
    seen.long_s = time.monotonic() - began


def _stream(url: str, tokens: int) -> Any:
    """Text pieces of a streamed completion."""
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
    return (
        chunk.choices[0].text
        for chunk in client.completions.create(
            model="smollm2",
            prompt="Tell me a long story about a lighthouse.",
            max_tokens=tokens,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        if chunk.choices
    )


if __name__ == "__main__":
    main()
