"""Compaction in hybrid models: what layers with full attention lose, and nothing else, is missing.

As `compaction/test_exactness.py` for plain models: a real engine against transformers in float64,
with a cache from whose full layers the same tokens are deleted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.memshare.engine.harness import StartEngine
from tests.memshare.engine.hybrids.tiny_hybrids import WINDOW, write_hybrid_weights
from tests.memshare.engine.scripted import NAME, Plan, Reference, Watched, registered

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

POLICY: dict[str, Any] = {
    "policy": {"name": NAME, "scorer": "random", "position_weight": 0.0},
    "integrity": {"check_every": 1, "on_failure": "raise"},
}


@pytest.fixture(
    scope="module", params=["gemma3", pytest.param("gpt_oss", marks=pytest.mark.complete)]
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_hybrid_weights(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def engine(start_engine: StartEngine, model: str) -> Iterator[Any]:
    options = {"dtype": "float32", "num_gpu_blocks_override": 300, "max_model_len": 1024}
    with registered(), start_engine(model, POLICY, **options) as engine:
        yield engine


def test_full_layers_lose_what_is_dropped_and_sliding_ones_nothing(engine: Any, model: str) -> None:
    watched, reference = Watched(engine), Reference(model, experts_implementation="eager")
    watched.add("plain", reference.text(0, 400), 60)
    watched.add("a", reference.text(700, 290), 70)
    watched.part.plans = [
        Plan("a", 305, list(range(1, 9)), 4),  # sets of their own in each layer and head
        Plan("a", 340, [1, 2, 3, 4, 9], 2),
    ]
    watched.run()
    assert WINDOW < 290, "windows have moved on before anything is dropped"
    noise = watched.worst("plain", reference.logits(watched.tokens["plain"], []))
    assert noise < 2e-3
    tokens, events = watched.tokens["a"], watched.events["a"]
    assert watched.part.freed["a"] == 7
    assert watched.worst("a", reference.logits(tokens, events)) <= 2 * noise
    for control in ({"shift": 1}, {"swap": True}):
        wrong = reference.logits(tokens, events, **control)
        assert watched.worst("a", wrong, events[0].start) > 100 * noise, control
    dense = reference.logits(tokens, [])
    assert watched.worst("a", dense, events[0].start) > 100 * noise, "they matter"
    assert engine.is_clean()
    assert engine.totals["integrity_checks:failed"] == 0
    assert engine.totals["integrity_checks:passed"] > 0
