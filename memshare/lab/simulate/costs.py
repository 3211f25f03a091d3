"""How long an engine step takes: linear in what it reads and computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler

    from memshare.engine.scheduler_side import SchedulerSide


class DoesNotFitError(ValueError):
    """Weights, or a request, need more memory than there is."""


class StepWork(NamedTuple):
    """What one engine step does.

    Attributes:
        requests: that it computes tokens for.
        tokens: that it computes.
        context: tokens whose KV it reads, over all those requests.
    """

    requests: int
    tokens: int
    context: int


def work_of(scheduler: Scheduler, output: SchedulerOutput) -> StepWork:
    """What a step does that ``scheduler`` has just scheduled."""
    running = output.num_scheduled_tokens
    context = sum(scheduler.requests[name].num_computed_tokens for name in running)
    side: SchedulerSide | None = getattr(scheduler.connector, "scheduler_side", None)
    if side is not None:  # attention does not read what has been dropped
        states = (side.tracker.get(name) for name in running)
        holes = sum(len(state.holes) for state in states if state is not None)
        context -= side.tables.token_map.first_position(holes)
    return StepWork(len(running), output.total_num_scheduled_tokens, context)


class Recomputation:
    """Adds up the tokens that a scheduler has recomputed: after preemptions, and not those that
    it found in its prefix cache."""

    def __init__(self) -> None:
        """Start with nothing computed."""
        self.tokens = 0
        self._reached: dict[str, int] = {}

    def add_step(self, scheduler: Scheduler, output: SchedulerOutput) -> None:
        """Take the step that ``scheduler`` has just scheduled."""
        for name, count in output.num_scheduled_tokens.items():
            end = scheduler.requests[name].num_computed_tokens  # with those of this step
            reached = self._reached.get(name, 0)
            self.tokens += max(0, min(end, reached) - (end - count))
            self._reached[name] = max(end, reached)


class StepCosts(NamedTuple):
    """Seconds of a step, and for each request, computed token and token of context."""

    step: float
    request: float
    token: float
    context: float

    def seconds(self, work: StepWork) -> float:
        """How long a step takes that does ``work``."""
        return (
            self.step
            + self.request * work.requests
            + self.token * work.tokens
            + self.context * work.context
        )


def fit(steps: Sequence[tuple[StepWork, float]]) -> StepCosts:
    """Fit costs to measured steps by least squares; no cost is negative.

    Steps are weighted by the inverse of their time, so that errors count as fractions, and the
    slowest hundredth, where the machine did something else, is left out.

    Args:
        steps: work and seconds of each, 100 or more.

    Raises:
        ValueError: there are too few.
    """
    if len(steps) < 100:
        raise ValueError(f"{len(steps)} steps are too few to fit costs to; 100 are wanted")
    works = np.array([(1, *work) for work, _ in steps], np.float64)
    seconds = np.array([taken for _, taken in steps])
    usual = seconds <= np.quantile(seconds, 0.99)
    return StepCosts(*_non_negative(works[usual], seconds[usual]))


def _non_negative(works: npt.NDArray[np.float64], seconds: npt.NDArray[np.float64]) -> list[float]:
    """Least squares; the most negative coefficient is set to zero until none is."""
    weighted, target = works / seconds[:, None], np.ones(len(seconds))
    kept = list(range(works.shape[1]))
    while True:
        found = np.linalg.lstsq(weighted[:, kept], target, rcond=None)[0]
        if (found >= 0).all():
            costs = dict(zip(kept, found.tolist(), strict=True))
            return [costs.get(i, 0.0) for i in range(works.shape[1])]
        del kept[int(found.argmin())]


class AcceleratorFacts(BaseModel):
    """What each of some accelerators can do, by published numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    memory_gb: PositiveFloat
    """Gigabytes of memory of each, 10^9 bytes."""
    memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    """vLLM's ``gpu_memory_utilization``: a fraction of the memory."""
    reserved_gb: float = Field(default=4.0, ge=0.0)
    """Gigabytes of each for activations and CUDA graphs."""
    bandwidth_gb_s: PositiveFloat
    """Gigabytes a second that each reads from its memory."""
    teraflops: PositiveFloat
    """Dense 16-bit operations a second of each, 10^12."""
    efficiency: float = Field(default=0.6, gt=0.0, le=1.0)
    """Fraction of bandwidths and operations that is reached."""
    block_size: PositiveInt = 16
    """Tokens of a KV block."""


class Deployment(AcceleratorFacts):
    """A model on some accelerators, by published numbers. Nothing here has been measured."""

    name: str
    """As shown in tables."""
    parameters: PositiveFloat
    """Weights that a step reads; for a mixture of experts, all that a batch touches."""
    weight_bytes: PositiveFloat = 2.0
    """Bytes a weight."""
    layers: PositiveInt
    """Layers with a KV cache."""
    kv_heads: PositiveInt
    """KV heads of a layer."""
    head_dim: PositiveInt
    """Channels of a head."""
    kv_bytes: PositiveFloat = 2.0
    """Bytes a value of the cache."""
    accelerators: PositiveInt
    """How many share the model (tensor parallel)."""
    step_overhead_s: float = Field(default=0.002, ge=0.0)
    """Seconds of a step that neither reads nor computes: launches, sampling, communication."""

    @property
    def kv_bytes_per_token(self) -> float:
        """Of all layers, on all accelerators together."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_bytes

    @property
    def blocks(self) -> int:
        """KV blocks that fit beside the weights.

        Raises:
            DoesNotFitError: none do.
        """
        memory = self.accelerators * (self.memory_gb * self.memory_utilization - self.reserved_gb)
        left = memory * 1e9 - self.parameters * self.weight_bytes
        blocks = int(left // (self.kv_bytes_per_token * self.block_size))
        if blocks < 1:
            raise DoesNotFitError(
                f"{self.name}: {self.parameters * self.weight_bytes / 1e9:.0f} GB of weights leave "
                f"no room for KV on {self.accelerators} x {self.memory_gb} GB; raise accelerators"
            )
        return blocks

    @property
    def costs(self) -> StepCosts:
        """Reads at the memory's speed, operations at the units' speed, one after the other."""
        read = self.accelerators * self.bandwidth_gb_s * 1e9 * self.efficiency
        compute = self.accelerators * self.teraflops * 1e12 * self.efficiency
        return StepCosts(
            step=self.step_overhead_s + self.parameters * self.weight_bytes / read,
            request=0.0,
            token=2 * self.parameters / compute,
            context=self.kv_bytes_per_token / read,
        )
