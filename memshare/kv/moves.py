"""Moving tokens between slots of a paged cache, for each layer and KV head by itself.

K and V go as the bytes that they are, so no element type matters (fp8 caches are bytes anyway). Any
arrangement of a block works: places come from :class:`~memshare.kv.layout.KVLayout` and the
strides, and memory is written in place. (Flattening a cache would copy it where its heads and slots
are not stored in that order.) vLLM keeps the caches of all layers in one allocation; they are then
moved by one operation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memshare.kv.layout import KVLayout

_BYTES_AT_ONCE = 64 << 20  # copied in between: sources are read before targets are written
_CACHED_BYTES = 1 << 20  # of tokens that are moved part by part: a CPU's cache holds them
_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TokenMover:
    """Moves tokens of some layers' caches."""

    def __init__(
        self, caches: Sequence[Tensor], layouts: Sequence[KVLayout], block_size: int
    ) -> None:
        """Look where slots lie.

        Args:
            caches: ``[blocks, heads, slots, 2 * channels]`` of each layer, of one shape. Their
                blocks may be parts of the engine's, as many for each.
            layouts: of each.
            block_size: token slots in one of the engine's blocks.
        """
        self._block_size = block_size
        self._heads = caches[0].shape[1]
        alike: dict[object, list[int]] = {}
        for index, (cache, layout) in enumerate(zip(caches, layouts, strict=True)):
            storage = cache.untyped_storage().data_ptr()
            places = tuple(layout.keys.tolist()), tuple(layout.values.tolist())
            alike.setdefault((storage, cache.dtype, cache.stride(), places), []).append(index)
        self._pools = [
            _Pool.of(layers, [caches[layer] for layer in layers], layouts[layers[0]], part)
            for layers in alike.values()
            for part in _parts(caches[layers[0]], layouts[layers[0]])
        ]

    @property
    def launches(self) -> int:
        """Copies that move a few tokens of all layers."""
        return len(self._pools)

    @torch.inference_mode()
    def move(self, blocks: Tensor, sources: Tensor, targets: Tensor) -> None:
        """Copy tokens from slot to slot. On a GPU this only enqueues work.

        A slot is numbered through the given blocks: ``place in blocks * block_size + slot``. No
        target of a layer and head may be a source of another move there; a move onto itself does
        nothing.

        Args:
            blocks: ``[n]`` int64 ids, on the caches' device.
            sources: ``[layers, heads, moves]`` int64.
            targets: like ``sources``.
        """
        if sources.shape[2] == 0:
            return
        slots = torch.arange(self._block_size, device=blocks.device)
        for pool in self._pools:
            pool.move(blocks, slots, sources, targets)


