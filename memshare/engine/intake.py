"""Stage one from the engine's side: output tokens go out as steps, candidate pairs come in."""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic

from memshare.bridge import EvaluatorBridge
from memshare.config import MemShareConfig
from memshare.engine.journal import Journal
from memshare.engine.requests import Candidate, RequestState
from memshare.engine.roster import Roster
from memshare.evaluate import Answer, EvaluatorError, NewSteps, StepMatch
from memshare.policy.base import PairProposal, StagedPolicy


class Intake:
    """Feeds the evaluators and turns their answers into candidates."""

    def __init__(
        self,
        config: MemShareConfig,
        policy: StagedPolicy,
        bridge: EvaluatorBridge,
        roster: Roster,
        journal: Journal,
        block_size: int,
    ) -> None:
        self._threshold = config.steps.similarity_threshold
        self._policy = policy
        self._bridge = bridge
        self._roster = roster
        self._journal = journal
        self._block_size = block_size
        self._outgoing: list[NewSteps] = []

    def feed(self, state: RequestState, until: int) -> None:
        """Cut the request's output before token position ``until`` into steps."""
        request = state.request
        prompt = request.num_prompt_tokens
        start = prompt + state.fed
        if until <= start or state.segmenter is None:
            return
        tokens, bounds = state.segmenter.feed(request.all_token_ids[start:until])
        state.fed += until - start
        if not tokens:
            return
        position = prompt + state.emitted
        state.emitted += len(tokens)
        asked = state.options.memshare_step_threshold
        self._outgoing.append(
            NewSteps(
                state.request_id,
                state.generation,
                state.history,
                position,
                tokens,
                bounds,
                self._threshold if asked is None else asked,
                monotonic(),
            )
        )

    def send(self) -> None:
        """Hand what this engine step has finished to the bridge, in one piece."""
        if not self._outgoing:
            return
        batch, self._outgoing = self._outgoing, []
        steps = 0
        for new in batch:
            count = len(new.bounds) - 1
            steps += count
            self._journal.event("step", request=new.request_id, position=new.position, count=count)
        self._journal.tally.add("steps", steps)
        if not self._bridge.submit(batch):
            self._journal.tally.add_labelled("steps_dropped", "queue_full", steps)

    def forget(self, state: RequestState) -> None:
        """The request's blocks are gone, and with them the use of its steps."""
        self._bridge.forget(state.history, state.request_id)

    def candidates(self) -> Iterator[Candidate]:
        """Candidates from what evaluators have answered since the last call."""
        for item in self._bridge.drain():
            if isinstance(item, EvaluatorError):
                self._journal.tally.add_labelled("evaluator_faults", item.reason)
                self._journal.event("evaluator_fault", reason=item.reason, detail=str(item))
            else:
                yield from self._candidates_of(item)

    def close(self) -> None:
        """Stop the bridge. Idempotent."""
        self._bridge.close()

    def _candidates_of(self, answer: Answer) -> Iterator[Candidate]:
        tally = self._journal.tally
        tally.observe_lag(max(monotonic() - answer.sent_at, 0.0))
        for match in answer.matches:
            if not self._may_pair(match):
                tally.add_labelled("dropped", "unknown_request")
                continue
            for pair in self._policy.propose(match.later, match.earlier, self._block_size):
                tally.add("candidates")
                candidate = self._candidate(pair)
                if candidate is None:
                    tally.add_labelled("dropped", "unavailable")
                    continue
                self._journal.pair("candidate", candidate, similarity=round(match.similarity, 4))
                yield candidate

    def _may_pair(self, match: StepMatch) -> bool:
        """Both requests live and share a history. Answers are not trusted to respect tenants."""
        later = self._roster.get(match.later.request_id)
        earlier = self._roster.get(match.earlier.request_id)
        return later is not None and earlier is not None and later.history == earlier.history

    def _candidate(self, pair: PairProposal) -> Candidate | None:
        target, donor = self._roster.entry(pair.target), self._roster.entry(pair.donor)
        return None if target is None or donor is None else Candidate(target, donor)
