"""The scheduler part of the policy ``twins``: on demand, by what is known of tokens' copies."""

from __future__ import annotations

from memshare.core.requests import RequestState
from memshare.mechanisms.contract import SchedulerContext
from memshare.mechanisms.remap.on_demand import OnDemandPart
from memshare.mechanisms.remap.pairs import Candidate
from memshare.mechanisms.remap.scheduler import Stages
from memshare.mechanisms.remap.view import TableView
from memshare.mechanisms.twins.policy import TwinsPolicy
from memshare.mechanisms.twins.verifier import TokenPairVerifier
from memshare.search.step_feeder import StepFeeder
from memshare.telemetry.explain import Cause


class TwinsPart(OnDemandPart):
    """Knows where tokens appear again, and hands that on when their blocks are given up."""

    def __init__(self, context: SchedulerContext, policy: TwinsPolicy) -> None:
        self._verifier = TokenPairVerifier(context)
        feeder = StepFeeder(
            context.config,
            context.compile_steps(),
            context.open_bridge(),
            context.recorder,
            # Nothing can go before the recent window is full, so a short answer is not looked at.
            # Half of the window leaves time for both stages.
            output_before_first=context.config.recent_tokens // 2,
            # The prompt is never given up: what repeats it has a copy that stays.
            with_prompt=True,
        )
        super().__init__(context, policy, Stages(feeder, self._verifier))

    def view(self, state: RequestState) -> TableView:
        """The request's blocks, with their coverage."""
        return TableView(self._tracker, self._tables, state, self._verifier.copies_of(state))

    def apply(self, pair: Candidate, cause: Cause) -> int:
        """See :meth:`RemapPart.apply`."""
        freed = super().apply(pair, cause)
        self._verifier.note_given_up(pair.target.state, pair.target.index)
        return freed
