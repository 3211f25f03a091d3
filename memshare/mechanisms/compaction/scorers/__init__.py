"""Ways to tell what a token is worth, by the name that chooses one; imported when it is named."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from memshare.mechanisms.compaction.scorers.contract import TokenScorer
    from memshare.mechanisms.contract import WorkerContext

SCORERS = {
    "random": "memshare.mechanisms.compaction.scorers.random:build",
    "recency": "memshare.mechanisms.compaction.scorers.recency:build",
}


class ScorerParams(Protocol):
    """What names a scorer, and what it is set to."""

    @property
    def scorer(self) -> str:
        """A name of :data:`SCORERS`."""
        ...

    @property
    def seed(self) -> int:
        """Of what is random."""
        ...


def build_scorer(params: ScorerParams, context: WorkerContext) -> TokenScorer:
    """The scorer that the parameters name, for one rank."""
    module, _, build = SCORERS[params.scorer].partition(":")
    return cast("TokenScorer", getattr(import_module(module), build)(params, context))
