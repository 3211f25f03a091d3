"""What the workers do, on real vLLM parts: cache layouts, stage two, both runners' tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.memshare.engine.harness import BLOCK, StartEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

PROMPT = "Twelve plus thirty is forty-two, and forty-two minus twelve is thirty. " * 3


def test_stage_two_reads_what_the_model_wrote(start_engine: StartEngine, tiny: str) -> None:
    """K and V that attention was given are what the learned layout finds in the cache."""
    memshare = {"mode": "observe", "policy": {"name": "paper"}}
    options = {"load_format": "dummy", "num_gpu_blocks_override": 80}
    with start_engine(tiny, memshare, **options) as engine:
        worker = engine.core.model_executor.driver_worker.worker
        comparer = worker._memshare.parts["paper"].comparer.kv
        assert all(layer.rotation is not None for layer in comparer._layers)
        layer = worker.vllm_config.compilation_config.static_forward_context[
            comparer.layer_names[0]
        ]
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        update = layer.impl.do_kv_cache_update

        def watch(a: Any, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> None:
            seen.append((key.clone(), value.clone()))
            update(a, key, value, *rest)

        layer.impl.do_kv_cache_update = watch
        table: list[int] = []
        before_step = worker._memshare.before_step

        def note(message: Any) -> None:
            before_step(message)
            table[:] = [
                b.block_id for b in next(iter(engine.side.tables._manager.req_to_blocks.values()))
            ]

        worker._memshare.before_step = note
        engine.generate([PROMPT], max_tokens=2)
        keys, values = seen[0]  # the prefill: [tokens, heads, channels]
        compared = comparer._layers[0]
        blocks = torch.tensor(table[: len(keys) // BLOCK])
        k, v = compared.layout.gather(compared.cache, blocks)
        full = len(blocks) * BLOCK
        for found, given in ((k, keys), (v, values)):
            by_block = given[:full].view(len(blocks), BLOCK, *given.shape[1:]).transpose(1, 2)
            torch.testing.assert_close(found, by_block.float(), rtol=0, atol=0)
        assert not torch.equal(k, v)
        at = torch.tensor([0, BLOCK + 3, full - 1, 5])
        k, v = compared.layout.gather_tokens(compared.cache, blocks[at // BLOCK], at % BLOCK)
        for tokens, given in ((k, keys), (v, values)):
            torch.testing.assert_close(tokens, given[at].float(), rtol=0, atol=0)
