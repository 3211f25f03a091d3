"""Hybrid models: identical blocks of the layers with full attention are shared without changing a
token, whatever groups of layers stand beside them; and nothing approximate is published in any.

Each test starts its own engines, one after the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from memshare.lab.bench.exactness import IDENTICAL_ONLY, OTHERS, PROMPT, tell_of_no_remap
from tests.memshare.engine.harness import Engine, StartEngine
from tests.memshare.engine.hybrids.tiny_hybrids import random_weights, write_tiny_hybrid

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

CHECKED: dict[str, Any] = {"integrity": {"check_every": 1, "on_failure": "raise"}}
COPIES = 6


class Setup(NamedTuple):
    """How a model is run.

    Attributes:
        blocks: of the KV cache.
        short: whether they are too few for all requests without sharing.
        groups: kinds of its KV cache groups.
        dtype: of weights and cache.
        tokens: that a request writes.
    """

    blocks: int
    short: bool
    groups: tuple[str, ...]
    dtype: str = "float32"
    tokens: int = 200


SLIDING, FULL, STATES = "SlidingWindowSpec", "FullAttentionSpec", "MambaSpec"
SETUPS = {
    "gpt_oss": Setup(60, True, (SLIDING, FULL)),
    "gemma3": Setup(140, True, (SLIDING,) * 5 + (FULL,)),
    # In bfloat16 a token that is computed again after a preemption need not be what it was.
    "qwen3_next": Setup(120, False, (STATES,) * 3 + (FULL,), "bfloat16"),
}
KINDS = [
    "gpt_oss",
    *(pytest.param(k, marks=pytest.mark.complete) for k in SETUPS if k != "gpt_oss"),
]


@contextmanager
def started(
    start_engine: StartEngine, folder: Path, kind: str, memshare: dict[str, Any] | None, **more: Any
) -> Iterator[Engine]:
    setup = SETUPS[kind]
    options = {
        "load_format": "dummy", "max_model_len": 512, "dtype": setup.dtype,
        "num_gpu_blocks_override": setup.blocks,
    }  # fmt: skip
    model = write_tiny_hybrid(folder, kind)
    with random_weights(kind), start_engine(model, memshare, **options | more) as engine:
        groups = engine.scheduler.kv_cache_config.kv_cache_groups
        assert tuple(type(group.kv_cache_spec).__name__ for group in groups) == setup.groups
        yield engine


def copies(engine: Engine, kind: str) -> list[tuple[int, ...]]:
    outputs = engine.generate([PROMPT] * COPIES + OTHERS, SETUPS[kind].tokens)
    assert all(len(set(output)) > 5 for output in outputs), "an output that says nothing"
    return outputs[:COPIES]


@pytest.mark.proves("hybrid sliding", case="gpt_oss")
@pytest.mark.proves("hybrid linear", case="qwen3_next")
@pytest.mark.parametrize("kind", KINDS)
def test_identical_blocks_share_exactly(
    kind: str, start_engine: StartEngine, tmp_path: Path
) -> None:
    with started(start_engine, tmp_path, kind, None) as engine:
        expected = copies(engine, kind)
        assert (engine.metric("vllm:num_preemptions") > 0) == SETUPS[kind].short
    with started(start_engine, tmp_path, kind, IDENTICAL_ONLY | CHECKED) as engine:
        assert copies(engine, kind) == expected
        assert engine.is_clean()
        assert engine.totals["applied"] >= COPIES
        assert engine.totals["blocks_reclaimed"] >= COPIES
        assert engine.totals["integrity_checks:passed"] > 0
        assert engine.totals["integrity_checks:failed"] == 0
    with started(start_engine, tmp_path, kind, IDENTICAL_ONLY) as engine:
        side = engine.core.model_executor.driver_worker.worker._memshare
        tell_of_no_remap(side)
        wrong = copies(engine, kind)
        assert engine.totals["applied"] >= COPIES
        assert wrong != expected, "negative control: a wrong table is not seen"


# ---- what is published ----

EAGER = CHECKED | {
    "policy": {"name": "oldest"},
    "trigger": {"kind": "eager"},
    "protect": {"recent_tokens": 32},
}
TOKENS = 300
FIRST_TURN = "List ten fruits, and say one sentence about each of them."


@contextmanager
def publishing_noted(engine: Engine) -> Iterator[Counter[int]]:
    """Counts blocks that are published for requests that have lost something, by group."""
    pool = engine.scheduler.kv_cache_manager.block_pool
    found: Counter[int] = Counter()
    publish = pool.cache_full_blocks

    def noted(request: Any, **options: Any) -> None:
        state = engine.side.tracker.get(request.request_id)
        if state is not None and state.tainted_from is not None:
            group = options["kv_cache_group_id"]
            found[group] += options["num_full_blocks"] - options["num_cached_blocks"]
        publish(request=request, **options)

    pool.cache_full_blocks = noted
    try:
        yield found
    finally:
        pool.cache_full_blocks = publish


@pytest.mark.proves("hybrid sliding", case="gpt_oss")
@pytest.mark.proves("hybrid linear", case="qwen3_next")
@pytest.mark.parametrize("policy", [{"name": "oldest"}, {"name": "compaction", "min_round": 1}])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_tainted_is_published_in_any_group(
    kind: str, policy: dict[str, Any], start_engine: StartEngine, tmp_path: Path
) -> None:
    if policy["name"] == "compaction":
        policy = policy | {"scorer": "recency"}
    with started(start_engine, tmp_path, kind, EAGER | {"policy": policy}) as engine:
        with publishing_noted(engine) as found:
            engine.generate([FIRST_TURN], TOKENS)
        totals = engine.totals
        assert totals["applied"] + totals["compactions"] > 0
        assert found == {}
        assert engine.is_clean()

        # Negative control: the taint reaches only the group whose table is edited.
        tables = engine.side.tables
        edited = SETUPS[kind].groups.index(FULL)

        def stop_publishing(request_id: str) -> None:
            tables._managers[edited].num_cached_block[request_id] = 1 << 30

        tables.stop_publishing = stop_publishing
        engine.side.check_integrity = list
        with publishing_noted(engine) as found:
            engine.generate([FIRST_TURN], TOKENS)
        assert set(found) == set(range(len(SETUPS[kind].groups))) - {edited}
