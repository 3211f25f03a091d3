"""Stage one in the engine's process, or on a pool of evaluators: what it costs, how it lags.

Stand-ins for replicas feed recorded texts to the real bridge, source and evaluators, at the rate
of a real engine. Each is a process with a loop like an engine's: in every step all requests get a
token, and the engine's thread computes for ``--work-ms`` in Python, as a scheduler does. How much
longer that takes with stage one beside it is what stage one costs the engine; the rest is counted
in CPU time.

    python -m tools.bench.evaluators --traces FOLDER
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from memshare.config import MemShareConfig, load_config
from memshare.lab.markdown import table_head, table_row
from memshare.lab.replay.traces import load_traces
from memshare.search.bridge import EvaluatorBridge
from memshare.search.evaluate import EvaluatorError, NewSteps, open_source
from memshare.small_model.names import resolve_model

ROOT = Path(__file__).resolve().parents[2]

Steps = list[list[int]]  # token ids of the steps of one text
HEADS = [
    "stage one", "steps/s", "engine's thread p50 / p99, ms", "lag p50 / p99, ms",
    "lost", "CPU of a replica for it", "CPU of all evaluators", "their memory, MB",
]  # fmt: skip


@dataclass(frozen=True)
class Pace:
    """How one replica runs.

    Attributes:
        requests: at once.
        step_s: from one token of all requests to the next.
        work_s: of it, Python on the engine's thread.
        seconds: of the run.
    """

    requests: int
    step_s: float
    work_s: float
    seconds: float


@dataclass
class ReplicaLags:
    """What one replica saw.

    Attributes:
        steps: sent to stage one.
        lost: of them, those without an answer.
        work: seconds that the engine's thread took for ``work_s`` of computing, each engine step.
        lags: seconds from a step to its answer.
        cpu_s: CPU time of the process, without that of the work.
    """

    steps: int = 0
    lost: int = 0
    work: list[float] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)
    cpu_s: float = 0.0


@dataclass
class StageOneArm:
    """A way of stage one, and what was seen of it.

    Attributes:
        config: None has no stage one.
        evaluators: processes of the pool.
        reports: of all replicas and rounds.
        pool_cpu_s: CPU seconds of the evaluators.
    """

    config: MemShareConfig | None
    evaluators: list[psutil.Process] = field(default_factory=list)
    reports: list[ReplicaLags] = field(default_factory=list)
    pool_cpu_s: float = 0.0


def replica(
    number: int, config: MemShareConfig | None, texts: list[Steps], pace: Pace, ready: Any, out: Any
) -> None:
    """One stand-in, in a process of its own. Without ``config`` there is no stage one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, and ends them all
    bridge = None
    if config is not None:
        bridge = EvaluatorBridge(lambda: open_source(config), config.evaluator.queue_size)
        _wait_for_the_first_answer(bridge)
    streams = [
        _StepStream(f"r{i}", texts[(number + i) % len(texts)], i) for i in range(pace.requests)
    ]
    unit_s = _unit_s()
    ready.wait()
    report = ReplicaLags()
    cpu_began, next_step = time.process_time(), time.monotonic()
    end = next_step + pace.seconds
    while time.monotonic() < end:
        new = [steps for stream in streams if (steps := stream.token()) is not None]
        if bridge is not None:
            for steps in new:
                report.steps += 1
                report.lost += not bridge.submit([steps])
            for answer in bridge.drain():
                if isinstance(answer, EvaluatorError):
                    report.lost += 1
                else:
                    report.lags.append(time.monotonic() - answer.sent_at)
        for stream in streams:
            if stream.ended:
                if bridge is not None:
                    bridge.forget_request(stream.request_id, stream.request_id)
                stream.again()
        began = time.perf_counter()
        _compute(round(pace.work_s / unit_s))
        report.work.append(time.perf_counter() - began)
        next_step += pace.step_s
        time.sleep(max(0.0, next_step - time.monotonic()))
    report.cpu_s = time.process_time() - cpu_began - len(report.work) * pace.work_s
    out.put(report)
    if bridge is not None:
        bridge.close()


def _wait_for_the_first_answer(bridge: EvaluatorBridge) -> None:
    """To join a Ray cluster takes seconds, which say nothing about what comes later."""
    bridge.submit([NewSteps("first", 0, "first", 0, [1], (0, 1), 0.9, time.monotonic())])
    while not bridge.drain():
        time.sleep(0.01)
    bridge.forget_request("first", "first")


class _StepStream:
    """A request that writes a recorded text, a token at a time, over and over."""

    def __init__(self, request_id: str, text: Steps, offset: int) -> None:
        self._name = request_id
        self._text = text
        self._runs = 0
        self._step = offset % len(text)  # requests are at different places
        self._token = 0
        self._position = 0

    @property
    def request_id(self) -> str:
        return f"{self._name}-{self._runs}"

    @property
    def ended(self) -> bool:
        return self._step == len(self._text)

    def again(self) -> None:
        """The next request with the same text."""
        self._runs += 1
        self._step = self._token = self._position = 0

    def token(self) -> NewSteps | None:
        """Write one; the step that it finishes, if it does."""
        step = self._text[self._step]
        self._token += 1
        if self._token < len(step):
            return None
        key, start = self.request_id, self._position
        self._step, self._token, self._position = self._step + 1, 0, start + len(step)
        return NewSteps(key, 0, key, start, step, (0, len(step)), 0.9, time.monotonic())


def _compute(units: int) -> int:
    total = 0
    for i in range(units):
        total += i * i % 7
    return total


def _unit_s() -> float:
    """CPU seconds of one unit of :func:`_compute`."""
    _compute(100_000)
    began = time.process_time()
    _compute(1_000_000)
    return (time.process_time() - began) / 1_000_000


