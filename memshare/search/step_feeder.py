"""Stage one from the engine's side: output tokens go out as steps, answers come in."""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic

from memshare.config import MemShareConfig
from memshare.core.requests import RequestState
from memshare.search.bridge import Bridge
from memshare.search.evaluate import EvaluatorAnswer, EvaluatorError, NewSteps
from memshare.search.steps import DelimiterAutomaton, StepSegmenter
from memshare.telemetry.recorder import Recorder


class _Progress:
    """How far one request's output has been cut.

    Attributes:
        segmenter: cuts it.
        read: output tokens that the segmenter has seen.
        sent: output tokens that lie in finished steps.
    """

    __slots__ = ("read", "segmenter", "sent")

    def __init__(self, segmenter: StepSegmenter) -> None:
        self.segmenter = segmenter
        self.read = self.sent = 0


class StepFeeder:
    """Feeds the evaluators and takes their answers."""

    def __init__(
        self,
        config: MemShareConfig,
        automaton: DelimiterAutomaton,
        bridge: Bridge,
        recorder: Recorder,
        output_before_first: int = 0,
        with_prompt: bool = False,
    ) -> None:
        """Start without requests.

        Args:
            config: how steps are cut.
            automaton: compiled step delimiters.
            bridge: to the evaluators; closed with this.
            recorder: counts what goes out and comes in.
            output_before_first: tokens of output before anything of a request is fed.
            with_prompt: whether a request's prompt goes out in front of its first step.
        """
        self._steps = config.steps
        self._automaton = automaton
        self._bridge = bridge
        self._recorder = recorder
        self._output_before_first = output_before_first
        self._with_prompt = with_prompt
        self._progress: dict[str, _Progress] = {}
        self._outgoing: list[NewSteps] = []

    def replace_bridge(self, bridge: Bridge) -> None:
        """Go on with another bridge, before anything has been fed; the old one is closed."""
        self._bridge.close()
        self._bridge = bridge

    def feed(self, state: RequestState, until: int) -> None:
        """Cut the request's output before token position ``until`` into steps."""
        request = state.request
        prompt = request.num_prompt_tokens
        if until <= prompt or until < prompt + self._output_before_first:
            return
        progress = self._progress.get(state.request_id)
        if progress is None:
            segmenter = StepSegmenter(
                self._automaton, self._steps.min_tokens, self._steps.max_tokens
            )
            progress = self._progress[state.request_id] = _Progress(segmenter)
        start = prompt + progress.read
        if until <= start:
            return
        tokens, bounds = progress.segmenter.feed(request.all_token_ids[start:until])
        progress.read += until - start
        if not tokens:
            return
        position = prompt + progress.sent
        progress.sent += len(tokens)
        if self._with_prompt and position == prompt and state.has_plain_prompt:
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
                self._steps.similarity_threshold if asked is None else asked,
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

    def forget_request(self, state: RequestState) -> None:
        """The request's blocks are gone, and with them the use of its steps."""
        self._progress.pop(state.request_id, None)
        self._bridge.forget_request(state.history, state.request_id)

    def answers(self) -> Iterator[EvaluatorAnswer]:
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
