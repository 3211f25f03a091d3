"""The guard in front of a real engine: a planted bad policy is stopped, a good one is not.

The model is small, has random weights, and its logits are not flat. All requests are chosen
(``share: 1``): ten shadows are what 200 requests give at 5 %, and a hundred what 2,000 give.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams

from cluster.config import parse_cluster_args
from cluster.engine.client import GatedAsyncLLM, start_engine
from cluster.engine.options import parse_engine_options
from cluster.guard.answers import Answer
from cluster.guard.guard import Guard
from cluster.guard.start import start_guard
from cluster.routing.load import LoadMeter
from cluster.telemetry.step_stats import StepFeed
from cluster.tenancy.gate import Gate
from cluster.tenancy.limits import Ledger, Limiter, LocalLedgerClient
from memshare.lab.bench.exactness import COPIES, IDENTICAL_ONLY
from tests.cluster.guard.test_guard import Metrics, until
from tests.machine import DTYPE
from tests.memshare.engine.harness import BLOCK, write_tiny_model, write_tiny_weights

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

EAGER: dict[str, Any] = {
    "trigger": {"kind": "eager"},
    "integrity": {"check_every": 1, "on_failure": "raise"},
}
BAD = EAGER | {
    # Most of the prompt is re-pointed to other blocks, and what is asked there is lost.
    "policy": {"name": "oldest"},
    "protect": {"prompt_tokens": 0, "recent_tokens": 64},
    "budget": {"max_shared_fraction": 0.6},
}
# What is given up is read from a block that holds the same numbers.
GOOD = IDENTICAL_ONLY | {"integrity": {"check_every": 1, "on_failure": "raise"}}
WORDS = ["river", "stone", "lamp", "cloud", "seven", "blue", "north", "glass"]


class Tenants:
    """What tenants were charged."""

    def __init__(self) -> None:
        self.tokens = 0

    def count(self, name: str, *values: str, by: int = 1) -> None:
        if name == "tenant_tokens":
            self.tokens += by


@dataclass
class Served:
    """An engine with a guard."""

    engine: GatedAsyncLLM
    gate: Gate
    guard: Guard[Answer]
    metrics: Metrics
    tenants: Tenants
    number: int = 0

    async def ask(self, temperature: float, text: int | None = None, **extra: object) -> Any:
        """One request of a tenant, answered; returns its last output.

        Args:
            temperature: 0 is greedy.
            text: number of the prompt; None takes a new one.
            extra: options for MemShare.
        """
        self.number += 1
        chance = random.Random(self.number if text is None else -text)
        prompt = " ".join(chance.choice(WORDS) for _ in range(90))
        params = SamplingParams(
            max_tokens=128, temperature=temperature, ignore_eos=True, seed=self.number,
            output_kind=RequestOutputKind.DELTA, extra_args=dict(extra),
        )  # fmt: skip
        async with self.gate.admit(self.gate.identify(None, "127.0.0.1")):
            async for output in self.engine.generate(prompt, params, f"r{self.number}"):
                assert output.outputs[0].logprobs is None, "the client did not ask"
        return output

    async def judged(self) -> None:
        """Wait until every request has been scored, or needed not to be."""
        await until(lambda: self._outcomes() >= self.number, 120)

    def _outcomes(self) -> int:
        return sum(n for (name, *_), n in self.metrics.counts.items() if name == "guard_shadows")


@asynccontextmanager
async def serving(folder: Path, memshare: dict[str, Any]) -> AsyncIterator[Served]:
    model = str(write_tiny_weights(write_tiny_model(folder)))
    engine_args = {
        "dtype": DTYPE, "block_size": BLOCK, "max_model_len": 2048, "enforce_eager": True,
        "num_gpu_blocks_override": 400, "distributed_executor_backend": "uni",
        "extra": {"kv_cache_memory_bytes": 2**28},
    }  # fmt: skip
    arguments = {"model": model, "engine": engine_args, "memshare": memshare, "guard": {"share": 1}}
    args = parse_cluster_args(arguments, environ={})
    assert args.guard is not None
    tenants, metrics, meter = Tenants(), Metrics(), LoadMeter()
    gate = Gate(None, Limiter(LocalLedgerClient(Ledger()), "replica"), tenants)
    options = parse_engine_options(args, model, args.memshare)
    engine = start_engine(options, True, 20, gate, meter, StepFeed(lambda part: None))
    guard = start_guard(args.guard, engine, gate, meter, metrics, always=False)
    try:
        yield Served(engine, gate, guard, metrics, tenants)
    finally:
        guard.close()
        engine.shutdown()


async def test_a_policy_that_loses_the_prompt_is_stopped_within_ten_shadows(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path, BAD) as served:
        first = await served.ask(0.0, memshare_usage="on")
        assert first.kv_transfer_params["memshare"]["blocks_shared"] > 0, "the plant works"
        await asyncio.gather(*(served.ask(float(i % 2)) for i in range(9)))
        await served.judged()
        assert served.guard.stopped
        assert served.guard.state().shadows <= 10
        assert served.metrics.counts["guard_tokens",] > 0
        requests, prompt = served.number, 90 * 5
        assert served.tenants.tokens < requests * (2 * prompt + 128), "nobody pays for shadows"

        exact = await served.ask(0.0, memshare_usage="on")
        assert exact.kv_transfer_params["memshare"]["blocks_shared"] == 0
        assert served.metrics.counts["guard_exact_requests",] == 1
        served.guard.let_go_on("operator")
        again = await served.ask(0.0, memshare_usage="on")
        assert again.kv_transfer_params["memshare"]["blocks_shared"] > 0


@pytest.mark.complete
async def test_a_good_policy_is_left_alone_for_a_hundred_shadows(tmp_path: Path) -> None:
    async with serving(tmp_path, GOOD) as served:
        scored = 0
        for text in range(30):
            await asyncio.gather(*(served.ask(0.0, text) for _ in range(COPIES)))
            await served.judged()
            scored = served.metrics.counts["guard_shadows", "scored"]
            if scored >= 100:
                break
        assert scored >= 100, "MemShare gave up blocks of so many"
        state = served.guard.state()
        assert (state.alarms, state.stopped) == (0, False)
        assert state.mean < 1e-4, "rounding alone"