def run(
    config: MemShareConfig | None, replicas: int, texts: list[Steps], pace: Pace
) -> list[ReplicaLags]:
    """All replicas at once."""
    context = multiprocessing.get_context("spawn")
    ready, out = context.Barrier(replicas + 1), context.Queue()
    processes = [
        context.Process(target=replica, args=(i, config, texts, pace, ready, out), daemon=True)
        for i in range(replicas)
    ]
    for process in processes:
        process.start()
    ready.wait(timeout=120)
    reports = [out.get(timeout=pace.seconds + 30) for _ in processes]
    for process in processes:
        process.join(timeout=30)
    return reports


class EvaluatorCluster:
    """A Ray cluster with a pool of evaluators."""

    def __init__(self) -> None:
        os.environ |= {"RAY_memory_monitor_refresh_ms": "0", "PYTHONPATH": str(ROOT)}
        os.environ.pop("RAY_ADDRESS", None)
        import ray

        self._folder = tempfile.TemporaryDirectory(prefix="memshare-", dir="/tmp")
        ray.init(
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=self._folder.name,
        )
        self._address = ray.get_runtime_context().gcs_address
        self._made: list[Any] = []

    def make(self, policy: str, actors: int) -> tuple[MemShareConfig, list[psutil.Process]]:
        """Make so many evaluators; the configuration that finds them, and their processes."""
        import ray

        from cluster.evaluator_pool import ActorDirectory

        config = _config(
            policy, source="ray", actors=actors, address=self._address, namespace=f"bench{actors}"
        )
        directory = ActorDirectory(config)
        made = [directory.find(index) for index in range(actors)]
        self._made += made
        pids = ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in made])
        return config, [psutil.Process(pid) for pid in pids]

    def end(self) -> None:
        """Stop Ray."""
        import ray

        self._made = []
        ray.shutdown()
        self._folder.cleanup()


def _config(policy: str, **evaluator: object) -> MemShareConfig:
    return load_config({"policy": {"name": policy}, "evaluator": evaluator}, {})


def tokenized(folder: Path, model: str) -> list[Steps]:
    """Every recorded text as steps, cut at blank lines."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(model))
    return [
        [
            tokenizer.encode(f"{step}\n\n", add_special_tokens=False)
            for step in trace.reasoning.split("\n\n")
            if step.strip()
        ]
        for trace in load_traces(folder)
    ]


def main() -> None:
    """Run all arms and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, required=True, help="see `memshare replay`")
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--requests", type=int, default=32, help="of each replica")
    parser.add_argument("--step-ms", type=float, default=100.0, help="of one token of all requests")
    parser.add_argument("--work-ms", type=float, default=3.0, help="Python in each, of the engine")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each arm and round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--evaluators", default="1,2,4", help="sizes of the pool; may be empty")
    parser.add_argument("--policy", choices=["twins", "paper"], default="twins")
    options = parser.parse_args()
    texts = tokenized(options.traces, options.model)
    pace = Pace(options.requests, options.step_ms / 1e3, options.work_ms / 1e3, options.seconds)
    tokens = options.replicas * pace.requests / pace.step_s
    print(f"{options.replicas} replicas, {tokens:,.0f} tokens/s together, {options.policy}\n")
    sizes = [int(size) for size in options.evaluators.split(",") if size]
    arms: dict[str, StageOneArm] = {
        "none": StageOneArm(None),
        "in process": StageOneArm(_config(options.policy)),
    }
    pool = EvaluatorCluster() if sizes else None
    try:
        for size in sizes:
            assert pool is not None
            arms[f"{size} evaluators"] = StageOneArm(*pool.make(options.policy, size))
        for _ in range(options.rounds):  # in alternation: the machine changes
            for arm in arms.values():
                before = _cpu_s(arm.evaluators)
                arm.reports += run(arm.config, options.replicas, texts, pace)
                arm.pool_cpu_s += _cpu_s(arm.evaluators) - before
        print(table_head(HEADS))
        for name, arm in arms.items():
            print(table_row(_cells(name, arm, arms["none"], pace, options.rounds)))
    finally:
        if pool is not None:
            pool.end()


def _cells(name: str, arm: StageOneArm, without: StageOneArm, pace: Pace, rounds: int) -> list[str]:
    reports, seconds = arm.reports, rounds * pace.seconds
    work = [value for report in reports for value in report.work]
    lags = [value for report in reports for value in report.lags]
    steps = sum(report.steps for report in reports)
    lost = sum(report.lost for report in reports)
    cpu = (_mean_cpu_s(reports) - _mean_cpu_s(without.reports)) / pace.seconds
    memory = sum(process.memory_info().rss for process in arm.evaluators) / 2**20
    return [
        name,
        f"{steps / seconds:.0f}",
        f"{_ms(work, 0.5)} / {_ms(work, 0.99)}",
        f"{_ms(lags, 0.5)} / {_ms(lags, 0.99)}" if lags else "-",
        f"{lost / steps:.1%}" if steps else "-",
        f"{cpu:.1%}",
        f"{arm.pool_cpu_s / seconds:.1%}" if arm.evaluators else "-",
        f"{memory:.0f}" if arm.evaluators else "-",
    ]


def _mean_cpu_s(reports: Sequence[ReplicaLags]) -> float:
    return sum(report.cpu_s for report in reports) / len(reports)


def _cpu_s(processes: Sequence[psutil.Process]) -> float:
    return float(sum(sum(process.cpu_times()[:2]) for process in processes))


def _ms(values: Sequence[float], quantile: float) -> str:
    ordered = sorted(values)
    return f"{1e3 * ordered[int(quantile * (len(ordered) - 1))]:.1f}"


if __name__ == "__main__":
    main()
