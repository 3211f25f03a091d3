"""One engine, one workload: run it, and measure it step by step."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from memshare.errors import UserError
from memshare.lab.bench.arms import Arm
from memshare.lab.bench.fates import Fate, fates
from memshare.lab.bench.models import load_format
from memshare.lab.bench.progress import follow
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


@dataclass(frozen=True, slots=True)
class Plan:
    """What every arm runs.

    Attributes:
        model: as ``memshare.lab.bench.models.resolve`` takes it.
        dtype: of weights and, but for an arm that says otherwise, of the cache.
        block_size: tokens.
        blocks: KV blocks of ``dtype``, vLLM's null block included. An arm with a narrower cache has
            as many bytes, so more blocks.
        max_model_len: tokens.
        max_num_seqs: requests that may run at once.
        max_num_batched_tokens: tokens that a step may compute.
        tasks: the work, all of it asked for at once.
        tensor_parallel_size: ranks.
        eager: vLLM's ``enforce_eager``: starts at once, and nothing is compiled.
    """

    model: str
    dtype: str
    block_size: int
    blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    tasks: list[Task]
    tensor_parallel_size: int = 1
    eager: bool = True

    def save(self, path: Path) -> None:
        """Write it for another process."""
        path.write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read what :meth:`save` wrote."""
        found = json.loads(path.read_text())
        return cls(**found | {"tasks": [Task(*task) for task in found["tasks"]]})


class Moment(NamedTuple):
    """One engine step.

    Attributes:
        seconds: since the start, when the step was done.
        requests: that it computed tokens for.
        tokens: that it computed.
        context: tokens whose KV it read.
        used: KV blocks in use.
        waiting: requests that wait.
        preemptions: so far.
        remaps: so far.
    """

    seconds: float
    requests: int
    tokens: int
    context: int
    used: int
    waiting: int
    preemptions: int
    remaps: int


class Outcome(NamedTuple):
    """What became of one task.

    Attributes:
        group: the task's.
        tokens: that it generated.
        right: whether the final answer was right; None if it has none.
        repointed: fraction of its blocks that were re-pointed when it ended.
        cut: whether the limit of tokens ended it, and not the model.
    """

    group: str
    tokens: int
    right: bool | None
    repointed: float
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """What one run measured. Seconds are of wall-clock time unless they say otherwise."""

    arm: str
    blocks: int
    """Usable KV blocks of its engine: of a narrower cache there are more in as many bytes."""
    seconds: float
    cpu_seconds: float
    steps: int
    tokens: int
    """Generated."""
    preemptions: int
    recomputed: int
    """Tokens computed more than once."""
    running: float
    """Mean requests in a step; ``peak`` is the most."""
    peak: int
    remaps: int
    reclaimed: int
    """Blocks that remaps freed."""
    first_token: tuple[float, float]
    """Seconds from the start to a request's first token, median and 99th percentile."""
    between_tokens: tuple[float, float]
    """Seconds between two tokens of a request, median and 99th percentile."""
    outcomes: list[Outcome]
    fates: dict[str, int]
    """Blocks of all requests when they ended, by :data:`memshare.lab.bench.fates.Fate`; empty for
    plain vLLM."""
    timeline: list[Moment]

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens a second."""
        return self.tokens / self.seconds

    @property
    def tokens_per_step(self) -> float:
        """Generated tokens an engine step."""
        return self.tokens / self.steps

    @classmethod
    def of(cls, found: dict[str, Any]) -> Run:
        """Read one back from JSON."""
        return cls(
            **found
            | {
                "outcomes": [Outcome(*outcome) for outcome in found["outcomes"]],
                "timeline": [Moment(*moment) for moment in found["timeline"]],
                "first_token": tuple(found["first_token"]),
                "between_tokens": tuple(found["between_tokens"]),
            }
        )


@dataclass(frozen=True, slots=True)
class Record:
    """A comparison on disk.

    Attributes:
        block_size: tokens; ``max_num_seqs`` and ``max_num_batched_tokens`` as in :class:`Plan`.
        prompts: tokens of each task's prompt.
        arms: MemShare's options by arm; None is plain vLLM.
        repeats: the runs of each repeat.
    """

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    prompts: list[int]
    arms: dict[str, dict[str, Any] | None]
    repeats: list[list[Run]]

    @classmethod
    def of(cls, plan: Plan, arms: Sequence[Arm], repeats: list[list[Run]]) -> Record:
        """Put together what is kept."""
        return cls(
            plan.block_size,
            plan.max_num_seqs,
            plan.max_num_batched_tokens,
            [len(task.prompt) for task in plan.tasks],
            {arm.name: arm.memshare for arm in arms},
            repeats,
        )

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self)))

    @property
    def runs(self) -> dict[str, list[Run]]:
        """All runs by arm, without arms that have none: a comparison may have been stopped."""
        found = {
            arm: [run for repeat in self.repeats for run in repeat if run.arm == arm]
            for arm in self.arms
        }
        return {arm: runs for arm, runs in found.items() if runs}

    def ratios(self, base: str) -> dict[str, list[float]]:
        """Tokens a second of each arm, ``base`` = 1, in every repeat in which both have run."""
        found: dict[str, list[float]] = {}
        for repeat in self.repeats:
            speeds = {run.arm: run.tokens_per_second for run in repeat}
            if base in speeds:
                for arm, speed in speeds.items():
                    found.setdefault(arm, []).append(speed / speeds[base])
        return found

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: the file is something else.
        """
        try:
            found = json.loads(path.read_text())
            repeats = [[Run.of(run) for run in runs] for runs in found["repeats"]]
            return cls(**found | {"repeats": repeats})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is no record of `memshare bench --json`: {error!r}") from None


