"""Judges a scorer on texts: does it rank tokens as it should, and what does dropping by it do?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memshare.lab.cache_reading import CacheReading
from memshare.lab.probe.collect import Sample
from memshare.lab.probe.reader import CacheReader
from memshare.lab.replay.divergence import COLUMNS
from memshare.mechanisms.compaction.probe.card import Judged
from memshare.mechanisms.compaction.probe.network import ProbeNetwork
from memshare.mechanisms.compaction.scorers.contract import TokenScorer, choose

_KL, _TOP = COLUMNS.index("kl"), COLUMNS.index("same_top")


@dataclass(frozen=True, slots=True)
class Dropping:
    """How tokens are dropped.

    Attributes:
        freed: fraction of the whole prefix that is dropped in the end, in every layer and head.
        recent: last tokens that are never dropped; nor is the prompt.
        position_weight: see :func:`choose`.
        every: tokens from one compaction to the next; 0 compacts once, when all is read.
    """

    freed: float
    recent: int = 32
    position_weight: float = 0.7
    every: int = 0


@dataclass(slots=True)
class Survivors:
    """What is left of a text's cache; every tensor has the layout ``[layers, heads, tokens, ...]``.

    Attributes:
        keys: as cached.
        values: the same of V.
        positions: where each token stood.
        worth: as scored once, when the token was new.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    worth: Tensor

    @classmethod
    def none(cls, like: Tensor) -> Self:
        """No token, of a model whose keys have the shape of ``like``."""
        nothing = like[:, :, :0]
        return cls(nothing, nothing, nothing[..., 0].long(), nothing[..., 0].float())

    def take(self, index: Tensor) -> Survivors:
        """Keep some tokens: ``[layers, heads, kept]`` indices."""
        wide = index[..., None].expand(-1, -1, -1, self.keys.shape[-1])
        return Survivors(
            self.keys.gather(2, wide), self.values.gather(2, wide),
            self.positions.gather(2, index), self.worth.gather(2, index),
        )  # fmt: skip

    def join(self, keys: Tensor, values: Tensor, first: int) -> Survivors:
        """With new tokens, not scored yet, behind them."""
        layers, heads, count, _ = keys.shape
        positions = torch.arange(first, first + count, device=keys.device)
        unknown = torch.full((layers, heads, count), torch.nan, device=keys.device)
        return Survivors(
            torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2),
            torch.cat((self.positions, positions.expand(layers, heads, -1)), 2),
            torch.cat((self.worth, unknown), 2),
        )  # fmt: skip


def droppable(prompt: int, prefix: int, recent: int) -> int:
    """How many tokens of a prefix may be dropped."""
    return max(prefix - prompt - recent, 0)


def drop_once(reading: CacheReading, scorer: TokenScorer, how: Dropping) -> Survivors:
    """Drop tokens of a prefix that has been read whole."""
    whole = Survivors.none(reading.keys).join(reading.keys, reading.values, 0)
    return _compact(whole, reading, how, scorer, reading.prefix)


def drop_in_rounds(
    reader: CacheReader, reading: CacheReading, scorer: TokenScorer, how: Dropping
) -> Survivors:
    """Drop tokens again and again while the text grows, as serving does.

    Each round takes the same share of what may go so far, and later tokens are read over what is
    left. A token is scored once, in the first round in which it may go.
    """
    keys, values = reading.keys[:, :, : reading.prompt], reading.values[:, :, : reading.prompt]
    left = Survivors.none(keys).join(keys, values, 0)
    for first in range(reading.prompt, reading.prefix, how.every):
        end = min(first + how.every, reading.prefix)
        new = reader.read_on(reading.tokens[first:end], first, left.keys, left.values)
        left = left.join(*new, first)
        left = _compact(left, reading, how, scorer, end)
    return left


def _compact(
    left: Survivors,
    reading: CacheReading,
    how: Dropping,
    scorer: TokenScorer,
    length: int,
) -> Survivors:
    """One round, when ``length`` tokens have been read."""
    may_go = droppable(reading.prompt, length, how.recent)
    of_all = droppable(reading.prompt, reading.prefix, how.recent)
    share = min(how.freed * reading.prefix / of_all, 1.0) if of_all else 0.0
    present = left.positions.shape[2]
    end = present - (length - reading.prompt - may_go)  # behind the last that may go
    candidates = slice(reading.prompt, end)
    keep = may_go - round(share * may_go)
    fresh = torch.isnan(left.worth[0, 0, candidates]).nonzero()[:, 0] + reading.prompt
    if len(fresh):
        new = slice(int(fresh[0]), end)
        left.worth[:, :, new] = scorer.score(
            left.keys[:, :, new].float(), left.values[:, :, new].float(),
            left.positions[0, 0, new].int(),
        )  # fmt: skip
    mask = torch.ones_like(left.worth, dtype=torch.bool)
    mask[:, :, candidates] = choose(
        left.worth[:, :, candidates], left.positions[:, :, candidates], keep, how.position_weight
    )
    return left.take(mask.nonzero()[:, 2].view(*mask.shape[:2], -1))


@dataclass(slots=True)
class Tally:
    """Damage to texts, one measurement after another.

    Attributes:
        kind: of the texts.
        prefix: tokens of each.
        tensor_parallel_size: ranks that shared the heads, each choosing by its own.
        measured: see :func:`judge`.
    """

    kind: str
    prefix: int
    tensor_parallel_size: int = 1
    measured: list[npt.NDArray[np.float32]] = field(default_factory=list)

    def judged(self, how: Dropping) -> Judged:
        """Means over the texts, of which tokens were dropped like this."""
        return Judged(
            kind=self.kind,
            texts=len(self.measured),
            prefix=self.prefix,
            freed=how.freed,
            every=how.every,
            recent=how.recent,
            tensor_parallel_size=self.tensor_parallel_size,
            kl=float(np.mean([one[:, _KL].mean() for one in self.measured])),
            same_top=float(np.mean([one[:, _TOP].mean() for one in self.measured])),
            unchanged=sum(bool((one[:, _TOP] == 1).all()) for one in self.measured),
        )


def judge(
    reader: CacheReader, reading: CacheReading, scorer: TokenScorer, how: Dropping
) -> npt.NDArray[np.float32]:
    """Drop tokens of a prefix, read on, and compare.

    Returns:
        ``[C - 1, len(COLUMNS)]`` (:mod:`memshare.lab.replay.divergence`).
    """
    if how.every:
        left = drop_in_rounds(reader, reading, scorer, how)
    else:
        left = drop_once(reading, scorer, how)
    return reader.judge(reading, left.keys, left.values)


def rank_correlation(
    samples: Sequence[Sample], layers: int, network: Callable[[int], ProbeNetwork]
) -> float:
    """Spearman's correlation of what a probe tells with its target.

    Args:
        samples: texts that it has not seen.
        layers: attention layers.
        network: of one layer.

    Returns:
        Mean over layers, heads and texts; within a text, over :attr:`Sample.learned`.
    """
    found = []
    for layer in range(layers):
        one = network(layer)
        for sample in samples:
            keys, values, target = sample.layer(layer)
            told = one.worth(keys[None], values[None])[0]
            found.append(_spearman(told[:, sample.learned], target[:, sample.learned]))
    return float(torch.cat(found).mean())


def _spearman(a: Tensor, b: Tensor) -> Tensor:
    """Of each row."""
    ranks = torch.stack((a, b)).argsort(-1).argsort(-1).double()
    x, y = ranks - ranks.mean(-1, keepdim=True)
    correlation: Tensor = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    return correlation
