"""One workload on a simulated engine."""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from memshare.config import registry
from memshare.core.token_map import TokenMap
from memshare.lab.simulate.costs import (
    DoesNotFitError,
    Recomputation,
    StepCosts,
    work_of,
)
from memshare.lab.simulate.harness import SchedulerHarness
from memshare.lab.simulate.placed import PlacedCosts

# The smallest model that vLLM's configuration accepts: nothing of it is ever computed.
_MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 32000, "bos_token_id": 1,
    "eos_token_id": 2, "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "float32",
}  # fmt: skip


class SimulatedJob(NamedTuple):
    """One request.

    Attributes:
        arrival: seconds from the start.
        prompt: tokens.
        output: tokens that it generates.
        opportunity: fraction of its blocks that have something to stand in for them, measured; 1 if
            the policy takes any block.
    """

    arrival: float
    prompt: int
    output: int
    opportunity: float = 1.0


@dataclass(frozen=True, slots=True)
class PredictedEngine:
    """A simulated engine.

    Attributes:
        blocks: usable KV blocks.
        block_size: tokens.
        max_num_seqs: requests that may run at once.
        max_num_batched_tokens: tokens that a step may compute.
        costs: how long a step takes.
    """

    blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    costs: StepCosts | PlacedCosts


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a simulated run did. Seconds are simulated ones."""

    seconds: float
    steps: int
    tokens: int
    """Generated."""
    preemptions: int
    recomputed: int
    """Tokens computed more than once."""
    running: float
    """Mean requests in a step."""
    remaps: int
    """Or rounds of compaction."""

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens a second."""
        return self.tokens / self.seconds


def by_age(memshare: dict[str, Any]) -> dict[str, Any]:
    """MemShare's options, with victims by age, unless the policy drops tokens.

    Which blocks are alike is not known without a model. How many are is: a job's opportunity. What
    drops tokens always finds its budget, and its scheduler asks for nothing more.
    """
    policy: dict[str, Any] = memshare.get("policy", {})
    name = policy.get("name", registry.AUTO)
    if name != registry.AUTO and registry.mechanism_type(name).drops_tokens:
        return memshare
    return memshare | {"policy": {"name": "oldest"}}


def simulate(
    engine: PredictedEngine, jobs: Sequence[SimulatedJob], memshare: dict[str, Any] | None
) -> Prediction:
    """Run all jobs to their ends.

    Args:
        engine: where.
        jobs: in the order of their arrivals.
        memshare: MemShare's options; None is plain vLLM. See :func:`by_age`.

    Raises:
        DoesNotFitError: a job can never run, as its KV does not fit.
    """
    token_map = TokenMap(engine.block_size)
    most = max(token_map.entries(job.prompt + job.output) for job in jobs)
    if most > engine.blocks:
        raise DoesNotFitError(
            f"the longest request needs {most} KV blocks, and there are {engine.blocks}"
        )
    with tempfile.TemporaryDirectory(prefix="memshare-simulate-") as name:
        folder = Path(name)
        longest = max(job.prompt + job.output for job in jobs) + 1
        config = _MODEL | {"max_position_embeddings": longest}
        (folder / "config.json").write_text(json.dumps(config))
        harness = SchedulerHarness(
            folder, {"mode": "off"} if memshare is None else memshare, engine.blocks + 1,
            max_num_seqs=engine.max_num_seqs, block_size=engine.block_size,
            max_model_len=longest, max_num_batched_tokens=engine.max_num_batched_tokens,
        )  # fmt: skip
        try:
            return _run(harness, engine, jobs)
        finally:
            harness.close()


def _run(
    harness: SchedulerHarness, engine: PredictedEngine, jobs: Sequence[SimulatedJob]
) -> Prediction:
    draw = random.Random(0)
    seconds = 0.0
    steps = added = preemptions = requests = 0
    again = Recomputation()
    while added < len(jobs) or harness.scheduler.requests:
        if not harness.scheduler.requests:
            seconds = max(seconds, jobs[added].arrival)
        while added < len(jobs) and jobs[added].arrival <= seconds:
            job = jobs[added]
            prompt = [draw.randrange(3, 30000) for _ in range(job.prompt)]
            options = {"memshare_max_shared_fraction": job.opportunity}
            harness.add(str(added), prompt, job.output, extra_args=options)
            added += 1
        output = harness.scheduler.schedule()
        work = work_of(harness.scheduler, output)
        again.add_step(harness.scheduler, output)
        harness.finish_step(output)
        seconds += engine.costs.seconds(work)
        steps += 1
        requests += work.requests
        preemptions += len(output.preempted_req_ids or ())
    totals = harness.side.recorder.counters.totals if harness.side is not None else Counter[str]()
    return Prediction(
        seconds, steps, sum(job.output for job in jobs), preemptions, again.tokens,
        requests / steps, totals["applied"] + totals["compactions"],
    )  # fmt: skip
