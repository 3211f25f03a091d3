"""What is recorded of a chosen request while it is answered, and kept from its client."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from cluster.guard.guard import Guard
from cluster.tenancy.call import Call
from memshare.request_options import USAGE

NothingToScore = Literal["untouched", "unscorable"]
"""The request stayed exact; or it did not end by itself, or its log-probabilities are not all
there."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A request that MemShare approximated, as it was answered.

    Attributes:
        call: for whom; the shadow has its salt.
        adapter: the LoRA adapter that answered.
        prompt: its token ids.
        tokens: those generated.
        served: natural logarithm of each one's probability, before temperature.
    """

    call: Call
    adapter: LoRARequest | None
    prompt: Sequence[int]
    tokens: Sequence[int]
    served: Sequence[float]


def can_be_scored(prompt: object, params: SamplingParams) -> bool:
    """Whether an answer can be scored afterwards: from tokens alone, token by token."""
    return (
        _has_tokens_alone(prompt)
        and params.n == 1
        # The model's own distribution is not the one that a grammar leaves.
        and params.structured_outputs is None
        # Served exactly.
        and params.prompt_logprobs is None
        and (params.extra_args or {}).get("memshare") != "off"
        # These would not be the sampled token's.
        and params.logprob_token_ids is None
    )


def _has_tokens_alone(prompt: object) -> bool:
    if not isinstance(prompt, Mapping):
        return isinstance(prompt, str | list)
    others = ("multi_modal_data", "prompt_embeds", "encoder_prompt")
    return prompt.get("type", "token") == "token" and all(prompt.get(o) is None for o in others)


class AnswerRecorder:
    """Records one request. What it asks of the engine beside the client's wishes is taken out of
    the outputs again, so that the client sees what it would have seen."""

    def __init__(
        self, params: SamplingParams, call: Call, adapter: LoRARequest | None, always: bool
    ) -> None:
        """Prepare.

        Args:
            params: as the client wants them; not changed.
            call: whose request it is.
            adapter: that answers.
            always: whether requests are approximated without a block being given up.
        """
        self._call = call
        self._adapter = adapter
        self._always = always
        self._adds_logprobs = params.logprobs is None
        extra = params.extra_args or {}
        self._adds_usage = extra.get(USAGE) != "on"
        self._whole = params.output_kind == RequestOutputKind.CUMULATIVE
        self.params = params.clone()
        """With which the request is to run."""
        self.params.extra_args = {**extra, USAGE: "on"}
        if self._adds_logprobs:
            self.params.logprobs = 0  # of the sampled token alone
        self._prompt: Sequence[int] = ()
        self._tokens: list[int] = []
        self._served: list[float] = []
        self._usage: Mapping[str, Any] | None = None
        self._ended_by_itself = False

    def read(self, output: RequestOutput) -> None:
        """Take an output, and what is not the client's out of it."""
        completion = output.outputs[0]
        if self._whole:
            self._tokens.clear()
            self._served.clear()
        self._tokens.extend(completion.token_ids)
        for token, entry in zip(completion.token_ids, completion.logprobs or (), strict=False):
            if entry is not None and token in entry:
                self._served.append(entry[token].logprob)
        self._prompt = output.prompt_token_ids or self._prompt
        self._ended_by_itself = completion.finish_reason in ("stop", "length")
        if self._adds_logprobs:
            completion.logprobs = completion.cumulative_logprob = None
        returned = output.kv_transfer_params
        if returned is not None and "memshare" in returned:
            self._usage = returned["memshare"]
            if self._adds_usage:
                rest = {name: value for name, value in returned.items() if name != "memshare"}
                output.kv_transfer_params = rest or None

    def answer(self) -> Answer | NothingToScore:
        """What there is to score, when the last output has been read."""
        whole = 0 < len(self._tokens) == len(self._served)
        if not (whole and self._ended_by_itself and self._prompt):
            return "unscorable"
        if not self._touched():
            return "untouched"
        return Answer(self._call, self._adapter, self._prompt, self._tokens, self._served)

    def _touched(self) -> bool:
        """Whether it may be approximate. The engine says nothing of one that a stop string ends."""
        if self._always or self._usage is None:
            return True
        losses = ("blocks_shared", "tokens_dropped", "tokens_shared")
        return any(self._usage[loss] for loss in losses)


class AnswerWatch:
    """The guard as the engine's client knows it."""

    def __init__(self, guard: Guard[Answer], always: bool) -> None:
        """Hand answers to ``guard``.

        Args:
            guard: of this replica.
            always: whether requests are approximated without a block being given up.
        """
        self._guard = guard
        self._always = always

    def are_to_be_exact(self) -> bool:
        """Whether the request that comes now is to run exact, as the guard has stopped MemShare."""
        if self._guard.stopped:
            self._guard.left_exact()
        return self._guard.stopped

    def follow(
        self,
        start: Callable[[SamplingParams], AsyncGenerator[RequestOutput, None]],
        prompt: object,
        params: SamplingParams,
        call: Call,
        adapter: LoRARequest | None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Start a request, and record it if it is chosen.

        Args:
            start: starts it with such parameters.
            prompt: in a form that vLLM's engine client takes.
            params: as the client wants them.
            call: whose request it is.
            adapter: that answers.
        """
        if not (can_be_scored(prompt, params) and self._guard.chooses()):
            return start(params)
        recorder = AnswerRecorder(params, call, adapter, self._always)
        return _recorded(start(recorder.params), recorder, self._guard.take)


async def _recorded(
    outputs: AsyncGenerator[RequestOutput, None],
    recorder: AnswerRecorder,
    take: Callable[[Answer | NothingToScore], None],
) -> AsyncGenerator[RequestOutput, None]:
    """Pass outputs on; ``take`` gets the answer. A client that leaves leaves none."""
    async with aclosing(outputs):
        async for output in outputs:
            recorder.read(output)
            if output.finished:
                take(recorder.answer())
            yield output
