"""Holes and packing change what attention sees, and nothing else.

A real engine is compared with transformers in float64, with a cache from which the same tokens are
deleted in each layer and KV head.

The bound is one and a half times what the engine itself is away from float64 where nothing was
dropped. One engine, with chunked prefill and prefix caching. A small model does the same, compiled
and in bfloat16, in `test_compaction_kinds.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.memshare.engine.harness import BLOCK, StartEngine
from tests.memshare.engine.scripted import NAME, Plan, Reference, Watched, registered

pytestmark = [pytest.mark.engine, pytest.mark.complete, pytest.mark.timeout(900)]

OPTIONS = {
    "num_gpu_blocks_override": 200,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 8,
}


def policy(scorer: str) -> dict[str, Any]:
    return {
        "policy": {"name": NAME, "scorer": scorer, "position_weight": 0.0},
        "integrity": {"check_every": 1, "on_failure": "raise"},
    }


@pytest.fixture(scope="module")
def reference(smollm2: str) -> Reference:
    return Reference(smollm2)


@pytest.fixture(scope="module")
def engine(start_engine: StartEngine, smollm2: str) -> Iterator[Any]:
    with registered(), start_engine(smollm2, policy("random"), **OPTIONS) as engine:
        yield engine


@pytest.fixture(scope="module")
def watched(engine: Any) -> Watched:
    return Watched(engine)


@pytest.fixture(scope="module")
def bound(watched: Watched, reference: Reference) -> float:
    watched.add("plain", reference.text(0, 600), 60)
    watched.run()
    noise = watched.worst("plain", reference.logits(watched.tokens["plain"], []))
    assert noise < 2e-4
    return 1.5 * noise


@pytest.fixture(autouse=True)
def clean(engine: Any, watched: Watched) -> Iterator[None]:
    for noted in (watched.logits, watched.tokens, watched.events):
        noted.clear()
    yield
    assert not watched.part.plans, "everything planned was done"
    assert engine.is_clean()
    assert engine.totals["integrity_checks:failed"] == 0
    assert engine.totals["integrity_checks:passed"] > 0


def differ(watched: Watched, name: str) -> float:
    """Share of kept positions in which the first and the last head of a request differ."""
    kept = watched.events[name][0].kept
    return float((kept[0, 0] != kept[-1, -1]).float().mean())


def test_sets_of_its_own_in_each_layer_and_head_packed_twice(
    watched: Watched, reference: Reference, bound: float
) -> None:
    watched.add("a", reference.text(700, 290), 70)
    watched.part.plans = [
        Plan("a", 305, list(range(1, 9)), 4),
        Plan("a", 340, [1, 2, 3, 4, 9], 3),  # survivors and newer ones
    ]
    watched.run()
    assert watched.part.freed["a"] == 6
    assert differ(watched, "a") > 0.4
    tokens, events = watched.tokens["a"], watched.events["a"]
    start = events[0].start
    assert watched.worst("a", reference.logits(tokens, events)) <= bound
    for control in ({"swap": True}, {"shift": 1}):
        wrong = reference.logits(tokens, events, **control)  # type: ignore[arg-type]
        assert watched.worst("a", wrong, start) > 1000 * bound, control
    assert watched.worst("a", reference.logits(tokens, []), start) > 1000 * bound, "they matter"


def test_a_mixed_batch(watched: Watched, reference: Reference, bound: float, engine: Any) -> None:
    """Packing, plain holes, nothing, and a prompt that is packed between its chunks."""
    part = watched.worker._memshare.parts[NAME]
    watched.add("a", reference.text(0, 400), 90)
    watched.add("b", reference.text(1500, 350), 90)
    watched.add("c", reference.text(2500, 200), 90)
    watched.part.plans = [
        Plan("a", 410, [1, 5, 6], 0),  # nothing of them stays
        Plan("b", 360, list(range(10)), 5),
        Plan("a", 440, [0, 2, 3, 4, 7, 8], 4),
        Plan("d", 512, list(range(14)), 7),
        Plan("d", 1000, list(range(7)) + list(range(16, 30)), 12),
    ]
    watched.run(until=lambda: len(watched.tokens.get("a", ())) >= 425)
    watched.worker.execute_dummy_batch()  # as idle ranks of data parallelism do: it sees no holes
    watched.add("d", reference.text(4000, 900), 120)
    watched.run()
    assert {name: len(watched.events[name]) for name in "abcd"} == {"a": 2, "b": 1, "c": 0, "d": 2}
    assert watched.events["d"][0].start < 900, "in the middle of its prompt"
    for name in "abcd":
        expected = reference.logits(watched.tokens[name], watched.events[name])
        assert watched.worst(name, expected) <= bound, name
    watched.add("next", reference.text(0, 40), 2)  # with its step workers hear of who has ended
    watched.run()
    assert not part.slots._entries, "all are forgotten"


def test_equal_sets_in_all_layers_and_heads(
    watched: Watched, reference: Reference, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memshare.mechanisms.compaction.scorers.recency import Recency

    monkeypatch.setattr(watched.worker._memshare.parts[NAME], "_scorer", Recency())
    watched.add("a", reference.text(300, 500), 50)
    watched.part.plans = [Plan("a", 510, [0, 1, 2, 3, 4, 9, 10, 11], 3)]
    watched.run()
    (event,) = watched.events["a"]
    assert differ(watched, "a") == 0
    newest = torch.arange(9 * BLOCK, 12 * BLOCK)
    assert torch.isin(newest, event.kept[0, 0]).all(), "the newest of the packed stay"
    assert watched.worst("a", reference.logits(watched.tokens["a"], [event])) <= bound


def test_without_the_view_attention_reads_the_null_block(
    watched: Watched, reference: Reference, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: the same packing, whose holes nobody tells the builders."""
    monkeypatch.setattr(watched.worker._memshare._view, "leave_out", lambda holes: None)
    watched.add("a", reference.text(0, 400), 40)
    watched.part.plans = [Plan("a", 410, [1, 5, 6, 7], 2)]
    watched.run()
    expected = reference.logits(watched.tokens["a"], watched.events["a"])
    assert watched.worst("a", expected, watched.events["a"][0].start) > 1000 * bound


def test_a_preempted_request_is_dense_again(
    watched: Watched, reference: Reference, bound: float, engine: Any
) -> None:
    watched.add("a", reference.text(0, 300), 100)
    watched.part.plans = [Plan("a", 310, list(range(8)), 4)]
    watched.run(until=lambda: len(watched.tokens.get("a", ())) >= 350)
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    since = len(watched.tokens["a"]) - 1
    packed = {key: row for key, row in watched.logits.items() if key[1] < since}
    watched.logits = {}
    watched.run()
    tokens = watched.tokens["a"]
    assert watched.worst("a", reference.logits(tokens, []), since) <= bound
    watched.logits = packed
    assert watched.worst("a", reference.logits(tokens, watched.events["a"])) <= bound
