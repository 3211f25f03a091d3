"""Latency of a real engine while its evaluator pool is broken on purpose.

One engine, a real Ray cluster, two evaluator actors. Every phase runs the same requests; phases
with a fault alternate with phases in mode ``observe`` (the same engine, remaps switched off, all
evaluators well). All running requests get a token in every engine step, so the time of a step is
their inter-token latency.

    python -m tools.bench.faults
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ACTORS = 2
OPTIONS: dict[str, Any] = {
    # Thresholds at which much is found, so that sharing, and its return, can be seen.
    "policy": {"name": "paper"},
    "trigger": {"kind": "eager"},
    "steps": {"similarity_threshold": 0.3, "min_tokens": 8, "max_tokens": 32},
    "distance": {"similarity_threshold": 0.0},
    "protect": {"recent_tokens": 32},
    "evaluator": {
        "source": "ray", "actors": ACTORS, "cpus_per_actor": 0.1, "call_timeout_s": 1.0,
        "retry_after_s": 0.5, "queue_size": 4, "max_pending_calls": 2,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """One run of all requests.

    Attributes:
        name: what was broken.
        steps: seconds of each decode step.
        finished: requests that gave all their tokens.
        counts: what MemShare counted.
    """

    name: str
    steps: list[float]
    finished: int
    counts: Counter[str]

    @property
    def p99(self) -> float:
        """99th percentile of the steps, seconds."""
        ordered = sorted(self.steps)
        return ordered[int(0.99 * (len(ordered) - 1))]


class EvaluatorFaults:
    """Breaks evaluators."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._frozen: list[int] = []
        self._impostors: list[Any] = []

    def kill(self, restart: bool, only: int | None = None) -> None:
        """Kill actors; Ray restarts them, or they are gone until somebody makes them again."""
        import ray

        from cluster.evaluator_pool import actor_name

        for index in range(ACTORS) if only is None else [only]:
            try:
                actor = ray.get_actor(actor_name(index), self._namespace)
            except ValueError:
                continue  # gone already
            ray.kill(actor, no_restart=not restart)

    def freeze(self) -> None:
        """Stop the actors' processes: they take calls and never answer."""
        import psutil

        self._frozen = [p.pid for p in psutil.process_iter() if _is_evaluator(p)]
        for pid in self._frozen:
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on."""
        for pid in self._frozen:
            with contextlib.suppress(ProcessLookupError):  # Ray may have replaced it
                os.kill(pid, signal.SIGCONT)
        self._frozen = []

    def replace(self) -> None:
        """Put actors that answer nonsense in their place."""
        import ray

        from cluster.evaluator_pool import actor_name

        class Impostor:
            def evaluate(self, batch: object) -> object:
                return ["garbage", batch]

            def forget_histories(self, histories: object, request_ids: object) -> None:
                pass

        self.kill(restart=False)
        for index in range(ACTORS):
            options = ray.remote(Impostor).options(
                name=actor_name(index), namespace=self._namespace, num_cpus=0
            )
            self._impostors.append(_retry(options.remote))
        ray.get([impostor.evaluate.remote(None) for impostor in self._impostors])

    def restore(self) -> None:
        """Take them away again."""
        self._impostors.clear()
        self.kill(restart=False)


def main() -> None:
    """Run all phases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR", "RAY_memory_monitor_refresh_ms": "0",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }  # fmt: skip
    os.environ.pop("RAY_ADDRESS", None)
    import ray

    with tempfile.TemporaryDirectory(prefix="memshare-", dir="/tmp") as folder:
        ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        try:
            phases = _phases(options)
        finally:
            ray.shutdown()
    print(_table(phases))


