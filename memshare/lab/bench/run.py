"""One engine, one workload: run it, and measure it step by step."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memshare.lab.bench.arms import Arm
from memshare.lab.bench.block_outcomes import BlockOutcome, count_outcomes
from memshare.lab.bench.models import load_format
from memshare.lab.bench.progress import follow
from memshare.lab.bench.records import ArmRun, BenchPlan, StepMeasurement, TaskOutcome
from memshare.lab.bench.workloads import Task
from memshare.lab.problems import read_answer
from memshare.lab.simulate.costs import Recomputation, StepWork, work_of
from memshare.mechanisms.remap.scheduler import RemapPart
from memshare.mechanisms.remap.view import TableView

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

    from memshare.core.interfaces import EngineRequest
    from memshare.engine.scheduler_side import SchedulerSide
    from memshare.engine.usage import ReturnedUsage


def run_arm(argument: dict[str, Any]) -> dict[str, Any]:
    """Run one arm of a plan in this process (see :mod:`memshare.lab.bench.engine_process`)."""
    plan = BenchPlan.load(Path(argument["plan"]))
    return dataclasses.asdict(measure(plan, Arm(**argument["arm"])))


def measure(plan: BenchPlan, arm: Arm) -> ArmRun:
    """Start an engine, let it do all tasks at once, and measure it."""
    llm = _start(plan, arm)
    watch = _Watch(llm)
    expected = [task.expected for task in plan.tasks if task.expected is not None]
    follow(llm.llm_engine, round(statistics.fmean(expected)) if expected else None)
    cpu, start = time.process_time(), time.perf_counter()
    for i, task in enumerate(plan.tasks):
        prompt: Any = {"prompt_token_ids": task.prompt}
        llm.llm_engine.add_request(str(i), prompt, _sampling(task))
    while llm.llm_engine.has_unfinished_requests():
        watch.step(start)
    seconds, cpu = watch.step_log[-1].seconds, time.process_time() - cpu
    return watch.run(plan, arm.name, seconds, cpu)


def _start(plan: BenchPlan, arm: Arm) -> LLM:
    from vllm import LLM, SamplingParams

    from memshare.lab.replay.forced import ForcedDecoding
    from memshare.plug_in import plug_in

    forced = any(task.forced for task in plan.tasks)
    llm = LLM(
        plan.model,
        dtype=plan.dtype,  # type: ignore[arg-type]
        kv_cache_dtype=arm.kv_dtype,
        watermark=arm.watermark,
        load_format=load_format(plan.model),
        max_model_len=plan.max_model_len,
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        block_size=plan.block_size,
        num_gpu_blocks_override=arm.blocks(plan.blocks, plan.dtype),
        tensor_parallel_size=plan.tensor_parallel_size,
        enforce_eager=plan.eager,
        seed=0,
        logits_processors=[ForcedDecoding] if forced else None,
        **plug_in(arm.memshare),
    )
    first: Any = {"prompt_token_ids": plan.tasks[0].prompt}
    llm.generate([first], SamplingParams(max_tokens=4), use_tqdm=False)  # warm up
    llm.reset_prefix_cache()
    return llm


def _sampling(task: Task) -> SamplingParams:
    from vllm import SamplingParams

    from memshare.lab.replay.forced import forced

    if task.forced is not None:
        return forced(task.forced)
    return SamplingParams(max_tokens=task.max_tokens, temperature=0, ignore_eos=not task.ends)


class _Watch:
    """Steps an engine and writes down what happened in every step."""

    def __init__(self, llm: LLM) -> None:
        self._engine = llm.llm_engine
        core: Any = self._engine.engine_core
        self._scheduler: Any = core.engine_core.scheduler
        self._side: SchedulerSide | None = getattr(
            self._scheduler.connector, "scheduler_side", None
        )
        self._schedule: Callable[..., Any] = self._scheduler.schedule
        self._scheduler.schedule = self._watched
        self._work = StepWork(0, 0, 0)
        self._again = Recomputation()
        self._preemptions = 0
        self._repointed: dict[str, float] = {}
        self._block_outcomes: Counter[BlockOutcome] = Counter()
        if self._side is not None:
            self._watch_ends(self._side)
        self._arrivals: dict[str, list[float]] = {}
        self._texts: dict[str, tuple[str, int]] = {}
        self.step_log: list[StepMeasurement] = []

    def _watched(self, *args: Any) -> Any:
        output = self._schedule(*args)
        self._work = work_of(self._scheduler, output)
        self._again.add_step(self._scheduler, output)
        self._preemptions += len(output.preempted_req_ids or ())
        return output

    def _watch_ends(self, side: SchedulerSide) -> None:
        finish = side.finish

        def watched(request: EngineRequest) -> ReturnedUsage | None:
            self._note_end(side, request.request_id)
            return finish(request)

        side.finish = watched  # type: ignore[method-assign]

    def _note_end(self, side: SchedulerSide, request_id: str) -> None:
        state = side.tracker.get(request_id)
        if state is not None and side.tables.table(request_id) is not None:
            self._repointed[request_id] = state.lost / max(state.full, 1)
            part = side.part
            if isinstance(part, RemapPart):
                view = part.view(state)
                self._block_outcomes += count_outcomes(view, partial(part.objection, state, view))
            else:  # compaction objects to nothing that may go
                view = TableView(side.tracker, side.tables, state)
                self._block_outcomes += count_outcomes(view, lambda _: None)

    def step(self, start: float) -> None:
        """One engine step."""
        outputs: list[Any] = self._engine.step()
        now = time.perf_counter() - start
        for output in outputs:
            generated = output.outputs[0]
            arrivals = self._arrivals.setdefault(output.request_id, [])
            arrivals += [now] * (len(generated.token_ids) - len(arrivals))
            if output.finished:
                self._texts[output.request_id] = (generated.text, len(generated.token_ids))
        pool = self._scheduler.kv_cache_manager.block_pool
        self.step_log.append(
            StepMeasurement(
                round(now, 4),
                *self._work,
                pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
                len(self._scheduler.waiting),
                self._preemptions,
                self._total("applied") + self._total("compactions"),
            )
        )

    def run(self, plan: BenchPlan, arm: str, seconds: float, cpu_seconds: float) -> ArmRun:
        """All that was seen."""
        tasks = {str(i): task for i, task in enumerate(plan.tasks)}
        outcomes = [
            TaskOutcome(
                task.group,
                self._texts[name][1],
                None if task.answer is None else read_answer(self._texts[name][0]) == task.answer,
                round(self._repointed_of(name), 4),
                task.ends and self._texts[name][1] >= task.max_tokens,
            )
            for name, task in tasks.items()
        ]
        generated = sum(outcome.tokens for outcome in outcomes)
        gaps = [
            later - earlier
            for arrivals in self._arrivals.values()
            for earlier, later in pairwise(arrivals)
        ]
        side = self._side
        return ArmRun(
            arm=arm,
            blocks=self._scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1,
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            steps=len(self.step_log),
            tokens=generated,
            preemptions=self._preemptions,
            recomputed=self._again.tokens,
            running=statistics.fmean(step.requests for step in self.step_log),
            peak=max(step.requests for step in self.step_log),
            remaps=self._total("applied") + self._total("compactions"),
            reclaimed=self._total("blocks_reclaimed"),
            first_token=_percentiles([arrivals[0] for arrivals in self._arrivals.values()]),
            between_tokens=_percentiles(gaps),
            outcomes=outcomes,
            block_outcomes={str(name): count for name, count in self._block_outcomes.items()},
            timeline=self.step_log,
            packing_seconds=0.0 if side is None else side.recorder.counters.packing_seconds,
        )

    def _repointed_of(self, name: str) -> float:
        # vLLM may add a suffix of its own to a request's name.
        return next((v for k, v in self._repointed.items() if k.split("-")[0] == name), 0.0)

    def _total(self, name: str) -> int:
        return 0 if self._side is None else int(self._side.recorder.counters.totals.get(name, 0))


def _percentiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return (values[0], values[0]) if values else (0.0, 0.0)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return round(cuts[49], 4), round(cuts[98], 4)
