"""A comparison's plan, and what its runs measured: in memory, and on disk as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from memshare.errors import UserError
from memshare.lab.bench.arms import Arm
from memshare.lab.bench.workloads import Task


@dataclass(frozen=True, slots=True)
class BenchPlan:
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
    def load(cls, path: Path) -> BenchPlan:
        """Read what :meth:`save` wrote."""
        found = json.loads(path.read_text())
        return cls(**found | {"tasks": [Task(*task) for task in found["tasks"]]})


class StepMeasurement(NamedTuple):
    """One engine step.

    Attributes:
        seconds: since the start, when the step was done.
        requests: that it computed tokens for.
        tokens: that it computed.
        context: tokens whose KV it read.
        used: KV blocks in use.
        waiting: requests that wait.
        preemptions: so far.
        remaps: so far, or rounds of compaction.
    """

    seconds: float
    requests: int
    tokens: int
    context: int
    used: int
    waiting: int
    preemptions: int
    remaps: int


class TaskOutcome(NamedTuple):
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
class ArmRun:
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
    outcomes: list[TaskOutcome]
    block_outcomes: dict[str, int]
    """What became of the blocks of all requests, by
    :data:`memshare.lab.bench.block_outcomes.BlockOutcome`; empty for plain vLLM."""
    timeline: list[StepMeasurement]
    packing_seconds: float = 0.0
    """That compaction took to choose and move tokens."""

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens a second."""
        return self.tokens / self.seconds

    @property
    def tokens_per_step(self) -> float:
        """Generated tokens an engine step."""
        return self.tokens / self.steps

    @classmethod
    def of(cls, found: dict[str, Any]) -> ArmRun:
        """Read one back from JSON."""
        return cls(
            **found
            | {
                "outcomes": [TaskOutcome(*outcome) for outcome in found["outcomes"]],
                "timeline": [StepMeasurement(*step) for step in found["timeline"]],
                "first_token": tuple(found["first_token"]),
                "between_tokens": tuple(found["between_tokens"]),
            }
        )


@dataclass(frozen=True, slots=True)
class BenchRecord:
    """A comparison on disk.

    Attributes:
        block_size: tokens; ``max_num_seqs`` and ``max_num_batched_tokens`` as in
            :class:`BenchPlan`.
        prompts: tokens of each task's prompt.
        arms: MemShare's options by arm; None is plain vLLM.
        repeats: the runs of each repeat.
    """

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    prompts: list[int]
    arms: dict[str, dict[str, Any] | None]
    repeats: list[list[ArmRun]]

    @classmethod
    def of(cls, plan: BenchPlan, arms: Sequence[Arm], repeats: list[list[ArmRun]]) -> BenchRecord:
        """Put together what is kept."""
        return cls(
            plan.block_size,
            plan.max_num_seqs,
            plan.max_num_batched_tokens,
            [len(task.prompt) for task in plan.tasks],
            {arm.name: arm.memshare for arm in arms},
            repeats,
        )

    @classmethod
    def together(cls, pieces: Sequence[BenchRecord]) -> BenchRecord:
        """One record of several, each of which measured other arms with the same requests.

        Counts of engine steps compare between pieces, times do not: what else ran on the machine
        was something else.

        Raises:
            UserError: their requests differ, or an arm is in two of them.
        """
        first, *others = pieces
        arms, repeats = dict(first.arms), [list(runs) for runs in first.repeats]
        for piece in others:
            if dataclasses.replace(piece, arms=first.arms, repeats=first.repeats) != first:
                raise UserError("the records are of different requests; draw them one by one")
            if twice := arms.keys() & piece.arms.keys():
                raise UserError(f"two records have the arm {sorted(twice)[0]!r}; leave one out")
            arms |= piece.arms
            repeats += [[] for _ in piece.repeats[len(repeats) :]]
            for whole, runs in zip(repeats, piece.repeats, strict=False):
                whole.extend(runs)
        return dataclasses.replace(first, arms=arms, repeats=repeats)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self)))

    @property
    def runs(self) -> dict[str, list[ArmRun]]:
        """All runs by arm, without arms that have none: a comparison may have been stopped."""
        found = {
            arm: [run for repeat in self.repeats for run in repeat if run.arm == arm]
            for arm in self.arms
        }
        return {arm: runs for arm, runs in found.items() if runs}

    def ratios(
        self, base: str, work: Callable[[ArmRun], float] = lambda run: run.tokens_per_second
    ) -> dict[str, list[float]]:
        """Work of each arm, tokens a second if nothing else is asked for, ``base`` = 1, in every
        repeat in which both have run."""
        found: dict[str, list[float]] = {}
        for repeat in self.repeats:
            speeds = {run.arm: work(run) for run in repeat}
            if base in speeds:
                for arm, speed in speeds.items():
                    found.setdefault(arm, []).append(speed / speeds[base])
        return found

    @classmethod
    def load(cls, path: Path) -> BenchRecord:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: the file is something else.
        """
        try:
            found = json.loads(path.read_text())
            repeats = [[ArmRun.of(run) for run in runs] for runs in found["repeats"]]
            return cls(**found | {"repeats": repeats})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is no record of `memshare bench --json`: {error!r}") from None
