"""A text as a transformers model has read it, and the caches that it is read with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CacheReading:
    """A text as the model has read it.

    Attributes:
        tokens: ``[P + C]`` token ids: prefix and continuation.
        prompt: tokens of the prompt.
        prefix: P.
        keys: ``[layers, heads, P, channels]`` as cached (rotated).
        values: the same of V.
        log_probs: ``[C, vocabulary]`` over the exact cache.
    """

    tokens: Tensor
    prompt: int
    prefix: int
    keys: Tensor
    values: Tensor
    log_probs: Tensor


def empty_cache(fp8: bool = False) -> Any:
    """A cache of transformers; with ``fp8``, one that rounds as vLLM's fp8 cache does."""
    if fp8:
        from memshare.lab.replay.fp8 import Fp8Cache

        return Fp8Cache()
    from transformers import DynamicCache

    return DynamicCache()


def filled_cache(keys: Tensor, values: Tensor, fp8: bool = False) -> Any:
    """One that holds these, each ``[layers, heads, tokens, channels]``."""
    cache = empty_cache(fp8)
    for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
        cache.update(k[None], v[None], layer)
    return cache


def cached(cache: Any, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the first tokens, each ``[layers, heads, length, channels]``."""
    keys = torch.stack([layer.keys[0, :, :length] for layer in cache.layers])
    values = torch.stack([layer.values[0, :, :length] for layer in cache.layers])
    return keys, values
