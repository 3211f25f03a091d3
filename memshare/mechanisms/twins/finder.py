"""Stage one of the policy ``twins``, as an evaluator computes it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from memshare.mechanisms.twins.index import TwinIndex
from memshare.search.evaluate import EvaluatorAnswer, Histories, NewSteps, TwinLinks


class TwinFinder:
    """Twins: one :class:`~memshare.mechanisms.twins.index.TwinIndex` per request."""

    def __init__(self, shortest_run: int, max_requests: int) -> None:
        self._histories: Histories[TwinIndex] = Histories(
            lambda: TwinIndex(shortest_run), max_requests
        )

    def evaluate(self, batch: Sequence[NewSteps]) -> EvaluatorAnswer:
        """See :meth:`StageOne.evaluate`."""
        links: list[TwinLinks] = []
        for new in batch:
            index = self._histories.of(new.history)
            for first, last in pairwise(new.bounds):
                earlier, later = index.add_tokens(new.tokens[first:last], new.position + first)
                links.append(TwinLinks(new.request_id, new.generation, earlier, later))
        return EvaluatorAnswer.to(batch, links=tuple(links))

    def forget_histories(self, histories: Sequence[str], request_ids: Sequence[str]) -> None:
        """See :meth:`CandidateSource.forget_histories`. Each request has a history of its own."""
        del request_ids
        self._histories.drop(histories)
