"""A model's attention layers, as far as their KV caches go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memshare.kv.layout import LayoutUnknown, RotaryTable

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention import Attention


class VllmLayer:
    """A :class:`~memshare.kv.layout.CachedLayer` of vLLM's own layer."""

    def __init__(self, layer: Attention, model: torch.nn.Module, name: str) -> None:
        self._layer = layer
        self._model = model
        self._name = name

    @property
    def head_size(self) -> int:
        """See :attr:`CachedLayer.head_size`."""
        return int(self._layer.head_size)

    @property
    def dtype(self) -> torch.dtype:
        """See :attr:`CachedLayer.dtype`."""
        dtype: torch.dtype = self._layer.dtype
        return dtype

    @property
    def cache_dtype(self) -> str:
        """See :attr:`CachedLayer.cache_dtype`."""
        return str(self._layer.kv_cache_dtype)

    @property
    def scales(self) -> tuple[float, float]:
        """See :attr:`CachedLayer.scales`. vLLM leaves them alone once weights are loaded."""
        if not self.cache_dtype.startswith("fp8"):
            return 1.0, 1.0
        layer: Any = self._layer
        if layer._k_scale.numel() > 1 or layer._v_scale.numel() > 1:
            raise LayoutUnknown("each head has an fp8 scale of its own")
        return float(layer._k_scale_float), float(layer._v_scale_float)

    @property
    def rotary(self) -> RotaryTable | None:
        """See :attr:`CachedLayer.rotary`. The module that rotates stands beside the layer."""
        parent = self._model.get_submodule(self._name.rpartition(".")[0])
        rotary = getattr(parent, "rotary_emb", None)
        table = getattr(rotary, "cos_sin_cache", None)
        if rotary is None or not isinstance(table, Tensor):
            return None
        return RotaryTable(table, bool(rotary.is_neox_style), type(rotary).__name__)

    def write(self, keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
        """See :meth:`CachedLayer.write`."""
        update = getattr(self._layer.impl, "do_kv_cache_update", None)
        if update is None:
            raise LayoutUnknown(f"{type(self._layer.impl).__name__} has no cache update of its own")
        update(self._layer, keys, values, cache, slots)


class _Layers(Mapping[str, VllmLayer]):
    """Made when asked for: few of them are looked at."""

    def __init__(self, layers: Mapping[str, Attention], model: torch.nn.Module) -> None:
        self._layers = layers
        self._model = model

    def __getitem__(self, name: str) -> VllmLayer:
        return VllmLayer(self._layers[name], self._model, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def layers_of(vllm_config: VllmConfig, model: torch.nn.Module) -> Mapping[str, VllmLayer]:
    """See :meth:`Adapter.attention_layers`."""
    own = {id(module) for module in model.modules()}
    layers = vllm_config.compilation_config.static_forward_context
    return _Layers({name: layer for name, layer in layers.items() if id(layer) in own}, model)