def run_arm(argument: dict[str, Any]) -> dict[str, Any]:
    """Run one arm of a plan in this process (see :mod:`memshare.lab.bench.child`)."""
    plan = Plan.load(Path(argument["plan"]))
    return dataclasses.asdict(measure(plan, Arm(**argument["arm"])))


def measure(plan: Plan, arm: Arm) -> Run:
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
    seconds, cpu = watch.moments[-1].seconds, time.process_time() - cpu
    return watch.run(plan, arm.name, seconds, cpu)


def _start(plan: Plan, arm: Arm) -> LLM:
    from vllm import LLM, SamplingParams

    from memshare.lab.replay.forced import ForcedDecoding
    from memshare.plug_in import plug_in

    forced = any(task.forced for task in plan.tasks)
    llm = LLM(
        plan.model,
        dtype=plan.dtype,  # type: ignore[arg-type]
        kv_cache_dtype=arm.kv_dtype,
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
        self._fates: Counter[Fate] = Counter()
        if self._side is not None:
            self._watch_ends(self._side)
        self._arrivals: dict[str, list[float]] = {}
        self._texts: dict[str, tuple[str, int]] = {}
        self.moments: list[Moment] = []

    def _watched(self, *args: Any) -> Any:
        output = self._schedule(*args)
        self._work = work_of(self._scheduler, output)
        self._again.add(self._scheduler, output)
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
                self._fates += fates(view, partial(part.objection, state, view))
            else:  # compaction objects to nothing that may go
                self._fates += fates(TableView(side.tracker, side.tables, state), lambda _: None)

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
        self.moments.append(
            Moment(
                round(now, 4),
                *self._work,
                pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
                len(self._scheduler.waiting),
                self._preemptions,
                self._total("applied"),
            )
        )

    def run(self, plan: Plan, arm: str, seconds: float, cpu_seconds: float) -> Run:
        """All that was seen."""
        tasks = {str(i): task for i, task in enumerate(plan.tasks)}
        outcomes = [
            Outcome(
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
        return Run(
            arm=arm,
            blocks=self._scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1,
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            steps=len(self.moments),
            tokens=generated,
            preemptions=self._preemptions,
            recomputed=self._again.tokens,
            running=statistics.fmean(moment.requests for moment in self.moments),
            peak=max(moment.requests for moment in self.moments),
            remaps=self._total("applied") + self._total("compactions"),
            reclaimed=self._total("blocks_reclaimed"),
            first_token=_percentiles([arrivals[0] for arrivals in self._arrivals.values()]),
            between_tokens=_percentiles(gaps),
            outcomes=outcomes,
            fates={str(fate): count for fate, count in self._fates.items()},
            timeline=self.moments,
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
