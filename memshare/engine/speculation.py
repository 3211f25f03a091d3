"""Speculative decoding: which drafts MemShare works beside, and what they leave open in the cache.

Draft tokens of the engine's own model need nothing of us: what is not accepted is not committed. A
draft that reads a KV cache of its own keeps it under the same block table as the model's: its
layers are part of the model's group (vllm/v1/spec_decode/llm_base_proposer.py,
``validate_same_kv_cache_group``). So a block that changes hands changes hands for the draft, too.
What the draft reads decides only which tokens are proposed; each is verified by the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_WITHOUT_CACHE = ("ngram",)
_WITH_CACHE = ("eagle", "eagle3", "mtp", "draft_model")  # vLLM calls every model's MTP "mtp"


def speculation_faults(vllm_config: VllmConfig) -> Iterator[str]:
    """Which way to draft is not supported, and the way out."""
    speculative = vllm_config.speculative_config
    tested = _WITHOUT_CACHE + _WITH_CACHE
    if speculative is not None and speculative.method not in tested:
        yield (
            f"speculative decoding by {speculative.method!r} has not been run with MemShare; use "
            f"one of {', '.join(tested)}, or none"
        )


def unsettled_tokens(vllm_config: VllmConfig) -> int:
    """How many of the last committed tokens a draft may yet write again.

    The draft's KV of the last accepted position is computed anew once the next token is known, and
    proposals that were rejected lie behind it (vllm/distributed/kv_transfer/kv_connector/v1/
    offloading/scheduler.py, ``storable_chunks``). A block that holds one of these tokens must stay.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method not in _WITH_CACHE:
        return 0
    return 1 + speculative.num_speculative_tokens
