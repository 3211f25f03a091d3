"""The guard's statistic: how far served answers are from the exact model's, and when that is proof.

**One answer.** Served and exact model give each token of an answer a probability, q and p, under
the same text before it. ``1 - min(1, p / q)`` is the probability that the exact model, checking
the served one as speculative decoding checks a draft, would have rejected the token. Where tokens
are sampled from q its mean is the total variation distance of the two distributions (Leviathan et
al., arXiv 2211.17192, corollary 3.6). It needs no second text, compares nothing that is random,
lies in 0..1, and is 0 for every answer of an exact engine, but for rounding.

**Many answers.** Evidence against "the mean is at most ``bound``" is a bettor's wealth, which each
answer's value x makes ``1 + c (x / bound - 1)`` times as much; c is the stake. While the claim
holds, the expected factor is at most 1, whatever came before, so that by Ville's inequality wealth
ever reaches ``1 / rate`` with a probability of at most ``rate``, however often it is looked at
(Waudby-Smith and Ramdas, arXiv 2010.09686). The money is spread over several stakes, and over the
answers at which a bettor may begin: half begins with the first, the rest later, so that damage
that begins late is seen soon, too (as in Shiryaev and Roberts' procedure).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# A large stake sees large damage within a few answers, a small one small damage in the end.
_STAKES = np.array([0.05, 0.1, 0.2, 0.4, 0.8])
_AT_ONCE = 0.5  # of the money begins with the first answer


def disagreement(served: Sequence[float], exact: Sequence[float]) -> float:
    """How much of an answer the exact model would have rejected, 0..1.

    Args:
        served: natural logarithm of each token's probability in the engine that wrote it.
        exact: the same of the exact model, token by token.

    Raises:
        ValueError: there are no tokens, or not equally many.
    """
    if not served or len(served) != len(exact):
        raise ValueError(f"{len(served)} served and {len(exact)} exact log-probabilities")
    ratio = np.exp(np.minimum(0.0, np.asarray(exact) - np.asarray(served)))
    return float(np.mean(1.0 - ratio))


class Evidence:
    """Wealth against a bound. An e-process: below the bound its expectation never exceeds 1."""

    def __init__(self, bound: float, window: int) -> None:
        """Begin with a wealth of 1.

        Args:
            bound: in (0, 1); the claim is that values have a mean of at most this.
            window: values over which bettors begin; there may be more.
        """
        self._bound = bound
        self._begins = (1.0 - _AT_ONCE) / max(1, window - 1)
        self._reserve = 1.0 - _AT_ONCE
        self._wealth = np.full(len(_STAKES), _AT_ONCE / len(_STAKES))

    @property
    def wealth(self) -> float:
        """What the bettors have."""
        return float(self._wealth.sum()) + self._reserve

    def add(self, value: float) -> None:
        """Take one value, 0..1."""
        self._wealth *= 1.0 + _STAKES * (value / self._bound - 1.0)
        joins = min(self._begins, self._reserve)
        self._reserve -= joins
        self._wealth += joins / len(_STAKES)


class Interval(NamedTuple):
    """Of a mean of values in 0..1."""

    low: float
    mean: float
    high: float


def interval(values: Sequence[float], error: float = 0.05) -> Interval:
    """What the mean of values may be; it holds for any distribution, and any number of them.

    The means that survive are those against which no bettor has earned ``2 / error``.

    Args:
        values: each 0..1; none tell nothing.
        error: probability that the mean lies outside, at most.
    """
    if not values:
        return Interval(0.0, 0.0, 1.0)
    taken = np.asarray(values, dtype=np.float64)
    mean = float(taken.mean())
    low = _least(taken, error / 2.0)
    high = 1.0 - _least(1.0 - taken, error / 2.0)
    return Interval(min(low, mean), mean, max(high, mean))


def _least(values: np.ndarray, error: float) -> float:
    """The least mean that is not refuted: wealth against a claim falls as the claim rises."""
    low, high = 0.0, 1.0
    for _ in range(30):
        claim = (low + high) / 2.0
        gains = np.log1p(_STAKES[:, None] * (values / claim - 1.0)).sum(axis=1)
        if np.logaddexp.reduce(gains) - np.log(len(_STAKES)) >= -np.log(error):
            low = claim
        else:
            high = claim
    return low
