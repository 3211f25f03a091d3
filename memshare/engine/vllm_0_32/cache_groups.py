"""Groups of layers: which share a block table, and which table mechanisms may edit.

vLLM puts layers with the same kind of cache into a group (vllm/v1/core/kv_cache_utils.py). Groups
share one pool of blocks, and each has a block table of its own; a group's index says nothing about
its kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    MLAAttentionSpec,
    is_full_attention_spec,
)

from memshare.core.interfaces import CacheGroup

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec


def editable_group(cache: KVCacheConfig) -> CacheGroup:
    """See :meth:`Adapter.editable_group`.

    Raises:
        ValueError: no layer has full attention, or such layers are in several groups.
    """
    found = [
        CacheGroup(index, group.kv_cache_spec.block_size, tuple(group.layer_names))
        for index, group in enumerate(cache.kv_cache_groups)
        if is_full(group.kv_cache_spec)
    ]
    if len(found) != 1:
        raise ValueError(f"{len(found)} KV cache groups have full attention; one is wanted")
    return found.pop()


def cache_refusals(cache: KVCacheConfig) -> Iterator[str]:
    """See :meth:`Adapter.cache_refusals`."""
    groups = cache.kv_cache_groups
    if len(groups) != 1:
        yield (
            f"the model has {len(groups)} KV cache groups (hybrid attention or Mamba); choose a "
            "model with full attention in every layer"
        )
        return
    (group,) = groups
    yield from _spec_refusals(group.kv_cache_spec)


def _spec_refusals(spec: KVCacheSpec) -> Iterator[str]:
    if isinstance(spec, MLAAttentionSpec):
        yield "the model uses multi-head latent attention; choose one with separate K and V"
    elif type(spec) is not FullAttentionSpec:
        yield f"the model's cache is {type(spec).__name__}; choose a model with full attention"
    elif not is_full(spec):
        yield "the model attends to a sliding window; choose a model with full attention"


def is_full(spec: KVCacheSpec) -> bool:
    """Whether every token of a request is attended to, whatever its age."""
    if not is_full_attention_spec(spec):
        return False
    window = getattr(spec, "sliding_window", None)
    return window is None and getattr(spec, "attention_chunk_size", None) is None
