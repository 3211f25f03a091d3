"""The exact request that scores an answer: prompt and answer are one prompt, and nothing is
generated that anybody reads."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import aclosing

from vllm.logprobs import Logprob
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from cluster.guard.answers import Answer
from cluster.tenancy.gate import Gate

_LAST = 1_000_000  # vLLM serves the smaller number first, where it serves by priority


class ShadowError(Exception):
    """An answer could not be scored."""


class ShadowScorer:
    """Scores answers in the engine that gave them."""

    def __init__(self, engine: AsyncLLM, gate: Gate) -> None:
        """Take hold of the engine's client, and of the gate that knows the tenants' salts."""
        self._engine = engine
        self._gate = gate
        config = engine.vllm_config
        self._priority = _LAST if config.scheduler_config.policy == "priority" else 0
        self._most = config.model_config.max_model_len - 1  # a token is generated, too

    async def __call__(self, answer: Answer) -> list[float]:
        """The exact model's log-probabilities of an answer's tokens, natural, one for each.

        vLLM computes all of the prompt for it (what asks for its log-probabilities reads no prefix
        cache), and MemShare leaves such a request exact. It runs under the tenant's salt, and
        counts for nobody.

        Raises:
            ShadowError: the engine did not score all of it.
            EngineDeadError: the engine has ended.
        """
        tokens = [*answer.prompt, *answer.tokens][: self._most]
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            flat_logprobs=True,  # no object for every token of a long prompt
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"memshare": "off"},
        )
        last: RequestOutput | None = None
        with self._gate.acting_for(answer.call):
            outputs = AsyncLLM.generate(
                self._engine,
                {"prompt_token_ids": tokens},
                params,
                f"shadow-{uuid.uuid4().hex}",
                lora_request=answer.adapter,
                priority=self._priority,
            )
            async with aclosing(outputs):  # whoever is cancelled aborts
                async for output in outputs:
                    last = output
        scores = None if last is None else last.prompt_logprobs
        if scores is None or len(scores) != len(tokens):
            raise ShadowError("the engine returned no log-probabilities of the prompt")
        return [_of(scores[i], tokens[i]) for i in range(len(answer.prompt), len(tokens))]


def _of(entry: Mapping[int, Logprob] | None, token: int) -> float:
    if entry is None:  # as at the first position of a prompt
        raise ShadowError("the engine returned no log-probability of a token")
    return entry[token].logprob
