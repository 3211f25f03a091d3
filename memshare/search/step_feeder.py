"""Stage one from the engine's side: output tokens go out as steps, answers come in."""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic

from memshare.config import MemShareConfig, TwinsParams
from memshare.core.requests import RequestState
from memshare.search.bridge import EvaluatorBridge
from memshare.search.evaluate import Answer, EvaluatorError, NewSteps
from memshare.telemetry.recorder import Recorder


class StepFeeder:
    """Feeds the evaluators and takes their answers."""

    def __init__(self, config: MemShareConfig, bridge: EvaluatorBridge, recorder: Recorder) -> None:
        self._threshold = config.steps.similarity_threshold
        self._twins = isinstance(config.policy, TwinsParams)
        self._settled = config.protect.recent_tokens // 2
        self._bridge = bridge
        self._recorder = recorder
        self._outgoing: list[NewSteps] = []

    def feed(self, state: RequestState, until: int) -> None:
        """Cut the request's output before token position ``until`` into steps."""
        request = state.request
        prompt = request.num_prompt_tokens
        start = prompt + state.fed
        if until <= start or state.segmenter is None:
            return
        if self._twins and until < prompt + self._settled:
            # Nothing can go before the recent window is full, so a short answer is not looked at.
            # Half of the window leaves time for both stages.
            return
        tokens, bounds = state.segmenter.feed(request.all_token_ids[start:until])
        state.fed += until - start
        if not tokens:
            return
        position = prompt + state.emitted
        state.emitted += len(tokens)
        if self._twins and position == prompt and state.has_plain_prompt:
            # The prompt is never given up: what repeats it has a copy that stays.
            tokens = [*request.all_token_ids[:prompt], *tokens]
            bounds = (0, *(prompt + bound for bound in bounds))
            position = 0
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
            self._recorder.event("step", request=new.request_id, position=new.position, count=count)
        self._recorder.counters.add("steps", steps)
        if not self._bridge.submit(batch):
            self._recorder.counters.add_labelled("steps_dropped", "queue_full", steps)

    def forget(self, state: RequestState) -> None:
        """The request's blocks are gone, and with them the use of its steps."""
        self._bridge.forget(state.history, state.request_id)

    def answers(self) -> Iterator[Answer]:
        """What evaluators have answered since the last call; their faults are counted."""
        for item in self._bridge.drain():
            if isinstance(item, EvaluatorError):
                self._recorder.counters.add_labelled("evaluator_faults", item.reason)
                self._recorder.event("evaluator_fault", reason=item.reason, detail=str(item))
            else:
                self._recorder.counters.observe_lag(max(monotonic() - item.sent_at, 0.0))
                yield item

    def close(self) -> None:
        """Stop the bridge. Idempotent."""
        self._bridge.close()
