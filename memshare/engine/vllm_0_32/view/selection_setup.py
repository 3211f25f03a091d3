"""Page selection in a worker: where it cannot work, and its way into layers and runner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, cast

from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from memshare.config import SelectionConfig
from memshare.core.interfaces import CacheGroup
from memshare.engine.vllm_0_32.view.attention_view import full_layers, group_builders
from memshare.engine.vllm_0_32.view.selecting import (
    CPUPageSelector,
    SelectingBuilder,
    with_selection,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def install_selection(vllm_config: VllmConfig) -> None:
    """See :meth:`Adapter.install_selection`."""
    for layer in full_layers(vllm_config):
        layer.attn_backend = with_selection(layer.attn_backend)


def attach_selector(
    config: SelectionConfig,
    vllm_config: VllmConfig,
    runner: object,
    group: CacheGroup,
    caches: Mapping[str, Tensor],
) -> CPUPageSelector:
    """See :meth:`Adapter.page_selector`."""
    own = {name: caches[name] for name in group.layers if name in caches}
    selector = CPUPageSelector(config, runner, own, vllm_config, group.block_size)
    for builder in group_builders(runner, group):
        cast(SelectingBuilder, builder).selector = selector
    return selector


def selection_refusals(vllm_config: VllmConfig, config: SelectionConfig) -> Iterator[str]:
    """See :meth:`Adapter.selection_refusals`."""
    from vllm.platforms import current_platform

    without = "or leave selection.budget and selection.pages out"
    model, cache = vllm_config.model_config, vllm_config.cache_config
    if not current_platform.is_cpu():
        yield (
            "selection works on CPUs only: on GPUs pages must be chosen inside captured steps, "
            "for which there are kernels but no attention backend yet; leave selection.budget and "
            "selection.pages out"
        )
    if cache.cache_dtype not in ("auto", "float16", "bfloat16"):
        yield (
            f"selection: kv_cache_dtype is {cache.cache_dtype!r}, whose keys have no bounds; set "
            f"it to 'auto', {without}"
        )
    if vllm_config.speculative_config is not None:
        yield (
            "selection: speculative decoding verifies several tokens of a request at once, which "
            f"would read all pages; leave --speculative-config out, {without}"
        )
    if model.use_mla:
        yield (
            f"selection: {model.model} uses multi-head latent attention; choose a model with "
            f"separate K and V, {without}"
        )
    layers = model.get_num_layers(vllm_config.parallel_config)
    if config.exempt_layers >= layers:
        yield (
            f"selection.exempt_layers is {config.exempt_layers}, and {model.model} has {layers} "
            f"layers; lower it, {without}"
        )
    if vllm_config.parallel_config.use_ubatching:
        yield (
            "selection: micro-batches (enable_dbo or ubatch_size) split the rows of a batch; leave "
            f"them off, {without}"
        )
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        impl = getattr(layer, "impl", None)
        if type(impl) is CPUAttentionBackendImpl and (
            impl.alibi_slopes is not None or impl.sinks is not None
        ):
            yield (
                f"selection: attention layer {name} has ALiBi biases or sinks; choose another "
                f"model, {without}"
            )
            return


def selector_refusals(
    vllm_config: VllmConfig, runner: object, group: CacheGroup, caches: Mapping[str, Tensor]
) -> Iterator[str]:
    """See :meth:`Adapter.selector_refusals`."""
    for builder in group_builders(runner, group):
        if not isinstance(builder, SelectingBuilder):
            yield (
                f"selection: attention layer {builder.layer_names[0]} builds its metadata with "
                f"{type(builder).__name__}; leave selection.budget and selection.pages out"
            )
    for layer in full_layers(vllm_config):
        if type(layer.impl) is not CPUAttentionBackendImpl:
            yield (
                f"selection: attention layer {layer.layer_name} is {type(layer.impl).__name__}, "
                "not vLLM's attention on CPUs; leave selection.budget and selection.pages out"
            )
            return
    for name in group.layers:
        cache = caches.get(name)
        if cache is not None and cache.stride(0) != cache.shape[1] * cache.stride(1):
            yield (
                f"selection: the cache of {name} is not head-major; leave selection.budget and "
                "selection.pages out"
            )
            return
