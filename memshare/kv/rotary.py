"""Compare keys as if they were at the same position.

A rotary embedding turns each pair of key channels by an angle proportional to the token's
position, so the cached keys of equal tokens far apart differ. Rotations compose: the key of a token
at position p, moved to position q, is the cached key turned by (q - p) steps. No key has to be
recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


class RotationUnknown(ValueError):  # noqa: N818 - a finding about a model, not a fault
    """This rotary embedding cannot be undone by turning; the text says why."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """The turn that one position step makes, tabulated.

    Attributes:
        cos: ``[positions, rotary_dim / 2]`` float32.
        sin: ``[positions, rotary_dim / 2]`` float32.
        neox: channel pairs are ``(i, i + rotary_dim / 2)`` if true, ``(2 i, 2 i + 1)`` if not.
    """

    cos: Tensor
    sin: Tensor
    neox: bool

    @classmethod
    def from_cache(cls, cos_sin_cache: Tensor, neox: bool) -> Self:
        """Read the table off a rotary module's ``cos_sin_cache``.

        Works for every variant whose angle is linear in the position (plain, linear scaling, NTK,
        Llama 3, YaRN), which is verified here, not assumed from a class name.

        Args:
            cos_sin_cache: ``[positions, rotary_dim]``: cosines, then sines
                (vllm/model_executor/layers/rotary_embedding/base.py).
            neox: the module's ``is_neox_style``.

        Raises:
            RotationUnknown: turns of this table do not add up.
        """
        if cos_sin_cache.ndim != 2 or cos_sin_cache.shape[1] % 2 != 0:
            raise RotationUnknown(f"its table has shape {tuple(cos_sin_cache.shape)}")
        cos, sin = cos_sin_cache.float().chunk(2, dim=-1)
        # YaRN scales both by one factor; a turn has length one.
        length = torch.sqrt(cos.square() + sin.square())
        if not torch.isfinite(length).all() or (length < 1e-3).any():
            raise RotationUnknown("its table does not hold cosines and sines")
        rotation = cls(cos / length, sin / length, neox)
        rotation._verify(torch.finfo(cos_sin_cache.dtype).eps)
        return rotation

    def _verify(self, table_eps: float) -> None:
        positions = self.cos.shape[0]
        angle_eps = torch.finfo(torch.float32).eps
        spread = torch.tensor([1, 2, 7, positions // 7, positions // 3]) % max(positions // 2, 1)
        for a in spread.tolist():
            for b in spread.tolist():
                cos = self.cos[a] * self.cos[b] - self.sin[a] * self.sin[b]
                sin = self.sin[a] * self.cos[b] + self.cos[a] * self.sin[b]
                error = max(
                    (cos - self.cos[a + b]).abs().max().item(),
                    (sin - self.sin[a + b]).abs().max().item(),
                )
                # Two roundings are allowed for: that of the table to its type, and that of the
                # angles, which are float32 products of a position and a frequency <= 1.
                if error > 4.0 * table_eps + 2.0 * (a + b) * angle_eps:
                    raise RotationUnknown(
                        f"turning by {a} and by {b} positions is not turning by {a + b} "
                        f"(off by {error:.3g})"
                    )

    def to(self, device: torch.device) -> Self:
        """The same, with its table on a device."""
        return type(self)(self.cos.to(device), self.sin.to(device), self.neox)

    def turn(self, keys: Tensor, steps: Tensor) -> Tensor:
        """Move keys by a number of positions.

        Args:
            keys: ``[blocks, heads, slots, channels]`` float32; not modified.
            steps: ``[blocks]`` int64, may be negative; |steps| < positions.

        Returns:
            A tensor of the shape of ``keys``. Where ``steps`` is 0 it equals ``keys`` exactly.
        """
        half = self.cos.shape[1]
        cos = self.cos[steps.abs()][:, None, None, :]
        sin = (self.sin[steps.abs()] * steps.sign()[:, None])[:, None, None, :]
        turned, rest = keys[..., : 2 * half], keys[..., 2 * half :]
        if self.neox:
            x, y = turned[..., :half], turned[..., half:]
            moved = torch.cat((x * cos - y * sin, y * cos + x * sin), dim=-1)
        else:
            x, y = turned[..., 0::2], turned[..., 1::2]
            moved = torch.stack((x * cos - y * sin, y * cos + x * sin), dim=-1).flatten(-2)
        return torch.cat((moved, rest), dim=-1)
