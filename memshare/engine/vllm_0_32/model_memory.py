"""A model's weights and KV cache as vLLM would lay them out, from its configuration alone.

The model is built the way vLLM's workers build it, but on torch's ``meta`` device: layers and
shapes are all there, no weight is read and no memory is taken. What its layers then say about their
caches goes through vLLM's own planner, the one that counts the blocks of an engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

    from memshare.agents.memory import HeadLayout


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """What one worker of a model holds.

    Attributes:
        weight_bytes: all weights, divided by the tensor-parallel size. The few that every rank
            keeps whole, such as norms, are counted as if they were divided, too.
        lora_bytes: vLLM's slots for LoRA adapters, which take the same whether they are used.
        layers: the KV cache of each layer that has one, with this worker's heads.
    """

    weight_bytes: int
    lora_bytes: int
    layers: dict[str, KVCacheSpec]


def read_model_memory(vllm_config: VllmConfig, heads: HeadLayout | None = None) -> ModelMemory:
    """Build the model without weights. Not in a process that is to run an engine, too: vLLM keeps
    tensors that models share, such as rotary embeddings, in global tables.

    Args:
        vllm_config: as an engine would get it. Its layers and its KV cache layout are set here.
        heads: widths of cached heads where adapters share; the model's own if None.

    Raises:
        Exception: whatever vLLM raises for a model that it cannot build.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_default_torch_dtype

    ranks = vllm_config.parallel_config.tensor_parallel_size
    dtype = cast(torch.dtype, vllm_config.model_config.dtype)
    with set_current_vllm_config(vllm_config), one_rank():
        with torch.device("meta"), set_default_torch_dtype(dtype):
            model = initialize_model(vllm_config)
        current_platform.update_block_size_for_backend(vllm_config)
        layers = {name: _of_one(spec, ranks) for name, spec in _specs(vllm_config)}
        _resolve_layout(vllm_config, layers)
        weight_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        lora_bytes = _lora_bytes(vllm_config, model, ranks)
    if heads is not None:
        layers = {name: _widened(spec, heads) for name, spec in layers.items()}
    return ModelMemory(weight_bytes // ranks, lora_bytes, layers)


def plan_cache(vllm_config: VllmConfig, model_memory: ModelMemory, kv_bytes: int) -> KVCacheConfig:
    """The KV cache of one worker that has ``kv_bytes`` for it; allocates nothing.

    Raises:
        ValueError: not even one request of the greatest length fits; vLLM's text says how much is
            wanted.
    """
    from vllm.v1.core.kv_cache_utils import (
        generate_scheduler_kv_cache_config,
        get_kv_cache_configs,
    )

    plans = get_kv_cache_configs(vllm_config, [dict(model_memory.layers)], [kv_bytes])
    return generate_scheduler_kv_cache_config(plans)


@contextmanager
def one_rank() -> Iterator[None]:
    """vLLM's groups of ranks, with this process as the only one."""
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.utils.network_utils import get_file_store_init_method

    init_distributed_environment(1, 0, get_file_store_init_method(), 0, "gloo")
    try:
        initialize_model_parallel(1, 1)
        yield
    finally:
        destroy_model_parallel()
        destroy_distributed_environment()


def _lora_bytes(vllm_config: VllmConfig, model: nn.Module, ranks: int) -> int:
    """What one of ``ranks`` keeps for LoRA slots, in every projection that may have an adapter.
    Changes the model as vLLM's workers do (``LoRAModelRunnerMixin.load_lora_model``)."""
    from vllm.lora.layers import BaseLayerWithLoRA
    from vllm.lora.model_manager import create_lora_manager
    from vllm.model_executor.layers.linear import RowParallelLinear

    lora, scheduler = vllm_config.lora_config, vllm_config.scheduler_config
    if lora is None:
        return 0
    manager = create_lora_manager(
        cast(Any, model), scheduler.max_num_seqs, scheduler.max_num_batched_tokens,
        vllm_config.model_config.get_vocab_size(), lora, vllm_config, torch.device("meta"),
    )  # fmt: skip
    total = 0
    for layer in manager.modules.values():
        assert isinstance(layer, BaseLayerWithLoRA)
        halves: list[int] = []
        for half in ("lora_a_stacked", "lora_b_stacked"):
            found = getattr(layer, half, ())
            matrices: Sequence[Tensor] = (found,) if isinstance(found, Tensor) else found
            halves.append(sum(matrix.numel() * matrix.element_size() for matrix in matrices))
        # Of its two matrices each rank has its part of the one that its own weights are cut like.
        cut = 0 if isinstance(getattr(layer, "base_layer", None), RowParallelLinear) else 1
        halves[cut] //= ranks
        total += sum(halves)
    return total


def _specs(vllm_config: VllmConfig) -> Iterator[tuple[str, KVCacheSpec]]:
    """As vLLM's model runner collects them (``GPUModelRunner.get_kv_cache_spec``)."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    kind = cast(type[Any], AttentionLayerBase)
    for name, layer in get_layers_from_vllm_config(vllm_config, kind).items():
        if getattr(layer, "kv_sharing_target_layer_name", None):
            continue  # uses another layer's cache
        if (spec := layer.get_kv_cache_spec(vllm_config)) is not None:
            yield name, spec


def _of_one(spec: KVCacheSpec, ranks: int) -> KVCacheSpec:
    """The part of a layer's cache that one of ``ranks`` holds; too few heads are copied."""
    from vllm.v1.kv_cache_interface import AttentionSpec, MLAAttentionSpec

    if not isinstance(spec, AttentionSpec) or isinstance(spec, MLAAttentionSpec):
        return spec
    return replace(spec, num_kv_heads=max(1, spec.num_kv_heads // ranks))


def _widened(spec: KVCacheSpec, heads: HeadLayout) -> KVCacheSpec:
    from vllm.v1.kv_cache_interface import AttentionSpec

    if not isinstance(spec, AttentionSpec):
        return spec
    return replace(spec, head_size=heads.keys, head_size_v=heads.values)


def _resolve_layout(vllm_config: VllmConfig, layers: dict[str, KVCacheSpec]) -> None:
    """What vLLM's engine asks of its workers before it counts blocks."""
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
    from vllm.v1.attention.backends.utils import (
        get_supported_kv_cache_layouts,
        resolve_kv_cache_layout,
    )

    supported = get_supported_kv_cache_layouts(get_current_attn_backends(vllm_config))
    names = [layout.name for layout in supported]
    resolve_kv_cache_layout(vllm_config, [names], list(layers.values()))
