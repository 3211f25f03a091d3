"""Where K and V of each slot and channel lie inside a block, for any attention backend.

vLLM's caches share one logical shape, ``[blocks, heads, slots, K|V channels]``, but a backend may
arrange a block as its kernels need it: the CPU backend puts all K before all V and transposes or
packs them by instruction set (vllm/v1/attention/backends/cpu_attn.py). So the arrangement is
determined by a test: known numbers are written through the backend's own cache update into a
scratch block and looked up again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

_AS_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_FP8_MARGIN = 1 + 1 / 64  # above what 16-bit types round away, below half a step of fp8
_DIGIT_BITS = 3  # 0..7 is exact in every cache type, fp8 included


class LayoutUnknown(ValueError):  # noqa: N818 - a finding about a backend, not a fault
    """The backend's cache update does not place each value exactly once; the text says what."""


class RotaryTable(NamedTuple):
    """What rotates a layer's keys.

    Attributes:
        table: ``[positions, channels]`` cosines, then sines.
        neox: whether it turns halves of a head's channels, or neighbours.
        kind: of what class the model's rotary embedding is, for messages.
    """

    table: Tensor
    neox: bool
    kind: str


class CachedLayer(Protocol):
    """An attention layer, as far as its KV cache goes. Made by the adapter of a vLLM version."""

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of K and V before they are cached."""
        ...

    @property
    def cache_dtype(self) -> str:
        """The engine's ``kv_cache_dtype``."""
        ...

    @property
    def scales(self) -> tuple[float, float]:
        """What stored keys and values are multiplied with when they are read: 1 but for fp8.

        Raises:
            LayoutUnknown: it is not the same for all heads.
        """
        ...

    @property
    def rotary(self) -> RotaryTable | None:
        """None if the layer's keys are not rotated by a table."""
        ...

    def write(self, keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
        """Write K and V, each ``[tokens, heads, channels]``, into slots of a cache, as the layer's
        backend does it.

        Raises:
            LayoutUnknown: the backend cannot do that by itself.
        """
        ...


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Places of K and V inside one head of one block.

    Attributes:
        slots: token slots in a block.
        channels: channels of one head.
        keys: ``[slots * channels]`` int64 places of K in the flattened ``slots x (K|V)`` region.
        values: the same of V.
        stored_as: the cache's real element type, where vLLM keeps fp8 as bytes.
        scales: of keys and of values: what is stored times its scale is what was written.
    """

    slots: int
    channels: int
    keys: Tensor
    values: Tensor
    stored_as: torch.dtype
    scales: tuple[float, float] = (1.0, 1.0)
    _strides: tuple[_Strides | None, _Strides | None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found = _Strides.of(self.keys), _Strides.of(self.values)
        object.__setattr__(self, "_strides", found)  # the class is frozen

    @classmethod
    def learn(cls, layer: CachedLayer, kv_cache: Tensor) -> KVLayout:
        """Find the layout of ``layer``'s cache.

        Args:
            layer: its backend writes the scratch block.
            kv_cache: ``[blocks, heads, slots, 2 * channels]``, the layer's cache; not modified.

        Raises:
            LayoutUnknown: see there.
        """
        if kv_cache.ndim != 4 or kv_cache.shape[-1] != 2 * layer.head_size:
            raise LayoutUnknown(
                f"its cache has shape {tuple(kv_cache.shape)}, not [blocks, heads, slots, "
                f"{2 * layer.head_size}]"
            )
        _, heads, slots, width = kv_cache.shape
        channels = width // 2
        numbers = torch.arange(2 * slots * channels, device=kv_cache.device)
        found = torch.zeros_like(numbers)
        stored_as = _stored_as(layer, kv_cache)
        slot_mapping = torch.arange(slots, device=kv_cache.device)
        for shift in range(0, int(numbers[-1]).bit_length(), _DIGIT_BITS):
            digits = (numbers >> shift) & ((1 << _DIGIT_BITS) - 1)
            by_slot = digits.view(2, slots, 1, channels).expand(-1, -1, heads, -1)
            keys, values = _as_written(by_slot, layer, stored_as)
            scratch = torch.zeros_like(kv_cache[:1])
            layer.write(keys.contiguous(), values.contiguous(), scratch, slot_mapping)
            found += scratch.view(stored_as)[0, 0].float().flatten().round().long() << shift
        places = torch.full_like(numbers, -1)
        places[found.clamp(0, len(numbers) - 1)] = numbers
        if not torch.equal(torch.sort(found).values, numbers):
            raise LayoutUnknown("its cache update rounds, drops or repeats values")
        keys_at, values_at = places.chunk(2)
        return cls(slots, channels, keys_at, values_at, stored_as, layer.scales)

    def gather(self, kv_cache: Tensor, block_ids: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of some blocks, each ``[blocks, heads, slots, channels]`` float32, copied."""
        shape = (2, len(block_ids), kv_cache.shape[1], self.slots, self.channels)
        keys, values = torch.empty(shape, device=kv_cache.device)
        self.gather_into(kv_cache, block_ids, keys, values)
        return keys, values

    def gather_into(
        self, kv_cache: Tensor, block_ids: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """The same, into tensors that are there: ``[blocks, heads, slots, channels]`` float32,
        each head's part of a block contiguous."""
        # Index the stored bytes first: torch cannot index every fp8 type.
        heads = kv_cache.index_select(0, block_ids).view(self.stored_as).flatten(2)
        for target, places, strides, scale in zip(
            (keys, values), (self.keys, self.values), self._strides, self.scales, strict=True
        ):
            if strides is None:
                target.copy_(heads.float().index_select(2, places).view(target.shape))
            else:  # a tenth of the time
                found = strides.read(heads)
                target.view(*target.shape[:2], *strides.sizes).copy_(found)
            if scale != 1.0:
                target.mul_(scale)

    def gather_tokens(
        self, kv_cache: Tensor, block_ids: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """K and V of some tokens, each ``[N, heads, channels]`` float32, copied.

        Args:
            kv_cache: the layer's cache.
            block_ids: ``[N]`` int64.
            slots: ``[N]`` int64, slot of each token in its block.
        """
        heads = torch.arange(kv_cache.shape[1], device=kv_cache.device)[:, None]
        width = kv_cache.shape[3]
        tensors = []
        for places, scale in zip((self.keys, self.values), self.scales, strict=True):
            at = places.view(self.slots, self.channels)[slots][:, None, :]
            stored = kv_cache[block_ids[:, None, None], heads, at // width, at % width]
            read = stored.view(self.stored_as).float()
            tensors.append(read if scale == 1.0 else read.mul_(scale))
        return tensors[0], tensors[1]


class _Strides(NamedTuple):
    """Places that nested strides go through, in order: what every backend of vLLM has."""

    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    first: int

    @classmethod
    def of(cls, places: Tensor) -> _Strides | None:
        """The strides of these places; None if there are none."""
        numbers = places.tolist()
        sizes: list[int] = []
        steps: list[int] = []
        while len(numbers) > 1:
            step, run = numbers[1] - numbers[0], 2
            while run < len(numbers) and numbers[run] - numbers[run - 1] == step:
                run += 1
            while len(numbers) % run:
                run -= 1
            if run == 1 or step < 0:
                return None
            sizes.insert(0, run)
            steps.insert(0, step)
            numbers = numbers[::run]
        found = cls(tuple(sizes), tuple(steps), numbers[0])
        gone_through = found.view(torch.arange(int(places.max()) + 1)[None, None]).flatten()
        return found if torch.equal(gone_through, places.cpu()) else None

    def read(self, heads: Tensor) -> Tensor:
        """The same as :meth:`view`; copied where neighbours can be copied as one number."""
        run = self.sizes[-1] if self.steps[-1] == 1 else 1
        whole = _AS_INTEGERS.get(run * heads.itemsize)
        numbers = (self.first, heads.shape[-1], *self.steps[:-1])
        if run == 1 or whole is None or any(number % run for number in numbers):
            return self.view(heads)
        steps = tuple(step // run for step in self.steps[:-1])
        joined = _Strides(self.sizes[:-1], steps, self.first // run)
        found: Tensor = joined.view(heads.view(whole)).contiguous().view(heads.dtype)
        return found.view(*found.shape[:-1], -1, run)

    def view(self, heads: Tensor) -> Tensor:
        """Those places of each head's contiguous region, ``[blocks, heads, places]``, as a view."""
        steps = (*heads.stride()[:2], *self.steps)
        return heads.as_strided((*heads.shape[:2], *self.sizes), steps, self.first)


def _as_written(digits: Tensor, layer: CachedLayer, stored_as: torch.dtype) -> Tensor:
    """What a backend must be given to store ``digits``, ``[2, slots, heads, channels]``."""
    if stored_as.itemsize > 1:
        return digits.to(stored_as)
    # It divides by the scale, which is not exact, and may cut off what fp8 cannot hold, or round
    # it. A little more than the digit becomes the digit either way.
    scales = torch.tensor(layer.scales, device=digits.device).view(2, 1, 1, 1)
    return (digits * (scales * _FP8_MARGIN)).to(layer.dtype)


def _stored_as(layer: CachedLayer, kv_cache: Tensor) -> torch.dtype:
    if kv_cache.dtype.itemsize > 1:
        return kv_cache.dtype
    return torch.float8_e5m2 if "e5m2" in layer.cache_dtype else torch.float8_e4m3fn
