"""Which tokens move where when the kept ones of some blocks are packed into the first of them.

All tensors are ``[layers, heads, slots]``: each layer and KV head is packed by itself. Slots are
those of the packed entries, in the order of the table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moves(NamedTuple):
    """Tokens that change their slots.

    Attributes:
        sources: ``[layers, heads, moves]`` int64 slots. A layer and head with fewer moves than
            another has moves of a slot onto itself.
        targets: like ``sources``.
    """

    sources: Tensor
    targets: Tensor


def plan_moves(kept: Tensor, room: int) -> Moves:
    """Move kept tokens from behind the first ``room`` slots onto dropped ones among them.

    A kept token that lies in the first ``room`` slots stays where it is. Nothing is read back from
    a GPU; there the number of moves is what could be needed, and on a CPU what is.

    Args:
        kept: ``[layers, heads, slots]`` bool, ``room`` of them true in each layer and head.
        room: slots that remain, fewer than there are.
    """
    leaving, free = kept[..., room:], ~kept[..., :room]
    most = min(room, leaving.shape[-1])
    if kept.device.type == "cpu":
        most = int(leaving.sum(-1).max())
    return Moves(_positions(leaving, most, room), _positions(free, most, 0, pad=room))


def move_along(values: Tensor, moves: Moves, room: int) -> Tensor:
    """What is known of each token, after the moves: ``[layers, heads, room]``.

    Args:
        values: ``[layers, heads, slots]``, not modified.
        moves: from :func:`plan_moves`.
        room: as there.
    """
    moved = values.scatter(2, moves.targets, values.gather(2, moves.sources))
    return moved[..., :room].contiguous()


def _positions(mask: Tensor, most: int, first: int, pad: int | None = None) -> Tensor:
    """Where the mask is true, in order, ``[..., most]``; ``pad`` (or ``first``) behind the last.

    Args:
        mask: ``[..., slots]`` bool, at most ``most`` of them true.
        most: see above.
        first: number of the mask's first slot.
        pad: see above.
    """
    fill = first if pad is None else pad
    found = torch.full((*mask.shape[:-1], most + 1), fill, device=mask.device)
    place = torch.where(mask, mask.cumsum(-1) - 1, most)  # the last column takes what is false
    numbers = torch.arange(first, first + mask.shape[-1], device=mask.device)
    found.scatter_(-1, place, numbers.expand(mask.shape))
    return found[..., :most]
