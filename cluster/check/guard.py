"""What the guard on quality costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.check.report import GIB, Capacity, CheckFinding
from cluster.guard.config import GuardConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_LOGITS_BYTES = 3 * 4  # of a position and word: logits as float32, their logarithm, and a copy


def guard_cost(guard: GuardConfig, capacity: Capacity, config: VllmConfig) -> CheckFinding:
    """Say it: prompt tokens computed beside each request, and logits of a prompt's chunk.

    Args:
        guard: the guard's configuration.
        capacity: knows the requests that the check reckons with.
        config: of the engine.
    """
    shadow = capacity.prompt + capacity.output
    chunk = min(config.scheduler_config.max_num_batched_tokens, shadow)
    logits = chunk * config.model_config.get_vocab_size() * _LOGITS_BYTES
    return CheckFinding(
        "model",
        "ok",
        f"quality guard: {guard.share:.3g} of the requests have a shadow of up to {shadow:,} "
        f"prompt tokens: at most {guard.share * shadow:,.0f} more for each request served, and "
        f"{logits / GIB:.2f} GiB of logits while one runs, outside of the KV cache",
    )
