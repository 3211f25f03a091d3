"""The arithmetic of values with low-rank columns: on any device, and of one shape whatever is in a
batch, so that CUDA graphs can hold it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def pad_heads(states: Tensor, heads: int, size: int) -> Tensor:
    """Queries or keys with zeros behind each head, ``[tokens, heads * size]``, which change no
    product of theirs.

    Args:
        states: ``[tokens, heads * head_dim]``.
        heads: heads in it.
        size: width of a head afterwards, at least ``head_dim``.
    """
    tokens = states.shape[0]
    by_head = states.view(tokens, heads, -1)
    return functional.pad(by_head, (0, size - by_head.shape[-1])).view(tokens, heads * size)


def widen_values(values: Tensor, low_rank: Tensor, kv_heads: int, size: int) -> Tensor:
    """Values with the low-rank part behind each head, ``[tokens, kv_heads * size]``.

    Args:
        values: of the base model, ``[tokens, kv_heads * head_dim]``.
        low_rank: of the same tokens, ``[tokens, width]``; every head gets all of it, because each
            has attention weights of its own.
        kv_heads: heads in ``values``.
        size: width of a head afterwards, at least ``head_dim + width``; the rest is zero.
    """
    tokens = values.shape[0]
    by_head = values.view(tokens, kv_heads, -1)
    shared = low_rank[:, None, :].expand(tokens, kv_heads, low_rank.shape[-1])
    wide = torch.cat([by_head, shared], dim=-1)
    return functional.pad(wide, (0, size - wide.shape[-1])).view(tokens, kv_heads * size)


def apply_up(attended: Tensor, slots: Tensor, columns: Tensor, up: Tensor, heads: int) -> Tensor:
    """What the readers' B matrices make of the attended low-rank part: one product for the whole
    batch, in which each token meets zeros in place of other adapters' matrices.

    Args:
        attended: low-rank columns of attention's output, ``[tokens, heads, width]``.
        slots: of each token's adapter, ``[tokens]``; any other number (vLLM has -1 for the base
            model) adds nothing.
        columns: low-rank columns that each slot's adapter reads, ``[slots, rank]``; those beyond
            its own rank may be any, because its B is zero there.
        up: the B matrices with their scale, ``[slots, kv_heads * head_dim, rank]``.
        heads: of keys and values.

    Returns:
        ``[tokens, heads, head_dim]``, to be added to attention's output.
    """
    tokens, all_heads, _ = attended.shape
    slot_count, rank = columns.shape
    own = slots[:, None] == torch.arange(slot_count, device=slots.device)  # [tokens, slots]
    picked = attended[..., columns.flatten()].view(tokens, all_heads, slot_count, rank)
    picked = picked * own[:, None, :, None].to(attended.dtype)
    group = all_heads // heads
    # [kv heads, tokens * group, slots * rank] @ [kv heads, slots * rank, head_dim]
    left = picked.view(tokens, heads, group, slot_count * rank).transpose(0, 1)
    right = up.view(slot_count, heads, -1, rank).permute(1, 0, 3, 2)
    product = torch.matmul(
        left.reshape(heads, tokens * group, slot_count * rank),
        right.reshape(heads, slot_count * rank, -1),
    )
    return product.view(heads, tokens, group, -1).transpose(0, 1).reshape(tokens, all_heads, -1)
