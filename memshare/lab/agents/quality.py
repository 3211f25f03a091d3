"""How far answers over a shared cache are from those over a cache of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memshare.lab.agents.replay import EXACT, distributions
from memshare.lab.agents.turns import ReplayPlan
from memshare.lab.replay.divergence import COLUMNS

Floats = npt.NDArray[np.float64]

_RESAMPLED = 2000
_SEED = 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over conversations, with its 95 % interval by resampling them."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """For a table."""
        value, low, high = (round(x, 3) + 0.0 for x in (self.value, self.low, self.high))  # no -0
        return f"{value:.3f} ({low:.3f} to {high:.3f})"


@dataclass(frozen=True, slots=True)
class Quality:
    """Of one scheme, on the outputs of all roles or of one; nats per token.

    Attributes:
        nll: of the recorded tokens.
        kl: from ``nonshared``.
        same_top: how often the most likely token is that of ``nonshared``.
        kept_nll: part of the distance between ``full_shared`` and ``nonshared`` that is not lost;
            None if ``full_shared`` did not run.
        kept_kl: the same by KL.
    """

    nll: Estimate
    kl: Estimate
    same_top: Estimate
    kept_nll: Estimate | None
    kept_kl: Estimate | None


Sums = dict[str, Floats]
"""By scheme: ``[conversations, 4]``: tokens, and over them the sums of NLL, KL and same top."""


def read_sums(plan: ReplayPlan, schemes: Sequence[str], role: str | None = None) -> Sums:
    """Add up what was measured.

    Args:
        plan: that was replayed.
        schemes: ``nonshared`` and others.
        role: whose turns count; None for all.
    """
    return {
        scheme: np.array(
            [
                np.sum(
                    [
                        _turn(plan, conversation, number, scheme)
                        for number, turn in enumerate(turns)
                        if role in (None, turn.role)
                    ]
                    or [np.zeros(4)],
                    axis=0,
                )
                for conversation, turns in enumerate(plan.conversations)
            ]
        )
        for scheme in schemes
    }


def _turn(plan: ReplayPlan, conversation: int, number: int, scheme: str) -> Floats:
    """``[4]``: tokens, NLL, KL and same top of one turn, each summed over its tokens."""
    tokens = plan.conversations[conversation][number].output
    exact = np.memmap(distributions(plan.folder, conversation, number, EXACT), np.float16, "r")
    rows = exact.reshape(len(tokens), -1)
    nll = -rows[np.arange(len(tokens)), tokens].astype(np.float64).sum()
    if scheme == EXACT:
        return np.array([len(tokens), nll, 0.0, len(tokens)])
    file = distributions(plan.folder, conversation, number, scheme)
    kl, delta_nll, same = np.fromfile(file, np.float32).reshape(-1, len(COLUMNS)).sum(0)
    return np.array([len(tokens), nll + delta_nll, kl, same])


def qualities(sums: Sums) -> dict[str, Quality]:
    """Means over tokens, with intervals over conversations, by scheme."""
    return {scheme: _quality(sums, scheme) for scheme in sums}


def _quality(sums: Sums, scheme: str) -> Quality:
    def mean(column: int) -> Callable[[Sums], float]:
        return lambda some: _mean(some[scheme], column)

    def kept(column: int) -> Estimate | None:
        if "full_shared" not in sums:
            return None
        return _estimate(sums, lambda some: _kept(some, scheme, column))

    return Quality(
        _estimate(sums, mean(1)),
        _estimate(sums, mean(2)),
        _estimate(sums, mean(3)),
        kept(1),
        kept(2),
    )


def _mean(rows: Floats, column: int) -> float:
    return float(rows[:, column].sum() / rows[:, 0].sum())


def _kept(sums: Sums, scheme: str, column: int) -> float:
    """1 as ``nonshared``, 0 as ``full_shared``; nan if those do not differ."""
    here, none, full = (_mean(sums[name], column) for name in (scheme, EXACT, "full_shared"))
    return 1 - (here - none) / (full - none) if full != none else float("nan")


def _estimate(sums: Sums, of: Callable[[Sums], float]) -> Estimate:
    """A figure, and its interval: conversations are drawn anew, the same for all schemes."""
    count = len(sums[EXACT])
    draw = np.random.default_rng(_SEED)
    found = []
    for _ in range(_RESAMPLED):
        picked = draw.integers(0, count, count)
        some = {scheme: rows[picked] for scheme, rows in sums.items()}
        if all(rows[:, 0].sum() for rows in some.values()):
            found.append(of(some))
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return Estimate(of(sums), float(low), float(high))
