"""Attention whose cached values have low-rank columns, for the models that agents use.

A model is built and loaded by vLLM as always, with LoRA layers around its projections. Then each of
its attention modules changes its class to one of those below, which caches the base model's values
and, behind them, the low-rank part ``x A`` of the family's adapters. What a reader's adapter makes
of that is added to attention's output. All else, weights, LoRA slots, tensor parallelism, stays
vLLM's.

The class changes after loading, not in the registry of models: vLLM builds the attention of Qwen's
decoder layers without asking for its class, and whatever starts an engine needs no option.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.llama import LlamaAttention
from vllm.model_executor.models.mistral import MistralAttention
from vllm.model_executor.models.qwen2 import Qwen2Attention
from vllm.model_executor.models.qwen3 import Qwen3Attention

from memshare.agents.values import apply_up, pad_heads, widen_values
from memshare.engine.vllm_0_32.value_layout import ValueLayout, layout_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from memshare.agents.family import Family

_Q, _V = 0, 2  # slices of vLLM's packed projection of queries, keys and values

ARCHITECTURES = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
)  # fmt: skip
"""Models whose attention is one of the classes below, and no subclass of it."""


class SharedValues(nn.Module):
    """What an attention module of vLLM does differently when adapters share its cache.

    Mixed into the module's own class by :func:`share_values`, which then calls :meth:`begin`.
    """

    # Of vLLM's modules, all four alike.
    attn: Attention
    qkv_proj: Any
    o_proj: Any
    rotary_emb: Any
    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_size: int
    kv_size: int
    scaling: float
    # Ours.
    value_down: Tensor
    slot_columns: Tensor

    def begin(self, down: Tensor, slot_columns: Tensor, attn: Attention) -> None:
        """Take what sharing needs.

        Args:
            down: A matrices of the family on this layer's values, ``[width, hidden]``.
            slot_columns: low-rank columns that each slot's adapter reads, ``[slots, rank]``; one
                tensor for all layers, changed in place when an adapter is loaded.
            attn: attention with room for the columns.
        """
        self.register_buffer("value_down", down, persistent=False)
        self.register_buffer("slot_columns", slot_columns, persistent=False)
        self.attn = attn

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """As vLLM's, ``[tokens, hidden]`` to ``[tokens, hidden]``."""
        projection = self.qkv_proj
        qkv, _ = projection.base_layer(hidden_states)
        punica = projection.punica_wrapper
        punica.add_lora_linear(
            qkv, hidden_states, (projection.lora_a_stacked[_Q],), (projection.lora_b_stacked[_Q],),
            1.0, (self.q_size,),
        )  # fmt: skip
        query, key, value = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        query, key = self.place(positions, query, key)
        low_rank = functional.linear(hidden_states, self.value_down)
        size, value_size = self.attn.head_size, self.attn.head_size_v
        if size != self.head_dim:
            query = pad_heads(query.contiguous(), self.num_heads, size)
            key = pad_heads(key.contiguous(), self.num_kv_heads, size)
        value = widen_values(value.contiguous(), low_rank, self.num_kv_heads, value_size)
        attended = self.attn(query, key, value).view(-1, self.num_heads, value_size)
        own = attended[..., : self.head_dim]
        columns = attended[..., self.head_dim : self.head_dim + low_rank.shape[-1]]
        # The buffer, not the wrapper's property, whose length is a number of the last batch: graphs
        # are longer. What stands behind the batch adds nothing, or nothing that is read.
        slots = punica._token_lora_indices[: hidden_states.shape[0]]
        own = own + apply_up(
            columns, slots, self.slot_columns, projection.lora_b_stacked[_V], self.num_kv_heads
        )
        output, _ = self.o_proj(own.reshape(-1, self.q_size))
        return cast(Tensor, output)

    def place(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as they are attended to and cached: rotated to their positions."""
        return cast("tuple[Tensor, Tensor]", self.rotary_emb(positions, query, key))

    def normalise_heads(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, each head through the module's norms."""
        by_head: Any = self
        return (
            by_head.q_norm(query.view(-1, self.num_heads, self.head_dim)).view(query.shape),
            by_head.k_norm(key.view(-1, self.num_kv_heads, self.head_dim)).view(key.shape),
        )


class SharedLlamaAttention(SharedValues, LlamaAttention):
    """Llama's."""


class SharedMistralAttention(SharedValues, MistralAttention):
    """Mistral's, whose queries may grow with their position."""

    def place(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`SharedValues.place`."""
        query, key = super().place(positions, query, key)
        if self.do_llama_4_scaling:
            query = (query * self._get_llama_4_attn_scale(positions)).to(query.dtype)
        return query, key


class SharedQwen2Attention(SharedValues, Qwen2Attention):
    """Qwen 2's, with norms in some models."""

    def place(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`SharedValues.place`."""
        if self.qk_norm:
            query, key = self.normalise_heads(query.contiguous(), key.contiguous())
        return super().place(positions, query, key)


class SharedQwen3Attention(SharedValues, Qwen3Attention):
    """Qwen 3's, with norms."""

    def place(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`SharedValues.place`."""
        query, key = self.normalise_heads(query.contiguous(), key.contiguous())
        return super().place(positions, query, key)


SHARED: dict[type[nn.Module], type[SharedValues]] = {
    LlamaAttention: SharedLlamaAttention,
    MistralAttention: SharedMistralAttention,
    Qwen2Attention: SharedQwen2Attention,
    Qwen3Attention: SharedQwen3Attention,
}
"""The class that a module's own class is exchanged for. Exact classes: a subclass may do more."""


def value_refusals(vllm_config: VllmConfig, width: int) -> Iterator[str]:
    """See :meth:`Adapter.value_refusals`."""
    model = vllm_config.model_config
    if model.architecture not in ARCHITECTURES:
        yield (
            f"{model.model} is a {model.architecture}; values get low-rank columns in "
            f"{', '.join(ARCHITECTURES)}: choose such a model, or set agents.scheme to 'nonshared'"
        )
        return
    text = model.hf_text_config
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()) or (
        vllm_config.cache_config.sliding_window is not None
    ):
        yield (
            f"{model.model} attends to a sliding window; choose a model with full attention, or "
            "set agents.scheme to 'nonshared'"
        )
    if getattr(text, "dual_chunk_attention_config", None):
        yield (
            f"{model.model} attends in two chunks (dual_chunk_attention_config); choose another "
            "model, or set agents.scheme to 'nonshared'"
        )
    if layout_of(vllm_config, width) is None:
        yield (
            f"heads of {model.get_head_size()} with {width} low-rank columns are wider than vLLM's "
            "attention on CPUs takes; use fewer adapters, lower ranks, or agents.scheme "
            "'base_lr_shared'"
        )


def share_values(
    vllm_config: VllmConfig, model: nn.Module, family: Family, slot_columns: Tensor
) -> None:
    """Let a model that has just been loaded, with LoRA, cache low-rank columns.

    Args:
        vllm_config: of the engine.
        model: not run yet.
        family: whose adapters will read them.
        slot_columns: see :meth:`SharedValues.begin`.

    Raises:
        TypeError: the model has attention of a class that is not known here.
    """
    text = vllm_config.model_config.hf_text_config
    down = family.value_down(text.num_hidden_layers, text.hidden_size)
    layout = layout_of(vllm_config, family.width)
    assert layout is not None, "see value_refusals"
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "attn", None), Attention)
    }
    for name, module in found.items():
        shared = SHARED.get(type(module))
        if shared is None:
            raise TypeError(f"{name} is a {type(module).__name__}, whose values cannot be shared")
        module.__class__ = shared
        ours = cast(SharedValues, module)
        weight = next(ours.qkv_proj.base_layer.parameters())
        layer = int(name.rpartition("layers.")[2].partition(".")[0])
        dtype = cast(torch.dtype, vllm_config.model_config.dtype)
        attn = _wide_attention(vllm_config, ours, layout, weight.device)
        ours.begin(down[layer].to(weight.device, dtype), slot_columns, attn)


def _wide_attention(
    vllm_config: VllmConfig, module: SharedValues, layout: ValueLayout, device: torch.device
) -> Attention:
    """The module's attention again, with wider heads, in its place among the engine's layers."""
    from vllm.config import set_current_vllm_config
    from vllm.utils.torch_utils import set_default_torch_dtype

    old = module.attn
    dtype = cast(torch.dtype, vllm_config.model_config.dtype)
    del vllm_config.compilation_config.static_forward_context[old.layer_name]
    with set_current_vllm_config(vllm_config), set_default_torch_dtype(dtype), device:
        attn = Attention(
            module.num_heads,
            layout.keys,
            module.scaling,
            num_kv_heads=module.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=None,  # weights are the projections'; the cache is not quantised
            prefix=old.layer_name,
            attn_backend=layout.backend,
            head_size_v=layout.values,
        )
    attn.process_weights_after_loading(dtype)
    return attn
