"""Counting the experts that steps choose: in a worker, and where its counts become metrics."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from memshare.config import ExpertsConfig
from memshare.engine.adapter import ExpertRouting, vllm_adapter
from memshare.engine.compatibility import UnsupportedSetup
from memshare.kv.host_copy import HostCopy
from memshare.moe.experts import ExpertCounts, ExpertLoad
from memshare.telemetry.stats import Counters, Payload

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def watch_experts(
    vllm_config: VllmConfig, runner: object, config: ExpertsConfig
) -> ExpertWatch | None:
    """Listen to the routers of a model that has just been loaded; None if nobody asks for it.

    Raises:
        UnsupportedSetup: its experts are chosen where vLLM lets nobody listen.
    """
    if not config.counts:
        return None
    try:
        routing = vllm_adapter().expert_routing(vllm_config, runner)
    except ValueError as reason:
        raise UnsupportedSetup(
            f"experts.count_every: {reason}\n    fix: set experts.count_every to 0"
        ) from None
    parallel = vllm_config.parallel_config
    # All ranks of a tensor-parallel group choose alike; all must listen in the same steps, as some
    # gather to do so.
    reports = parallel.rank % parallel.tensor_parallel_size == 0
    return ExpertWatch(routing, config.count_every, reports)


class ExpertWatch:
    """One rank's half: counts in one step of many, and never waits for the device."""

    def __init__(self, routing: ExpertRouting, every: int, reports: bool) -> None:
        """Begin before the first step.

        Args:
            routing: what the model's routers choose.
            every: steps from one that is counted to the next.
            reports: whether this rank counts; others only listen.
        """
        self._routing = routing
        self._every = every
        self._reports = reports
        self._step = 0
        self._tokens = 0  # of the step that runs, if it is to be counted
        self._decodes = False
        self._pending: deque[tuple[HostCopy, bool]] = deque()

    def before_step(self, tokens: int, requests: int) -> None:
        """A step of so many tokens for so many requests is about to run."""
        self._step += tokens > 0
        is_due = tokens > 0 and self._step % self._every == 0
        self._routing.listen(is_due)
        self._tokens = tokens if is_due and self._reports else 0
        self._decodes = tokens == requests

    def after_step(self) -> ExpertCounts | None:
        """Count the step, if it is its turn; returns counts that have reached the host, those of
        one step at a time."""
        if self._tokens:
            counted = HostCopy.start(self._routing.counts(self._tokens))
            self._pending.append((counted, self._decodes))
            self._tokens = 0
        if not self._pending or not self._pending[0][0].is_ready():
            return None
        counts, decodes = self._pending.popleft()
        return ExpertCounts(self._routing.layers, counts.tensor.numpy(), decodes)


class ExpertStats:
    """The scheduler's half: makes metrics of what a worker has counted.

    Attributes:
        counters: what has been counted.
    """

    def __init__(self) -> None:
        self.counters = Counters()
        self._load = ExpertLoad()

    def take(self, step: ExpertCounts) -> None:
        """Add a step."""
        self._load.take(step)
        names = [str(layer) for layer in step.layers]
        skews = self._load.skew().round(3).tolist()
        self.counters.note_skews(dict(zip(names, skews, strict=True)))
        if not step.decodes:
            return
        self.counters.add("expert_steps")
        touched, chosen = step.touched.tolist(), step.chosen.tolist()
        for name, experts, tokens in zip(names, touched, chosen, strict=True):
            self.counters.add_labelled("experts_touched", name, experts)
            self.counters.add_labelled("expert_tokens", name, tokens)

    def take_stats(self) -> Payload | None:
        """What has changed since the last call; None if nothing has."""
        return self.counters.take({})
