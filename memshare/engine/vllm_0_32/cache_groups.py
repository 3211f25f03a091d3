"""Groups of layers: which share a block table, and which table mechanisms may edit.

vLLM puts layers with the same kind of cache into a group (vllm/v1/core/kv_cache_utils.py). Groups
share one pool of blocks, and each has a block table of its own; a group's index says nothing about
its kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    is_full_attention_spec,
    iter_layer_specs,
)

from memshare.core.footprint import SideGroup
from memshare.core.interfaces import CacheGroup

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec


def editable_group(cache: KVCacheConfig) -> CacheGroup:
    """See :meth:`Adapter.editable_group`.

    Raises:
        ValueError: no layer has full attention, or such layers are in several groups.
    """
    groups = cache.kv_cache_groups
    found = [index for index, group in enumerate(groups) if is_full(group.kv_cache_spec)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} KV cache groups have full attention; one is wanted")
    (index,) = found
    return CacheGroup(
        index,
        groups[index].kv_cache_spec.block_size,
        tuple(groups[index].layer_names),
        tuple(
            _side_group(group.kv_cache_spec) for group in groups if not is_full(group.kv_cache_spec)
        ),
    )


def _is_tested(spec: KVCacheSpec) -> bool:
    """Whether a real engine has run such layers with MemShare. Classes that derive from these do
    not behave alike."""
    if isinstance(spec, MambaSpec):
        return spec.mamba_type is MambaAttentionBackendEnum.GDN_ATTN
    return type(spec) in (FullAttentionSpec, SlidingWindowSpec)


def _name(spec: KVCacheSpec) -> str:
    name = type(spec).__name__
    return f"{name} ({spec.mamba_type.name})" if isinstance(spec, MambaSpec) else name


def _side_group(spec: KVCacheSpec) -> SideGroup:
    """What a request keeps of layers beside: as their managers' ``get_num_skipped_tokens`` say."""
    window = getattr(spec, "sliding_window", None)
    if window is None:  # one state; behind a full block it is written to the next one
        window = 2
    return SideGroup(spec.block_size, window + getattr(spec, "extra_retained_tokens", 0))


def cache_refusals(cache: KVCacheConfig) -> Iterator[str]:
    """See :meth:`Adapter.cache_refusals`."""
    specs = [group.kv_cache_spec for group in cache.kv_cache_groups]
    unknown = [spec for spec in specs if not _is_tested(spec)]
    if any(isinstance(one, MLAAttentionSpec) for spec in specs for one in iter_layer_specs(spec)):
        yield "the model uses multi-head latent attention; choose one with separate K and V"
    elif unknown:
        yield (
            f"layers of the model keep a {_name(unknown[0])}, which has not been run; choose a "
            "model whose layers have full attention, sliding windows or gated delta nets"
        )
    elif len(full := [spec for spec in specs if is_full(spec)]) > 1:
        yield (
            f"the model has {len(full)} KV cache groups with full attention, and mechanisms edit "
            "the table of one; choose a model with as many of other layers as of full ones, or more"
        )
    elif not full:
        yield (
            "no layer of the model has full attention, so nothing can be given up that is not gone "
            "by itself; choose another model. If vLLM treats a hybrid model so, leave its hybrid "
            "KV cache manager on (--no-disable-hybrid-kv-cache-manager)"
        )


def is_full(spec: KVCacheSpec) -> bool:
    """Whether every token of a request is attended to, whatever its age."""
    if not is_full_attention_spec(spec):
        return False
    window = getattr(spec, "sliding_window", None)
    return window is None and getattr(spec, "attention_chunk_size", None) is None
