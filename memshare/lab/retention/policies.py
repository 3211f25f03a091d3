"""The policies: what each says that tokens are worth, what it needs for that, and where it is from.

StreamingLLM (arXiv 2309.17453) keeps the first tokens and the newest. The protected prompt holds
the first ones, so under compaction it is ``recency``, and has no row of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - as torch calls it
from torch import Tensor

from memshare.lab.cache_reading import CacheReading
from memshare.lab.probe.evaluate import Dropping, drop_once, droppable
from memshare.lab.probe.reader import CacheReader
from memshare.lab.retention.attention import AttentionUse
from memshare.mechanisms.compaction.scorers.contract import TokenScorer, choose

_POOLED = 5  # tokens over which SnapKV's published code averages
_SAFE = 0.2  # of its equal share, that AdaKV leaves every head


@dataclass(frozen=True, slots=True)
class Watched:
    """A text that was read, and what was seen meanwhile.

    Attributes:
        reading: prefix and continuation.
        use: attention to tokens of the prefix.
        scorers: that look at the cache alone, by name.
        routers: see :meth:`CacheReader.read_routers`; None of a dense model.
    """

    reading: CacheReading
    use: AttentionUse
    scorers: dict[str, TokenScorer]
    routers: tuple[Tensor, int] | None = None

    def told(self, name: str) -> Tensor:
        """What one of the scorers says: ``[layers, KV heads, P]``."""
        positions = torch.arange(self.reading.prefix, device=self.reading.keys.device)
        return self.scorers[name].score(
            self.reading.keys.float(), self.reading.values.float(), positions.int()
        )


Needs = Callable[[CacheReader, int, int], int]
"""Bytes that serving would keep of a request beside its KV: model, its tokens, recent queries."""


@dataclass(frozen=True, slots=True)
class Policy:
    """A way to choose.

    Attributes:
        source: who proposes it.
        worth: of each token, ``[layers, KV heads, P]``.
        needs: see there.
        by_place: whether a token's place counts beside its worth, as compaction has it; else the
            worth alone does, as its authors have it.
        shares: whether heads of a layer may keep unequal numbers, by their worths.
        routed: whether it looks at a token's experts.
    """

    source: str
    worth: Callable[[Watched], Tensor]
    needs: Needs
    by_place: bool = True
    shares: bool = False
    routed: bool = False


def _nothing(reader: CacheReader, tokens: int, window: int) -> int:
    return 0


def _number_per_token(reader: CacheReader, tokens: int, window: int) -> int:
    return 4 * reader.layers * reader.heads * tokens


def _queries(reader: CacheReader, tokens: int, window: int) -> int:
    return 2 * reader.layers * reader.query_heads * reader.channels * window


def _pooled(seen: Watched) -> Tensor:
    attention = AttentionUse.stacked(seen.use.window)
    return F.avg_pool1d(attention, _POOLED, 1, _POOLED // 2)


def _of(name: str) -> Callable[[Watched], Tensor]:
    return lambda seen: seen.told(name)


def _total(seen: Watched) -> Tensor:
    return AttentionUse.stacked(seen.use.total)


def _uses(seen: Watched) -> Tensor:
    return AttentionUse.stacked(seen.use.uses)


def _last_use(seen: Watched) -> Tensor:
    return AttentionUse.stacked(seen.use.last_use)


def _router_entropy(seen: Watched) -> Tensor:
    """How little a layer's router can decide: what is sent to any expert may be like nothing."""
    logits, _ = _routers(seen)
    log_shares = logits.log_softmax(-1)
    return _by_heads(seen, -(log_shares.exp() * log_shares).sum(-1))


def _rare_experts(seen: Watched) -> Tensor:
    """How seldom the text so far has needed a token's experts, in the layer."""
    logits, chosen = _routers(seen)
    shares, experts = logits.softmax(-1).topk(chosen, dim=-1)
    counts = torch.zeros_like(logits[:, 0]).scatter_add_(
        1, experts.flatten(1), torch.ones_like(experts.flatten(1), dtype=logits.dtype)
    )
    rarity = -(counts / counts.sum(-1, keepdim=True)).log()
    of_chosen = rarity.gather(1, experts.flatten(1)).view(experts.shape)
    return _by_heads(seen, (of_chosen * shares / shares.sum(-1, keepdim=True)).sum(-1))


def _routers(seen: Watched) -> tuple[Tensor, int]:
    assert seen.routers is not None  # who judges a routed policy has read them
    return seen.routers


