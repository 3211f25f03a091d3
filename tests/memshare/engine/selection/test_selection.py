"""Page selection in a real engine: exact where it must be, bounds true whatever happens to blocks.

Two engines, one of vLLM alone. The model has random weights by which tokens depend on every page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from memshare.config import SelectionConfig, registry
from memshare.engine.vllm_0_32.attention_layers import layers_of
from memshare.kv.layout import KVLayout
from memshare.mechanisms.compaction.scorers.recency import Recency
from memshare.mechanisms.selection.choice import PageChooser
from tests.memshare.engine.harness import BLOCK, Engine, StartEngine
from tests.memshare.engine.scripted import NAME, Plan, registered

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

OPTIONS: dict[str, Any] = {
    "num_gpu_blocks_override": 90,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 6,
}
MEMSHARE = {
    "policy": {"name": NAME, "scorer": "random", "position_weight": 0.0},
    "selection": {"pages": 5, "exempt_layers": 1},
    "integrity": {"check_every": 1, "on_failure": "raise"},
}
EVERYTHING = SelectionConfig(budget=1.0)
LITTLE = SelectionConfig(pages=4)
TOKENS = 24


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 250, 300).tolist()  # found in the prefix cache
    return [
        shared + rng.integers(0, 250, 200).tolist(),
        rng.integers(0, 250, 70).tolist(),
        shared + rng.integers(0, 250, 40).tolist(),
        rng.integers(0, 250, 700).tolist(),  # in chunks, while others generate
    ]


@pytest.fixture(scope="module")
def exact(
    start_engine: StartEngine, tiny_with_weights: str, prompts: list[list[int]]
) -> list[tuple[int, ...]]:
    """What vLLM alone generates."""
    with start_engine(tiny_with_weights, None, **OPTIONS) as engine:
        return run(engine, prompts)


@pytest.fixture(scope="module")
def engine(
    start_engine: StartEngine, tiny_with_weights: str, exact: list[tuple[int, ...]]
) -> Iterator[Engine]:
    """Behind the other: a process has one engine at a time."""
    with registered(), start_engine(tiny_with_weights, MEMSHARE, **OPTIONS) as engine:
        yield engine


@pytest.fixture
def selector(engine: Engine) -> Iterator[Any]:
    yield worker_of(engine)._memshare._selector
    assert engine.is_clean()


class ThroughSelection(PageChooser):
    """Requests choose even where they read everything."""

    def pages_read(self, lens: Any) -> Any:
        return super().pages_read(lens) - 1


def worker_of(engine: Engine) -> Any:
    return engine.core.model_executor.driver_worker.worker


def read_by(
    engine: Engine, config: SelectionConfig, chooser: type[PageChooser] = PageChooser
) -> None:
    """Another budget from now on, on both sides."""
    selector = worker_of(engine)._memshare._selector
    selector.chooser = chooser(
        config, selector.chooser.heads, BLOCK, OPTIONS["num_gpu_blocks_override"]
    )
    engine.side.parts[registry.SELECTION]._config = config


def run(
    engine: Engine,
    prompts: list[list[int]],
    options: list[dict[str, Any]] | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> list[tuple[int, ...]]:
    """Greedy tokens; the last prompt comes when the others generate."""
    from vllm import SamplingParams

    llm = engine.llm.llm_engine
    tokens: dict[str, tuple[int, ...]] = {}

    def step() -> None:
        for output in llm.step():
            tokens[output.request_id] = tuple(output.outputs[0].token_ids)
        after_step()

    for number, prompt in enumerate(prompts):
        if 0 < number == len(prompts) - 1:
            while not tokens or min(map(len, tokens.values())) < 3:
                step()
        params = SamplingParams(
            temperature=0, max_tokens=TOKENS, ignore_eos=True,
            extra_args=options[number] if options else None,
        )  # fmt: skip
        llm.add_request(str(number), {"prompt_token_ids": prompt}, params)
    while llm.has_unfinished_requests():
        step()
    return [tokens[str(number)] for number in range(len(prompts))]


def test_with_a_budget_of_all_pages_every_token_is_vllm_s(
    engine: Engine, selector: Any, prompts: list[list[int]], exact: list[tuple[int, ...]]
) -> None:
    before = engine.totals
    read_by(engine, EVERYTHING)
    assert run(engine, prompts) == exact
    counted = engine.totals - before
    assert counted["pages_read"] == counted["pages_there"] > 0
    read_by(engine, EVERYTHING, ThroughSelection)
    assert run(engine, prompts) == exact, "all pages chosen, head by head"
    read_by(engine, LITTLE)
    assert run(engine, prompts) != exact, "control"


def test_what_is_read_is_counted(engine: Engine, selector: Any, prompts: list[list[int]]) -> None:
    read_by(engine, LITTLE)
    before = engine.totals
    run(engine, prompts[:1])
    # Each token but the first, which the prompt's last step gives.
    pages = [-(-(500 + made) // BLOCK) for made in range(1, TOKENS)]
    counted = engine.totals - before
    heads, layers, exempt = 2, 2, 1
    assert counted["pages_there"] == sum(pages) * layers * heads
    assert counted["pages_read"] == sum(pages) * exempt * heads + 4 * len(pages) * heads


def test_a_request_that_opts_out_reads_everything(
    engine: Engine, selector: Any, prompts: list[list[int]], exact: list[tuple[int, ...]]
) -> None:
    read_by(engine, LITTLE)
    options = [{"memshare": "off"}, {}, {}, {"memshare": "off"}]
    found = run(engine, prompts, options)
    assert (found[0], found[3]) == (exact[0], exact[3])
    assert found[2] != exact[2], "the others choose"


def test_what_was_generated_from_some_pages_is_not_found_by_others(
    engine: Engine, selector: Any, prompts: list[list[int]]
) -> None:
    """Its KV is approximate, and the next request may be one that reads everything."""
    from vllm import SamplingParams

    def found(config: SelectionConfig, prompt: list[int]) -> int:
        read_by(engine, config)
        (tokens,) = run(engine, [prompt])
        again = [{"prompt_token_ids": [*prompt, *tokens]}]
        once = SamplingParams(max_tokens=1, temperature=0)
        (output,) = engine.llm.generate(again, once, use_tqdm=False)
        return int(output.num_cached_tokens)

    # 500 tokens of prompt end within block 15, 511 one before its end, 24 more fill it.
    more = prompts[3][:11]
    assert found(LITTLE, prompts[0]) == found(LITTLE, [*prompts[0], *more]) == 15 * BLOCK
    assert found(EVERYTHING, prompts[2] + prompts[0][300:]) == 17 * BLOCK, "control"


class Bounds:
    """Compares bounds with the keys in the cache, of every block that a request holds."""

    def __init__(self, engine: Engine, selector: Any) -> None:
        self._engine = engine
        self._bounds, self._caches = selector._bounds, selector._caches
        model = worker_of(engine).model_runner.get_model()
        layers = layers_of(engine.llm.llm_engine.vllm_config, model)
        self._layouts = {
            name: KVLayout.learn(layers[name], self._caches[name]) for name in self._bounds
        }
        self.compared = 0

    def check(self) -> None:
        for name, blocks in self._engine.side.tables.block_ids().items():
            request = self._engine.scheduler.requests[name]
            computed = request.num_computed_tokens - request.num_in_flight_tokens
            for entry, block in enumerate(blocks):
                filled = min(BLOCK, computed - entry * BLOCK)
                if block == 0 or filled <= 0:
                    continue
                for layer, bounds in self._bounds.items():
                    cache, at = self._caches[layer], torch.tensor([block])
                    held = self._layouts[layer].gather(cache, at)[0][0, :, :filled]
                    wanted = torch.cat((held.amax(1), -held.amin(1)), -1)
                    assert torch.equal(bounds.highs[block].float(), wanted), (name, entry)
                    self.compared += 1


@pytest.fixture
def bounds(engine: Engine, selector: Any) -> Bounds:
    return Bounds(engine, selector)


def test_bounds_are_those_of_the_cache_whatever_happens_to_blocks(
    engine: Engine, selector: Any, bounds: Bounds, prompts: list[list[int]]
) -> None:
    """Chunks, shared prefixes, blocks that are used again, packing with holes, preemption."""
    read_by(engine, LITTLE)
    part = engine.side.parts[NAME]
    part.plans = [
        Plan("0", 505, list(range(9, 15)), 3),
        Plan("3", 705, [0, 2, 3, 4, 9, 11], 3),
    ]
    preempt = iter([False] * 20 + [True])
    preemptions = []

    def after_step() -> None:
        bounds.check()
        preemptions.extend(each.num_preemptions for each in engine.scheduler.requests.values())
        if next(preempt, False):
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    run(engine, prompts, after_step=after_step)
    assert not part.plans
    assert max(preemptions) > 0
    assert bounds.compared > 500


def test_packing_without_new_bounds_is_found(
    engine: Engine,
    selector: Any,
    bounds: Bounds,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(selector, "rewritten", lambda blocks: None)
    engine.side.parts[NAME].plans = [Plan("0", 505, list(range(9, 15)), 3)]
    faults = []

    def after_step() -> None:
        try:
            bounds.check()
        except AssertionError as fault:
            faults.append(fault)

    run(engine, prompts[:1], after_step=after_step)
    assert faults


def test_holes_and_selection_together_read_what_is_left(
    engine: Engine, selector: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a packed request has left is read the same, chosen head by head or not."""
    monkeypatch.setattr(worker_of(engine)._memshare.parts[NAME], "_scorer", Recency())
    tokens = []
    for chooser in (PageChooser, ThroughSelection):
        read_by(engine, EVERYTHING, chooser)
        engine.side.parts[NAME].plans = [Plan("0", 505, list(range(1, 13)), 5)]
        tokens += run(engine, prompts[:1])
        engine.scheduler.reset_prefix_cache()
    assert tokens[0] == tokens[1]
    read_by(engine, EVERYTHING)
    assert run(engine, prompts[:1])[0] != tokens[0], "control: what was packed matters"
