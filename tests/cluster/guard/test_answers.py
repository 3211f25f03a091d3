"""What is recorded of a request, and what its client sees of that; outputs are made up here."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from cluster.guard.answers import Answer, AnswerRecorder, AnswerWatch, can_be_scored
from cluster.tenancy.call import Call, Caller
from cluster.tenancy.keys import MemSharePermissions
from cluster.tenancy.limits import Limits

pytestmark = pytest.mark.engine  # vLLM is loaded; no engine starts

CALL = Call(Caller("red", Limits(None, None), None, None, False, MemSharePermissions()), "salt")
GIVEN_UP = {"blocks_shared": 2, "tokens_dropped": 0, "tokens_shared": 0}
NOTHING = dict.fromkeys(GIVEN_UP, 0)
PROMPT = [5, 6, 7]


def output(
    tokens: list[int], usage: dict[str, int] | None, reason: str | None, logprobs: bool = True
) -> RequestOutput:
    entries = [{t: Logprob(-t / 10, 1), 99: Logprob(-0.01, 1)} for t in tokens]
    completion = CompletionOutput(
        0, "x", tokens, -1.0, entries if logprobs else None, finish_reason=reason
    )
    returned = None if usage is None else {"memshare": usage}
    finished = reason is not None
    return RequestOutput(
        "r", None, PROMPT, None, [completion], finished, kv_transfer_params=returned
    )


def recorder(always: bool = False, **params: Any) -> AnswerRecorder:
    return AnswerRecorder(SamplingParams(**params), CALL, None, always)


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_tokens_and_their_probabilities_are_recorded(kind: RequestOutputKind) -> None:
    watch = recorder(output_kind=kind)
    steps = {
        RequestOutputKind.DELTA: [[1, 2], [3]],
        RequestOutputKind.CUMULATIVE: [[1, 2], [1, 2, 3]],
        RequestOutputKind.FINAL_ONLY: [[1, 2, 3]],
    }[kind]
    for tokens in steps[:-1]:
        watch.read(output(tokens, None, None))
    watch.read(output(steps[-1], GIVEN_UP, "stop"))
    answer = watch.answer()
    assert isinstance(answer, Answer)
    assert (answer.prompt, answer.tokens) == (PROMPT, [1, 2, 3])
    assert list(answer.served) == [-0.1, -0.2, -0.3]


def test_a_client_sees_what_it_asked_for_and_no_more() -> None:
    watch = recorder(extra_args={"memshare_block_threshold": 0.5})
    assert watch.params.logprobs == 0
    assert watch.params.extra_args == {"memshare_block_threshold": 0.5, "memshare_usage": "on"}
    last = output([1], GIVEN_UP, "stop")
    watch.read(last)
    assert last.outputs[0].logprobs is None
    assert last.outputs[0].cumulative_logprob is None
    assert last.kv_transfer_params is None

    asked = SamplingParams(logprobs=1, extra_args={"memshare_usage": "on"})
    watch = AnswerRecorder(asked, CALL, None, False)
    assert (watch.params.logprobs, watch.params.extra_args) == (1, asked.extra_args)
    last = output([1], GIVEN_UP, "stop")
    watch.read(last)
    assert last.outputs[0].logprobs is not None
    assert last.kv_transfer_params == {"memshare": GIVEN_UP}


@pytest.mark.parametrize(
    ("usage", "reason", "logprobs", "said"),
    [
        (NOTHING, "stop", True, "untouched"),
        (GIVEN_UP, "abort", True, "unscorable"),
        (GIVEN_UP, "length", False, "unscorable"),
    ],
)
def test_what_there_is_nothing_to_score_of(
    usage: dict[str, int], reason: str, logprobs: bool, said: str
) -> None:
    watch = recorder()
    watch.read(output([1, 2], usage, reason, logprobs))
    assert watch.answer() == said


def test_what_may_be_approximate_is_scored() -> None:
    for usage, always in ((None, False), (NOTHING, True)):  # a stop string; page selection
        watch = recorder(always)
        watch.read(output([1], usage, "stop"))
        assert isinstance(watch.answer(), Answer)


@pytest.mark.parametrize(
    ("prompt", "params", "can"),
    [
        ("text", SamplingParams(), True),
        ([1, 2], SamplingParams(temperature=2.0, top_p=0.5, seed=3), True),
        ({"type": "token", "prompt_token_ids": [1]}, SamplingParams(), True),
        ({"type": "multimodal", "prompt_token_ids": [1]}, SamplingParams(), False),
        ({"prompt_embeds": object()}, SamplingParams(), False),
        ("text", SamplingParams(n=2), False),
        ("text", SamplingParams(prompt_logprobs=1), False),
        ("text", SamplingParams(extra_args={"memshare": "off"}), False),
        ("text", SamplingParams(structured_outputs=StructuredOutputsParams(json="{}")), False),
    ],
)
def test_which_requests_can_be_scored(prompt: object, params: SamplingParams, can: bool) -> None:
    assert can_be_scored(prompt, params) is can


class Choosy:
    """A guard that chooses every second request."""

    def __init__(self) -> None:
        self.stopped = False
        self.asked = 0
        self.taken: list[object] = []
        self.exact = 0

    def chooses(self) -> bool:
        self.asked += 1
        return self.asked % 2 == 0

    def take(self, answer: object) -> None:
        self.taken.append(answer)

    def left_exact(self) -> None:
        self.exact += 1


async def test_only_what_is_chosen_is_recorded_and_a_client_that_leaves_leaves_nothing() -> None:
    guard = Choosy()
    watch = AnswerWatch(guard, False)  # type: ignore[arg-type]
    closed = []

    async def start(params: SamplingParams) -> AsyncGenerator[RequestOutput, None]:
        try:
            yield output([1], None, None)
            yield output([2], GIVEN_UP, "stop")
        finally:
            closed.append(params.logprobs)

    for _ in range(2):
        outputs = watch.follow(start, "x", SamplingParams(), CALL, None)
        assert len([o async for o in outputs]) == 2
    assert closed == [None, 0]
    assert [type(answer) for answer in guard.taken] == [Answer]
    guard.asked = 1
    outputs = watch.follow(start, "x", SamplingParams(), CALL, None)
    await anext(outputs)
    await outputs.aclose()
    assert (len(guard.taken), len(closed)) == (1, 3), "the engine hears that it left"


def test_while_it_is_stopped_requests_run_exact() -> None:
    guard = Choosy()
    watch = AnswerWatch(guard, False)  # type: ignore[arg-type]
    assert not watch.are_to_be_exact()
    guard.stopped = True
    assert watch.are_to_be_exact()
    assert guard.exact == 1