def _by_heads(seen: Watched, of_layers: Tensor) -> Tensor:
    """The same for each KV head; a layer without experts has the mean of those that have some."""
    layers, heads = seen.reading.keys.shape[:2]
    if len(of_layers) != layers:
        of_layers = of_layers.mean(0, keepdim=True).expand(layers, -1)
    return of_layers[:, None].expand(-1, heads, -1).contiguous()


POLICIES: dict[str, Policy] = {
    "recency": Policy("StreamingLLM", _of("recency"), _nothing),
    "random": Policy("control", _of("random"), _nothing, by_place=False),
    "probe": Policy("ours, target of KVzip", _of("probe"), _nothing),
    "window": Policy("SnapKV", _pooled, _queries),
    "window, alone": Policy("SnapKV", _pooled, _queries, by_place=False),
    "accumulated": Policy("H2O", _total, _number_per_token),
    "accumulated, alone": Policy("H2O", _total, _number_per_token, by_place=False),
    "uses": Policy("LFU", _uses, _number_per_token),
    "last use": Policy("LRU", _last_use, _number_per_token),
    "window, shares": Policy("AdaKV on SnapKV", _pooled, _queries, shares=True),
    "probe, shares": Policy("AdaKV on ours", _of("probe"), _nothing, shares=True),
    "router entropy": Policy("PiKV", _router_entropy, _number_per_token, routed=True),
    "rare experts": Policy("PiKV", _rare_experts, _number_per_token, routed=True),
}
"""By the names of the table's rows."""


def judge_policy(
    reader: CacheReader, seen: Watched, policy: Policy, freed: float, recent: int, weight: float
) -> Tensor:
    """Drop tokens as the policy says, read on, and compare.

    Args:
        reader: that has read the text.
        seen: see there.
        policy: see there.
        freed: fraction of the prefix that is dropped in every layer: of each head as much, or with
            ``shares`` of all heads together.
        recent: last tokens that always stay; so does the prompt.
        weight: of places, for policies that look at them.

    Returns:
        ``[C - 1, len(COLUMNS)]`` float32 (:mod:`memshare.lab.replay.divergence`).
    """
    reading = seen.reading
    how = Dropping(freed, recent, weight if policy.by_place else 0.0)
    worth = policy.worth(seen)
    if policy.shares:
        hidden = ~kept_by_shares(reading, worth, how)
        return torch.from_numpy(reader.judge(reading, reading.keys, reading.values, hidden))
    left = drop_once(reading, _Told(worth), how)
    return torch.from_numpy(reader.judge(reading, left.keys, left.values))


def kept_by_shares(reading: CacheReading, worth: Tensor, how: Dropping) -> Tensor:
    """Which tokens stay if the heads of a layer share its budget by their worths.

    As AdaKV (arXiv 2407.11550) does it: the most valuable tokens of all heads stay, wherever they
    are, but every head keeps a part of its equal share.

    Args:
        reading: whose tokens they are.
        worth: ``[layers, KV heads, P]``, comparable between heads.
        how: see there; what is dropped is that fraction of all heads' tokens.

    Returns:
        Bool mask of the same shape.
    """
    may_go = droppable(reading.prompt, reading.prefix, how.recent)
    candidates = slice(reading.prompt, reading.prompt + may_go)
    keep = may_go - min(round(how.freed * reading.prefix), may_go)
    mask = torch.ones_like(worth, dtype=torch.bool)
    positions = torch.arange(may_go, device=worth.device)
    for layer in range(len(worth)):
        told = worth[layer, :, candidates]
        for head, share in enumerate(_shares(told, keep)):
            stays = choose(
                told[None, head : head + 1], positions[None, None], share, how.position_weight
            )
            mask[layer, head, candidates] = stays[0, 0]
    return mask


def _shares(worth: Tensor, keep: int) -> list[int]:
    """How many tokens each head keeps, ``keep`` on average: ``[KV heads, candidates]`` worth."""
    raised = worth.clone()
    safe = worth.topk(int(_SAFE * keep), dim=-1).indices
    raised.scatter_(-1, safe, torch.inf)
    best = raised.flatten().topk(keep * len(worth)).indices
    return torch.bincount(best // worth.shape[1], minlength=len(worth)).tolist()


class _Told:
    """A scorer of one text, whose worths are known."""

    def __init__(self, worth: Tensor) -> None:
        self._worth = worth

    def score(self, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """See :meth:`TokenScorer.score`."""
        return self._worth[..., positions.long()]
