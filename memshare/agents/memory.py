"""What a token's KV takes under each scheme."""

from __future__ import annotations

from dataclasses import dataclass

from memshare.agents.base import BaseModelFacts


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """Widths of a head in the cache, in elements.

    Attributes:
        keys: of a key.
        values: of a value with its low-rank columns.
    """

    keys: int
    values: int

    def bytes_per_token(self, base: BaseModelFacts, element: int) -> int:
        """Of all layers and KV heads.

        Args:
            base: the base model.
            element: bytes of one number.
        """
        return base.layers * base.kv_heads * (self.keys + self.values) * element


def plain(base: BaseModelFacts) -> HeadLayout:
    """Without low-rank columns: what vLLM caches for one adapter."""
    return HeadLayout(base.head_dim, base.head_dim)


def widened(base: BaseModelFacts, width: int) -> HeadLayout:
    """With ``width`` low-rank columns, where keys and values may differ in width (GPUs)."""
    return HeadLayout(base.head_dim, base.head_dim + width)


def padded(base: BaseModelFacts, width: int, sizes: list[int]) -> HeadLayout | None:
    """The same where both must have one of a few widths (CPUs); None if none is large enough."""
    size = next((size for size in sorted(sizes) if size >= base.head_dim + width), None)
    return None if size is None else HeadLayout(size, size)
