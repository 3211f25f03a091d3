"""An fp8 KV cache for a transformers model, as vLLM's ``kv_cache_dtype="fp8"`` rounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


class Fp8Cache(DynamicCache):
    """Every key and value is rounded to e4m3 when it is cached, and read back as it was rounded.

    Scales are 1, as vLLM's are where neither checkpoint nor calibration has others
    (``vllm/model_executor/layers/quantization/kv_cache.py``), and what is out of range becomes the
    largest number.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Cache what a layer has computed; returns the layer's whole cache."""
        whole: tuple[Tensor, Tensor] = super().update(
            to_fp8(key_states), to_fp8(value_states), *args, **kwargs
        )
        return whole


def to_fp8(tensor: Tensor) -> Tensor:
    """The nearest numbers of e4m3, in the tensor's own type."""
    return tensor.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).to(tensor.dtype)
