"""Experts as a real engine counts them are those that Transformers' routers choose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.memshare.engine.experts.tiny_moe import CHOSEN, EXPERTS, KINDS, LAYERS, write_tiny_moe
from tests.memshare.engine.harness import Engine, StartEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

PROMPTS = ["The history of the city begins", "def add(a, b): return a + b  # sum"]
OUTPUT = 6


@pytest.fixture(
    scope="module",
    params=[KINDS[0], *(pytest.param(kind, marks=pytest.mark.complete) for kind in KINDS[1:])],
)
def engine(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    start_engine: StartEngine,
) -> Iterator[tuple[Engine, Path]]:
    folder = write_tiny_moe(tmp_path_factory.mktemp(request.param), request.param)
    memshare = {"mode": "off", "experts": {"count_every": 1}}
    options = {"num_gpu_blocks_override": 40, "max_model_len": 512, "enable_prefix_caching": False}
    with start_engine(str(folder), memshare, **options) as engine:
        yield engine, folder


def chosen_by_transformers(folder: Path, tokens: list[int]) -> torch.Tensor:
    """``[tokens, layers with experts, chosen]``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([tokens]), output_router_logits=True).router_logits
    return torch.stack([layer.topk(CHOSEN).indices for layer in logits if layer is not None], 1)


def test_every_token_is_seen_with_its_experts(engine: tuple[Engine, Path]) -> None:
    running, folder = engine
    watch = running.core.model_executor.driver_worker.worker._experts
    running.generate(PROMPTS[:1], max_tokens=1)
    tokens = running.llm.get_tokenizer()(PROMPTS[0])["input_ids"]
    expected = chosen_by_transformers(folder, tokens)
    found = watch._routing.ids(len(tokens)).sort(-1).values
    dense = [1] if "qwen3" in folder.name else []
    assert watch._routing.layers == tuple(i for i in range(LAYERS) if i not in dense)
    assert torch.equal(found.long(), expected.sort(-1).values)
    assert not torch.equal(found[1:].long(), expected[:-1].sort(-1).values), "negative control"
    counts = watch._routing.counts(len(tokens))
    ids = expected.transpose(0, 1).flatten(1)
    assert counts.tolist() == [row.bincount(minlength=EXPERTS).tolist() for row in ids]


def test_metrics_tell_what_steps_of_several_requests_touch(engine: tuple[Engine, Path]) -> None:
    running, folder = engine
    stats = running.scheduler.connector.expert_stats
    stats.counters.totals.clear()
    before = running.metric("vllm:memshare_expert_steps")
    outputs = running.generate(PROMPTS, max_tokens=OUTPUT)
    tokenizer = running.llm.get_tokenizer()
    rows = []  # of each step after the prompts, the experts of both requests
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        chosen = chosen_by_transformers(folder, [*ids, *output])
        rows.append(chosen[len(ids) : len(ids) + OUTPUT - 1])
    steps = torch.cat(rows, dim=-1)  # [steps, layers, 2 * chosen]
    names = [str(layer) for layer in watch_layers(running)]
    totals: dict[str, Any] = stats.counters.totals
    assert totals["expert_steps"] == OUTPUT - 1
    for i, name in enumerate(names):
        touched = sum(len(set(step)) for step in steps[:, i].tolist())
        assert totals[f"experts_touched:{name}"] == touched
        assert totals[f"expert_tokens:{name}"] == 2 * CHOSEN * (OUTPUT - 1)
    assert running.metric("vllm:memshare_expert_steps") - before == OUTPUT - 1
    skews = [m for m in running.llm.get_metrics() if m.name == "vllm:memshare_expert_load_skew"]
    assert {m.labels["layer"] for m in skews} == set(names)
    assert all(1.0 <= m.value <= EXPERTS for m in skews)


def watch_layers(running: Engine) -> tuple[int, ...]:
    layers: tuple[int, ...] = (
        running.core.model_executor.driver_worker.worker._experts._routing.layers
    )
    return layers