def _phases(options: argparse.Namespace) -> list[tuple[Phase, Phase]]:
    """Pairs of (observe, with a fault)."""
    from vllm import LLM

    from memshare.plug_in import plug_in
    from memshare.small_model.names import resolve_model

    llm = LLM(
        resolve_model("smollm2-135m"), dtype="float32", max_model_len=2048, block_size=32,
        num_gpu_blocks_override=400, enforce_eager=True, seed=0, disable_log_stats=False,
        **plug_in(OPTIONS),
    )  # fmt: skip
    side = llm.llm_engine.engine_core.engine_core.scheduler.connector.scheduler_side
    pool = EvaluatorFaults("memshare")

    def run(name: str, share: bool, meddle: Callable[[int], None] = lambda step: None) -> Phase:
        side.reclaimer.enabled = share
        phase = _run(llm, side, name, options, meddle)
        slowest = sorted(enumerate(phase.steps, 3), key=lambda item: -item[1])[:4]
        shown = ", ".join(f"{1e3 * seconds:.0f} ms at {step}" for step, seconds in slowest)
        print(f"{name}: slowest {shown}; {dict(phase.counts)}", file=sys.stderr, flush=True)
        return phase

    def settle() -> None:
        side.reclaimer.enabled = False
        _run(llm, side, "settle", options, lambda step: None)

    settle()
    faults: dict[str, Callable[[int], None]] = {
        "nothing": lambda step: None,
        "an actor killed, three times": lambda step: (
            pool.kill(restart=True, only=step % ACTORS) if step % 90 == 45 else None
        ),
        "all actors stopped, twice": lambda step: (
            pool.kill(restart=False) if step in (10, 110) else None
        ),
        "all actors stopped, every 30 steps": lambda step: (
            pool.kill(restart=False) if step % 30 == 10 else None
        ),
        "all actors frozen, queues full": lambda step: pool.freeze() if step == 10 else None,
        "actors that answer garbage": lambda step: None,
        "nothing, after all that": lambda step: None,
    }
    pairs = []
    for _ in range(options.repeats):
        for name, meddle in faults.items():
            observe = run("observe", share=False)
            if "garbage" in name:
                pool.replace()
            pairs.append((observe, run(name, share=True, meddle=meddle)))
            pool.thaw()
            if "garbage" in name:
                pool.restore()
            time.sleep(3.0)  # for actors to start again
            settle()
    return pairs


def _run(
    llm: Any, side: Any, name: str, options: argparse.Namespace, meddle: Callable[[int], None]
) -> Phase:
    from vllm import SamplingParams

    engine = llm.llm_engine
    llm.reset_prefix_cache()
    before = Counter(side.recorder.counters.totals)
    params = SamplingParams(max_tokens=options.tokens, temperature=0, ignore_eos=True)
    for i in range(options.requests):
        prompt = f"Add 1 to {i} again and again. Write every step as its own paragraph."
        engine.add_request(f"{name}-{time.monotonic_ns()}", prompt, params)
    steps: list[float] = []
    finished = 0
    while engine.has_unfinished_requests():
        meddle(len(steps))
        start = time.perf_counter()
        outputs = engine.step()
        steps.append(time.perf_counter() - start)
        finished += sum(
            output.finished and len(output.outputs[0].token_ids) == options.tokens
            for output in outputs
        )
    after = Counter(side.recorder.counters.totals)
    wanted = ("steps", "verified", "applied", "steps_dropped:", "evaluator_faults:")
    counts = Counter({k: v for k, v in (after - before).items() if k.startswith(wanted)})
    return Phase(name, steps[2:], finished, counts)  # without prefill and first remaps


def _retry(make: Callable[[], Any]) -> Any:
    """A name is free only a moment after its actor was killed."""
    for _ in range(100):
        try:
            return make()
        except ValueError:
            time.sleep(0.05)
    return make()


def _is_evaluator(process: Any) -> bool:
    import psutil

    try:
        return "Evaluator" in " ".join(process.cmdline()) and "ray::" in process.cmdline()[0]
    except (psutil.Error, IndexError):
        return False


def _table(pairs: list[tuple[Phase, Phase]]) -> str:
    lines = [
        "| broken | median ms | p99 ms | p99 / observe | finished | remaps | counted |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(phase.name for _, phase in pairs):
        mine = [(observe, phase) for observe, phase in pairs if phase.name == name]
        steps = [step for _, phase in mine for step in phase.steps]
        ratios = [phase.p99 / observe.p99 for observe, phase in mine]
        counts: Counter[str] = sum((phase.counts for _, phase in mine), Counter())
        counted = ", ".join(f"{k} {v}" for k, v in sorted(counts.items()) if ":" in k)
        spread = f" ({min(ratios):.2f}-{max(ratios):.2f})" if len(ratios) > 1 else ""
        lines.append(
            f"| {name} | {1e3 * statistics.median(steps):.1f} | "
            f"{1e3 * statistics.median(p.p99 for _, p in mine):.1f} | "
            f"{statistics.median(ratios):.2f}{spread} | "
            f"{sum(p.finished for _, p in mine)} | {counts['applied']} | {counted or '-'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