@dataclass(frozen=True, slots=True)
class _Pool:
    """Caches of one allocation and arrangement, and one part of each of their slots.

    Attributes:
        units: ``[n, unit]`` view of the allocation: what is copied together.
        layers: which they are.
        offsets: ``[layers]`` units before block 0 of each.
        block, head: units from one to the next.
        places: ``[slots, parts]`` units from a head's begin to each part of a slot.
        steps: units from a slot's first part to each of its parts, where these are the same for all
            slots and the cache lies in a CPU's memory; else None.
    """

    units: Tensor
    layers: Tensor
    offsets: Tensor
    block: int
    head: int
    places: Tensor
    steps: tuple[int, ...] | None

    @classmethod
    def of(cls, layers: list[int], caches: list[Tensor], layout: KVLayout, places: Tensor) -> _Pool:
        first = caches[0].view(_AS_INTEGERS[caches[0].dtype.itemsize])
        offsets = [int(cache.storage_offset()) for cache in caches]
        unit = _unit(places, [*first.stride()[:2], *offsets])
        length = first.untyped_storage().nbytes() // first.itemsize // unit
        device = first.device
        parts = places[:, ::unit].to(device) // unit
        return cls(
            units=torch.as_strided(first, (length, unit), (unit, 1), 0),
            layers=torch.tensor(layers, device=device),
            offsets=torch.tensor(offsets, device=device) // unit,
            block=first.stride(0) // unit,
            head=first.stride(1) // unit,
            places=parts,
            steps=_steps(parts) if unit * first.itemsize in _AS_INTEGERS else None,
        )

    def move(self, blocks: Tensor, slots: Tensor, sources: Tensor, targets: Tensor) -> None:
        own, parts = self.places.shape
        split = len(slots) // own  # the cache's blocks in one of the engine's
        inner = blocks[:, None] * split + slots // own
        at = (inner * self.block)[:, :, None] + self.places[slots % own]
        at = at.flatten(0, 1)  # [slots of all blocks, parts]
        heads = torch.arange(sources.shape[1], device=blocks.device) * self.head
        if self.steps is not None:
            self._move_part_by_part(at[:, 0], heads, sources, targets)
            return
        per_layer = sources[0].numel() * parts * self.units.shape[1] * self.units.itemsize
        step = max(1, _BYTES_AT_ONCE // per_layer)
        for start in range(0, len(self.layers), step):
            chosen = slice(start, start + step)
            begin = (self.offsets[chosen, None] + heads)[:, :, None, None]
            layers = self.layers[chosen]
            here, there = (
                (begin + at[slot.index_select(0, layers)]).flatten() for slot in (sources, targets)
            )
            self.units.index_copy_(0, there, self.units.index_select(0, here))

    def _move_part_by_part(
        self, at: Tensor, heads: Tensor, sources: Tensor, targets: Tensor
    ) -> None:
        """Move what consists of many small parts, all tokens' first parts, then their second ones.

        The numbers of slots are then worked out once a token, and not once for each of its parts.
        """
        assert self.steps is not None
        width = self.units.shape[1] * self.units.itemsize
        memory = self.units.view(_AS_INTEGERS[width]).flatten().numpy()
        per_layer = sources[0].numel() * len(self.steps) * width
        some = max(1, _CACHED_BYTES // per_layer)
        for start in range(0, len(self.layers), some):
            chosen = slice(start, start + some)
            begin = (self.offsets[chosen, None] + heads)[:, :, None]
            layers = self.layers[chosen]
            here, there = (
                (begin + at[slot.index_select(0, layers)]).flatten().numpy()
                for slot in (sources, targets)
            )
            for step in self.steps:
                part = memory[step:]
                part[there] = part.take(here)


def _steps(parts: Tensor) -> tuple[int, ...] | None:
    steps = parts[:1] - parts[:1, :1]
    if parts.device.type != "cpu" or parts.shape[1] == 1 or (parts[:, :1] + steps != parts).any():
        return None
    return tuple(steps[0].tolist())


def _parts(cache: Tensor, layout: KVLayout) -> list[Tensor]:
    """Elements of each slot from the begin of a head's part of a block, ``[slots, elements]``
    ascending: K and V together where a slot is one run, else each by itself, since one of them may
    be."""
    region = [places.view(layout.slots, layout.channels) for places in (layout.keys, layout.values)]
    width = cache.shape[3]
    keys, values = (
        (part // width * cache.stride(2) + part % width * cache.stride(3)).sort(1).values.cpu()
        for part in region
    )
    both = torch.cat((keys, values), 1).sort(1).values
    strides = cache.stride()[:2]
    return [both] if _unit(both, strides) >= layout.channels else [keys, values]


def _unit(places: Tensor, strides: Sequence[int]) -> int:
    """The longest run of elements of which every slot consists, at multiples of its length."""
    begins = torch.ones_like(places, dtype=torch.bool)
    begins[:, 1:] = places.diff(dim=1) != 1
    columns = begins.nonzero()[:, 1]
    return math.gcd(places.shape[1], *columns.tolist(), *places[begins].tolist(), *strides)
