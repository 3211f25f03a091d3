"""Which experts a step's tokens chose, in a worker: vLLM's own buffer for routed experts, bound to
the model's routers, without what ``enable_return_routed_experts`` needs besides (Triton, and room
for the ids of every cached token).

Routers write by an operation that CUDA graphs can hold; what they have written is looked at when it
is wanted. Where steps are no graphs, they write in those steps alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
    RoutedExpertsCapturer,
    RoutedExpertsCaptureSource,
    bind_routed_experts_capturer,
)
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class _Capturer(RoutedExpertsCapturer):
    listens = True  # while graphs are made, so that they hold the operation

    def capture(self, layer_id: int, topk_ids: Tensor) -> None:
        if self.listens:
            super().capture(layer_id, topk_ids)


class RoutedExperts:
    """An :class:`~memshare.core.interfaces.ExpertRouting` of vLLM's own buffer."""

    def __init__(self, vllm_config: VllmConfig, model: torch.nn.Module) -> None:
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._capturer = _Capturer(tokens, vllm_config)
        self._is_eager = vllm_config.model_config.enforce_eager
        bind_routed_experts_capturer(model, self._capturer)
        self._layers = tuple(sorted(_layers(model)))
        device = self._capturer.device_buffer.device
        self._index = torch.tensor(self._layers, device=device)
        experts = vllm_config.model_config.get_num_experts()
        self._counts = torch.zeros(len(self._layers), experts, dtype=torch.int32, device=device)

    @property
    def layers(self) -> tuple[int, ...]:
        """See :attr:`ExpertRouting.layers`."""
        return self._layers

    def listen(self, on: bool) -> None:
        """See :meth:`ExpertRouting.listen`. Code that is compiled keeps what it was made with."""
        if self._is_eager:
            self._capturer.listens = on

    def ids(self, tokens: int) -> Tensor:
        """See :meth:`ExpertRouting.ids`."""
        return self._capturer.device_buffer[:tokens].index_select(1, self._index)

    def counts(self, tokens: int) -> Tensor:
        """See :meth:`ExpertRouting.counts`."""
        ids = self.ids(tokens).transpose(0, 1).flatten(1).long()
        ones = torch.ones((), dtype=torch.int32, device=ids.device).expand(ids.shape)
        return self._counts.zero_().scatter_add_(1, ids, ones)


def routing_refusals(vllm_config: VllmConfig) -> Iterator[str]:
    """See :meth:`Adapter.expert_refusals`."""
    model = vllm_config.model_config
    if not model.get_num_experts():
        yield (
            f"experts.count_every: {model.model} has no experts to count\n"
            "    fix: set experts.count_every to 0"
        )
    if vllm_config.aux_output_config.enable_return_routed_experts:
        yield (
            "experts.count_every: vLLM's enable_return_routed_experts listens to the same routers\n"
            "    fix: set experts.count_every to 0, or leave that option out"
        )


def _layers(model: torch.nn.Module) -> Iterator[int]:
    for module in model.modules():
        if isinstance(module, RoutedExpertsCaptureSource | MoERunner):
            yield module.layer_id
