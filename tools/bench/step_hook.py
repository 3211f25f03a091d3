"""How long MemShare's step hook takes, with vLLM's real scheduler objects.

256 requests decode; their block boundaries are spread so that in every other step none of them
fills a block, and in the steps between 16 fill one and finish a reasoning step. Times are of
``build_connector_meta`` alone, on the engine's thread. A sleep stands for the forward pass, in
which a real engine lets other threads (here the in-process evaluator) have the interpreter.

    python -m tools.bench.step_hook
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

REQUESTS, GROUP, BLOCK = 256, 16, 32
STEPS = 400
FORWARD_S = 0.005


def main() -> None:
    """Print medians and 99th percentiles by policy."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    print(
        "| policy | steps | quiet: median us (p99) | 16 finish a reasoning step: median us (p99) |"
    )
    print("| --- | --- | --- | --- |")
    staged: dict[str, Any] = {"steps": {"max_tokens": BLOCK}}
    for name, options in {"twins": staged, "paper": staged, "oldest": {}, "compaction": {}}.items():
        quiet, busy = measure({"policy": {"name": name}} | options)
        print(f"| {name} | {len(quiet) + len(busy)} | {_show(quiet)} | {_show(busy)} |")


def measure(options: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Seconds of each hook call: without new blocks, and with 16 finished steps."""
    from memshare.lab.simulate.harness import SchedulerHarness
    from tests.memshare.engine.harness import write_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        rig = SchedulerHarness(
            write_tiny_model(Path(folder)), options, blocks=16_000, max_num_seqs=REQUESTS
        )
        rng = random.Random(0)
        for i in range(REQUESTS):
            # Groups of 16 whose prompts end two slots apart: a group is due every other step.
            length = BLOCK + 2 * (i // GROUP)
            rig.add(f"r{i}", [rng.randrange(200) for _ in range(length)], max_tokens=1500)
        for _ in range(3 * BLOCK):  # prefill, warm-up
            rig.step()
        hook = rig.scheduler.connector.build_connector_meta
        steps_before, took = 0, 0.0
        quiet: list[float] = []
        busy: list[float] = []

        def timed(output: Any) -> Any:
            nonlocal took
            start = perf_counter()
            message = hook(output)
            took = perf_counter() - start
            return message

        rig.scheduler.connector.build_connector_meta = timed
        counters = rig.side.recorder.counters
        wheel = rig.side._wheel
        for _ in range(STEPS):
            due, steps_before = wheel.due_within(1), counters.totals["steps"]
            rig.step()
            sleep(FORWARD_S)
            finished = counters.totals["steps"] - steps_before
            if due == 0:
                quiet.append(took)
            elif due == GROUP and (finished in (0, GROUP)):
                busy.append(took)
        rig.close()
    return quiet, busy


def _show(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    last = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return f"{1e6 * statistics.median(ordered):.0f} ({1e6 * last:.0f})"


if __name__ == "__main__":
    main()
