"""How much attention the tokens of a text get while it is read: what policies of the field see."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812 - as torch calls it
from torch import Tensor


class AttentionUse:
    """A :class:`~memshare.lab.probe.reader.Watcher` of a text that is read from its beginning.

    A query *uses* a token if it pays it more attention than it would by looking at all alike. All
    that is kept has the shape ``[KV heads, P]`` for each layer; query heads of a group count alike.

    Attributes:
        total: sum of attention from all queries, the token's own included.
        window: the same from the last queries.
        uses: how many queries have used the token.
        last_use: position of the last query that has, plus 1; 0 if none has.
    """

    def __init__(self, prefix: int, window: int) -> None:
        """Watch ``prefix`` tokens, of which the last ``window`` are those queries."""
        self.total: dict[int, Tensor] = {}
        self.window: dict[int, Tensor] = {}
        self.uses: dict[int, Tensor] = {}
        self.last_use: dict[int, Tensor] = {}
        self._prefix = prefix
        self._window = window

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """See :class:`~memshare.lab.probe.reader.Watcher`."""
        rows, columns, heads = queries.shape[1], keys.shape[1], len(keys)
        positions = torch.arange(columns - rows, columns, device=keys.device)
        later = torch.arange(columns, device=keys.device) > positions[:, None]
        alike = 1.0 / (positions[:, None] + 1)
        recent = positions >= self._prefix - self._window
        seen = keys.float().mT
        found: dict[str, list[list[Tensor]]] = {}
        for head, query in enumerate(queries.float() * queries.shape[-1] ** -0.5):
            # A head at a time: its scores stay in a CPU's cache.
            scores = query @ seen[head * heads // len(queries)]
            attention = scores.masked_fill_(later, -torch.inf).softmax(-1)
            used = attention > alike
            told = {
                "total": attention.sum(0),
                "window": attention[recent].sum(0),
                "uses": used.sum(0).float(),
                "last_use": ((positions[:, None] + 1) * used).amax(0).float(),
            }
            for name, of_head in told.items():
                groups = found.setdefault(name, [[] for _ in range(heads)])
                groups[head * heads // len(queries)].append(of_head)
        for name, groups in found.items():
            stacked = torch.stack([torch.stack(group) for group in groups])
            new = stacked.amax(1) if name == "last_use" else stacked.mean(1)
            new = F.pad(new, (0, self._prefix - columns))  # not read yet
            kept: dict[int, Tensor] = getattr(self, name)
            known = kept.get(layer)
            if known is not None:
                new = torch.maximum(known, new) if name == "last_use" else known + new
            kept[layer] = new

    @staticmethod
    def stacked(kept: Mapping[int, Tensor]) -> Tensor:
        """One of the attributes as ``[layers, KV heads, P]``."""
        return torch.stack([kept[layer] for layer in sorted(kept)])
