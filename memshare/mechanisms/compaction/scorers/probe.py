"""``probe``: a small network reads off each token's key and value whether it will be needed.

It sees the cache alone: no queries, and nothing in the forward pass. Each layer and group of KV
heads has a network of its own, which reads what belongs to these heads: a rank evaluates its own,
and one that holds a part of a group takes the rest of it for average.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from memshare.kv.rotary import Rotation, RotationUnknown
from memshare.mechanisms.compaction.probe.file import ProbeUnusable, read_probe
from memshare.mechanisms.compaction.probe.find import ServedModel, find_probe
from memshare.mechanisms.compaction.probe.network import fast_dtype
from memshare.mechanisms.compaction.probe.turn import TURN_TOLERANCE, turn_of, upright
from memshare.mechanisms.compaction.scorers.recency import Recency
from memshare.mechanisms.compaction.scorers.registry import ScorerUnusable

if TYPE_CHECKING:
    from memshare.kv.layout import CachedLayer
    from memshare.mechanisms.compaction.scorers.contract import TokenScorer
    from memshare.mechanisms.compaction.scorers.registry import ScorerChoice
    from memshare.mechanisms.contract import WorkerContext

logger = logging.getLogger(__name__)

_NUMBERS_AT_ONCE = 1 << 22  # keys and values that are worked on together: 16 MB, a few times over


class Network(Protocol):
    """Tells what tokens are worth."""

    def worth(self, upright: Tensor, values: Tensor) -> Tensor:
        """See :meth:`~memshare.mechanisms.compaction.probe.network.ProbeNetwork.worth`."""
        ...


class ProbeScorer:
    """A :class:`~memshare.mechanisms.compaction.scorers.contract.TokenScorer`."""

    def __init__(self, network: Network, rotation: Rotation, reach: int) -> None:
        """Score by ``network``, for this rank's heads.

        Args:
            network: on the device of the keys, as ``rotation``.
            rotation: that the cached keys went through.
            reach: tokens on each side on which the worth of one depends.
        """
        self._network = network
        self._rotation = rotation
        self._reach = reach

    def score(self, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """See :meth:`TokenScorer.score`."""
        layers, heads, tokens, channels = keys.shape
        length = max(_NUMBERS_AT_ONCE // (2 * layers * heads * channels), 1)
        parts = [
            self._part(keys, values, positions, first, min(first + length, tokens))
            for first in range(0, tokens, length)
        ]
        return torch.cat(parts, dim=-1)

    def _part(
        self, keys: Tensor, values: Tensor, positions: Tensor, first: int, end: int
    ) -> Tensor:
        """Worth of tokens [first, end), which see their neighbours beyond."""
        start = max(first - self._reach, 0)
        seen = slice(start, end + self._reach)
        turned = upright(keys[:, :, seen], positions[seen], self._rotation)
        worth = self._network.worth(turned, values[:, :, seen])
        return worth[..., first - start : end - start]


def build(choice: ScorerChoice, context: WorkerContext) -> TokenScorer:
    """See :func:`~memshare.mechanisms.compaction.scorers.registry.build_scorer`.

    Without a probe that fits, and none asked for by name, tokens are scored by recency.

    Raises:
        ScorerUnusable: the named probe is not there or does not fit, or the keys' rotation cannot
            be undone.
    """
    cache = next(iter(context.caches.values()))
    model = ServedModel(
        context.model,
        len(context.caches),
        cache.shape[1],
        cache.shape[3] // 2,
        context.tensor_ranks,
    )
    try:
        path = find_probe(choice.probe, model)
        if path is None:
            logger.warning(
                "no probe fits %s: tokens are kept by recency alone, which loses old facts; train "
                "one with `memshare probe train --model %s`",
                model.name, model.name,
            )  # fmt: skip
            return Recency()
        probe = read_probe(path)
        rotation = _rotation(context, probe.card.turn)
    except ProbeUnusable as reason:
        raise ScorerUnusable(str(reason)) from None
    first = model.first_head(context.tensor_rank, probe.card.heads)
    together = probe.card.group(model.heads)
    assert first is not None  # find_probe has seen to both
    assert together is not None
    logger.info("tokens are kept by the probe %s, heads together: %d", path, together)
    device = cache.device
    network = probe.network(together).part(first, model.heads, device, fast_dtype(device))
    return ProbeScorer(network, rotation.to(device), probe.card.reach)


def _rotation(context: WorkerContext, turn: tuple[float, ...]) -> Rotation:
    """The rotation of every layer's keys, which must be the one that the probe was trained with."""
    found: Rotation | None = None
    for name, rotation in _rotations(context.layers, context.caches):
        ours = turn_of(rotation)
        if len(ours) != len(turn) or any(
            abs(a - b) > TURN_TOLERANCE for a, b in zip(ours, turn, strict=True)
        ):
            raise ProbeUnusable(
                f"turn: keys of {name} rotate otherwise than in training; serve the model with the "
                f"rope parameters of its own configuration, or `memshare probe train --model "
                f"{context.model}`"
            )
        found = rotation
    assert found is not None  # a model has layers
    return found


def _rotations(
    layers: Mapping[str, CachedLayer], names: Iterable[str]
) -> Iterator[tuple[str, Rotation]]:
    """One layer of each rotary table."""
    known = set()
    for name in names:
        rotary = layers[name].rotary
        if rotary is None:
            raise ProbeUnusable(
                f"turn: {name} has no rotary table; choose the scorer 'recency' for this model"
            )
        if id(rotary.table) in known:
            continue
        known.add(id(rotary.table))
        try:
            yield name, Rotation.from_cache(rotary.table, rotary.neox)
        except RotationUnknown as reason:
            raise ProbeUnusable(
                f"turn: the rotary embedding of {name} cannot be undone ({reason}); choose the "
                "scorer 'recency' for this model"
            ) from None
