"""Which scorers there are, by the name in ``policy.scorer``.

One line each; nothing is imported before it is named, so that a configuration does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from memshare.mechanisms.compaction.scorers.contract import TokenScorer
    from memshare.mechanisms.contract import WorkerContext

SCORERS = {
    "probe": "memshare.mechanisms.compaction.scorers.probe:build",
    "recency": "memshare.mechanisms.compaction.scorers.recency:build",
    "random": "memshare.mechanisms.compaction.scorers.random:build",
}
"""Name to ``MODULE:FUNCTION``; the function takes what :func:`build_scorer` takes."""


class ScorerChoice(Protocol):
    """What the policy's parameters say about the scorer."""

    @property
    def scorer(self) -> str:
        """A name in ``SCORERS``."""
        ...

    @property
    def seed(self) -> int:
        """Of ``random``."""
        ...

    @property
    def probe(self) -> str | None:
        """File of the probe, or the name that it is found by; None looks for one that fits."""
        ...


class ScorerUnusable(ValueError):  # noqa: N818 - a finding about a set-up, not a fault
    """The chosen scorer does not work with this model; the text says why and what to do."""


def build_scorer(choice: ScorerChoice, context: WorkerContext) -> TokenScorer:
    """Build the scorer that the parameters name, for one rank's layers and heads.

    Raises:
        ScorerUnusable: it does not work with this model.
    """
    module, _, function = SCORERS[choice.scorer].partition(":")
    return cast("TokenScorer", getattr(import_module(module), function)(choice, context))
