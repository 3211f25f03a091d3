"""Replays recorded chains of thought through a vLLM engine in this process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from memshare.core.token_map import TokenMap
from memshare.lab.bench.arms import Arm
from memshare.lab.bench.progress import follow
from memshare.lab.replay.damage import COLUMNS, Damage
from memshare.lab.replay.forced import ForcedDecoding, Measurement, forced
from memshare.lab.replay.opportunity import Sighting
from memshare.plug_in import plug_in

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.llm_engine import LLMEngine

    from memshare.engine.scheduler_side import SchedulerSide
    from memshare.mechanisms.remap.scheduler import RemapPart

SETTLING = 4
"""Engine steps within which all remaps are done once they are allowed: a request's first one may
have to wait a step or two (``RequestTracker.must_wait``). What is compared comes after them."""


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """What is replayed, and how.

    Attributes:
        model: folder or hub id.
        dtype: of weights and cache.
        block_size: tokens.
        prompts: token ids, by trace.
        outputs: token ids that are written, ``prefix + continuation`` of each trace.
        prefix: output tokens before blocks are given up.
        recent: ``protect.recent_tokens``.
        folder: where distributions and measurements are kept.
    """

    model: str
    dtype: str
    block_size: int
    prompts: list[list[int]]
    outputs: list[list[int]]
    prefix: int
    recent: int
    folder: str

    @property
    def continuation(self) -> int:
        """Output tokens after the prefix."""
        return len(self.outputs[0]) - self.prefix

    def save(self, path: Path) -> None:
        """Write it for another process."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> ReplayPlan:
        """Read what :meth:`save` wrote."""
        return cls(**json.loads(path.read_text()))


def replay(plan: ReplayPlan, memshare: Mapping[str, object] | None, arm: str) -> list[float]:
    """Let the engine write all traces at once; blocks are given up at ``plan.prefix``.

    Args:
        plan: what is replayed.
        memshare: MemShare's options; None runs plain vLLM and keeps its distributions, with which
            later runs compare theirs.
        arm: names the files of measurements.

    Returns:
        Fraction of each request's blocks that was given up: of those that are full when the
        comparison begins.
    """
    engine = _start(plan, memshare)
    for i, (prompt, output) in enumerate(zip(plan.prompts, plan.outputs, strict=True)):
        count = len(output) - plan.prefix - SETTLING
        exact, measured = f"{plan.folder}/exact-{i}", f"{plan.folder}/{arm}-{i}"
        measurement = Measurement(
            plan.prefix + SETTLING, count, exact, None if memshare is None else measured
        )
        engine.add_request(str(i), {"prompt_token_ids": prompt}, forced(output, measurement))
    follow(engine)
    scheduler, side = _scheduler_of(engine)
    freed: dict[str, float] = {}
    while engine.has_unfinished_requests():
        lengths = (len(request.output_token_ids) for request in scheduler.requests.values())
        written = min(lengths, default=plan.prefix)  # by every request
        if side is not None:
            side.reclaimer.enabled = plan.prefix <= written < plan.prefix + SETTLING
            if written <= plan.prefix + SETTLING:
                # Later the continuation fills blocks as well, of which none is given up.
                freed |= {s.request_id: s.lost / max(s.full, 1) for s in side.tracker}
        engine.step()
    return list(freed.values()) or [0.0] * len(plan.prompts)


def observe(plan: ReplayPlan) -> list[Sighting]:
    """Let the engine write the prefixes of all texts, and look at what could be given up.

    Returns:
        What was seen, text by text.
    """
    options = {
        "mode": "observe",
        "policy": {"name": "twins"},
        "protect": {"recent_tokens": plan.recent},
    }
    engine = _start(plan, options)
    for i, (prompt, output) in enumerate(zip(plan.prompts, plan.outputs, strict=True)):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, forced(output[: plan.prefix]))
    follow(engine)
    _, side = _scheduler_of(engine)
    assert side is not None, "an engine with MemShare has one"
    found: dict[str, Sighting] = {}
    while engine.has_unfinished_requests():
        for state in side.tracker:
            # Its last steps: what has been written before has been compared by then.
            if len(state.request.output_token_ids) >= plan.prefix - 2:
                view = cast("RemapPart", side.part).view(state)
                coverage = view.coverage[view.first : view.end].tolist()
                found[state.request_id] = Sighting(view.full, coverage)
        engine.step()
    if len(found) < len(plan.prompts):
        raise RuntimeError(f"only {len(found)} of {len(plan.prompts)} texts were seen")
    return list(found.values())


def _start(plan: ReplayPlan, memshare: Mapping[str, object] | None) -> LLMEngine:
    from vllm import LLM

    longest = max(len(p) + len(o) for p, o in zip(plan.prompts, plan.outputs, strict=True)) + 1
    blocks = (TokenMap(plan.block_size).full(longest) + 2) * len(plan.prompts) + 1
    llm = LLM(
        plan.model,
        dtype=plan.dtype,  # type: ignore[arg-type]
        max_model_len=longest,
        max_num_seqs=len(plan.prompts),
        # All prompts in one step: from then on all texts are equally long.
        max_num_batched_tokens=max(2048, longest, sum(map(len, plan.prompts))),
        block_size=plan.block_size,
        num_gpu_blocks_override=blocks,
        enforce_eager=True,
        seed=0,
        logits_processors=[ForcedDecoding],
        **plug_in(memshare),
    )
    return llm.llm_engine


def _scheduler_of(engine: Any) -> tuple[Scheduler, SchedulerSide | None]:
    scheduler = engine.engine_core.engine_core.scheduler
    return scheduler, getattr(scheduler.connector, "scheduler_side", None)


def measurements(plan: ReplayPlan, arm: str) -> Sequence[npt.NDArray[np.float32]]:
    """``[tokens, len(COLUMNS)]`` float32 of each trace."""
    return [
        np.fromfile(f"{plan.folder}/{arm}-{i}", np.float32).reshape(-1, len(COLUMNS))
        for i in range(len(plan.prompts))
    ]


def run_arm(argument: dict[str, Any]) -> dict[str, Any]:
    """Run one arm of a plan in this process (see :mod:`memshare.lab.bench.child`)."""
    plan, arm = ReplayPlan.load(Path(argument["plan"])), Arm(**argument["arm"])
    freed = replay(plan, arm.memshare, arm.name)
    cells: list[tuple[float, float]] = []
    if arm.memshare is not None:
        damage = Damage.of(measurements(plan, arm.name))
        cells = [damage.kl, damage.late_kl, damage.delta_nll, damage.same_top]
    return {"freed": sum(freed) / len(freed), "cells": cells}


def observe_plan(argument: dict[str, Any]) -> list[Sighting]:
    """Observe a plan in this process (see :mod:`memshare.lab.bench.child`)."""
    return observe(ReplayPlan.load(Path(argument["plan"])))
