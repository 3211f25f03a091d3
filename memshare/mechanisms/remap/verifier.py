"""What the scheduler side asks of whoever runs stage two for it."""

from __future__ import annotations

from typing import Protocol

from memshare.core.requests import RequestState
from memshare.engine.messages import JobBatch, JobResult, TwinBatch
from memshare.search.evaluate import Answer


class PairVerifier(Protocol):
    """Turns stage one's answers into jobs for the workers, and their results into what the
    reclaimer needs. Every job is answered by all ranks or discarded, once."""

    def __len__(self) -> int:
        """Pairs that wait for stage two."""
        ...

    @property
    def running(self) -> int:
        """Pairs that the workers have not answered yet."""
        ...

    def propose(self, answer: Answer) -> None:
        """Take candidate pairs from an evaluator. It is not trusted."""
        ...

    def take(self) -> tuple[JobBatch | TwinBatch, ...]:
        """This step's jobs."""
        ...

    def receive(self, results: dict[int, JobResult]) -> None:
        """Take what some ranks have found."""
        ...

    def grown(self, state: RequestState) -> None:
        """The request has filled a block."""
        ...

    def forget(self, state: RequestState) -> None:
        """The request's blocks are gone, or about to go."""
        ...
