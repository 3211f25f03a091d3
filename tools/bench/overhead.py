"""What MemShare costs: its own time within a real engine's.

Wall-clock times of two engine processes differ by more than what is to be measured. So every entry
into MemShare (connector hooks on both sides, the worker's hook) is timed from within, and the CPU
time of the bridge thread is read from the kernel. Their sum, as a part of the whole run, is the
most that throughput can lose. The arm `share` has less than half of the memory that its requests
need; the others have plenty, and change nothing: `share, no pressure` must not remap.

    python -m tools.bench.overhead
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memshare.lab.markdown import table_head, table_row

ARMS: dict[str, dict[str, Any]] = {
    "off": {"mode": "off"},
    "observe": {"mode": "observe"},
    "observe, everything compared": {
        "mode": "observe",
        "policy": {"name": "paper"},  # `twins` has no threshold for steps
        "steps": {"similarity_threshold": 0.0, "max_tokens": 32},
    },
    "share, no pressure": {"mode": "share"},
    "share": {"mode": "share"},
}
HEADS = ("mode", "run s", "MemShare, engine's thread", "of that, stage two", "bridge", "rest")
REQUESTS = 16
PLENTY, SHORT = 400, 130  # KV blocks


class Stopwatch:
    """Adds up the time spent in wrapped functions, not counting one that another one calls."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = False

    def wrap(self, owner: Any, name: str) -> None:
        """Time ``owner.name`` from now on."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            if self._inside:
                return function(*args, **options)
            self._inside = True
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds += time.perf_counter() - start
                self._inside = False

        setattr(owner, name, timed)


def main() -> None:
    """Print a table, an arm a line; each arm runs in a process of its own."""
    if len(sys.argv) > 1:
        _measure(sys.argv[1])
        return
    print(table_head(HEADS))
    for arm in ARMS:
        done = subprocess.run(
            [sys.executable, "-m", "tools.bench.overhead", arm],
            capture_output=True,
            text=True,
            check=False,
        )
        rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
        print(rows[0] if rows else f"{arm} failed:\n{done.stderr[-3000:]}", flush=True)


def _measure(arm: str) -> None:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    from vllm import LLM
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from memshare.lab.bench.models import resolve
    from memshare.plug_in import plug_in
    from memshare.small_model.reasoner import NAME

    blocks = SHORT if arm == "share" else PLENTY
    llm = LLM(
        resolve(NAME), dtype="float32", max_model_len=2048, block_size=32,
        num_gpu_blocks_override=blocks, enforce_eager=True, seed=0, **plug_in(ARMS[arm]),
    )  # fmt: skip
    _generate(llm, 8)  # warm up
    core = llm.llm_engine.engine_core.engine_core
    watch, stage_two = Stopwatch(), Stopwatch()
    for connector in (core.scheduler.connector, get_kv_transfer_group()):
        for name in vars(type(connector)):
            if not name.startswith("_") and callable(getattr(connector, name)):
                watch.wrap(connector, name)
    worker = core.model_executor.driver_worker.worker
    if worker._memshare is not None:
        stage_two.wrap(worker._memshare, "after_step")
        watch.wrap(worker._memshare, "before_step")
    before, start = _bridge_seconds(), time.perf_counter()
    _generate(llm, 500)
    whole = time.perf_counter() - start
    ours, bridge = watch.seconds / whole, (_bridge_seconds() - before) / whole
    two = stage_two.seconds / whole
    rest = 1 - ours - bridge
    shares = (f"{share:.3%}" for share in (ours, two, bridge))
    print(table_row((arm, f"{whole:.1f}", *shares, f"{rest:.4f}")))


def _generate(llm: Any, tokens: int) -> None:
    """The test reasoner on its problems."""
    from vllm import SamplingParams

    from memshare.lab.problems import FAMILIES, generate

    llm.reset_prefix_cache()
    problems = [generate(FAMILIES[i % len(FAMILIES)], i) for i in range(REQUESTS)]
    chats: Any = [[{"role": "user", "content": problem.prompt}] for problem in problems]
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    llm.chat(chats, params, use_tqdm=False)


def _bridge_seconds() -> float:
    """CPU seconds of the thread to the evaluators so far (Linux)."""
    ticks = 0
    for thread in threading.enumerate():
        if thread.name == "memshare-bridge":
            stat = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
            fields = stat.rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # utime, stime
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
