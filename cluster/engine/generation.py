"""One request through vLLM for a front end that is not vLLM's own HTTP app.

The request is vLLM's own model of it, and vLLM renders the prompt, chooses the defaults and tells
reasoning apart, so that the answer is the one that the HTTP app would give.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from starlette.datastructures import State
from vllm.config import VllmConfig
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
from vllm.exceptions import GenerationError
from vllm.inputs import EngineInput
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.parser.abstract_parser import Parser
from vllm.renderers.inputs.preprocess import extract_prompt_components, extract_prompt_len
from vllm.sampling_params import RequestOutputKind
from vllm.tracing import extract_trace_headers
from vllm.v1.engine.async_llm import AsyncLLM

from cluster.grpc.messages import Cost, Piece
from cluster.grpc.status import http_status
from memshare.engine.compatibility import config_of


class Generation:
    """Runs requests in one engine. Each call is one sequence.

    Attributes:
        memshare_policy: the policy that runs in the engine; ``""`` if nothing is reclaimed.
    """

    def __init__(self, engine: AsyncLLM, state: State) -> None:
        """Take hold of what vLLM's HTTP app uses.

        Args:
            engine: the engine's client.
            state: the app's, as ``init_app_state`` has filled it.
        """
        self._engine = engine
        self._completion: OpenAIServingCompletion = state.openai_serving_completion
        self._chat: OpenAIServingChat = state.openai_serving_chat
        self.memshare_policy = _policy_of(engine.vllm_config)

    @property
    def vllm_config(self) -> VllmConfig:
        """As the engine runs with it."""
        return self._engine.vllm_config

    @property
    def has_died(self) -> bool:
        """Whether the engine is gone for good."""
        return bool(self._engine.errored)

    @property
    def model_name(self) -> str:
        """Of the served model."""
        return str(self._completion.models.model_name())

    @property
    def adapters(self) -> list[str]:
        """Names of LoRA adapters."""
        return list(self._completion.models.lora_requests)

    @property
    def role(self) -> str:
        """Of the model in a chat."""
        return str(self._chat.response_role)

    def require_model(self, name: str) -> None:
        """Check that a model, or an adapter, of this name is served; empty is the model.

        Raises:
            StatusError: NOT_FOUND.
        """
        served = [self.model_name, *self.adapters]
        if name and name not in served:
            message = f"model: there is no {name!r}; served: {', '.join(served)}"
            raise http_status(HTTPStatus.NOT_FOUND, message)

    async def complete(
        self, body: Mapping[str, Any], request_id: str, metadata: Mapping[str, str]
    ) -> AsyncGenerator[Piece, None]:
        """Continue a prompt.

        Args:
            body: of a request to ``/v1/completions`` with one prompt. Its ``stream`` tells whether
                there is one piece or many.
            request_id: of the engine; no other request may have it.
            metadata: of the call: its trace context and ``session_id`` go on to the engine.

        Raises:
            StatusError: the request is refused.
            Exception: of vLLM; see :func:`cluster.grpc.status.status_of`.
        """
        request = CompletionRequest.model_validate(dict(body))
        self.require_model(request.model or "")
        prompt = _only(await self._completion.render_completion_request(request))
        meter = _StreamMeter()
        outputs = self._outputs(self._completion, request, prompt, request_id, metadata)
        async with aclosing(outputs):
            async for output in outputs:
                completion = meter.read(output)
                yield _piece(completion, completion.text, "", meter.cost(output))

    async def chat(
        self, body: Mapping[str, Any], request_id: str, metadata: Mapping[str, str]
    ) -> AsyncGenerator[Piece, None]:
        """Answer a conversation.

        Args:
            body: of a request to ``/v1/chat/completions``, without tools.
            request_id: as for :meth:`complete`.
            metadata: as for :meth:`complete`.

        Raises:
            StatusError: the request is refused.
            Exception: of vLLM; see :func:`cluster.grpc.status.status_of`.
        """
        request = ChatCompletionRequest.model_validate(dict(body))
        self.require_model(request.model or "")
        rendered = await self._chat.render_chat_request(request)
        if isinstance(rendered, ErrorResponse):
            raise _refused(rendered)
        prompt = _only(rendered[1])
        kwargs = self._chat._effective_chat_template_kwargs(request)
        parser = self._parser(request, kwargs)
        token_ids = extract_prompt_components(self._engine.model_config, prompt).token_ids
        reasoning = self._chat._engine_reasoning_kwargs(request, parser, kwargs, token_ids)
        meter = _StreamMeter(parser)
        outputs = self._outputs(self._chat, request, prompt, request_id, metadata, **reasoning)
        async with aclosing(outputs):
            async for output in outputs:
                completion = meter.read(output)
                text, thought = _told_apart(request, parser, completion, meter.prompt)
                yield _piece(completion, text, thought, meter.cost(output))

    async def abort(self, request_id: str) -> None:
        """End a request; its iterator yields a last piece."""
        await self._engine.abort(request_id)

    def _parser(self, request: ChatCompletionRequest, kwargs: dict[str, Any]) -> Parser | None:
        tokenizer = self._engine.renderer.tokenizer
        if self._chat.parser_cls is None or tokenizer is None:
            return None
        return self._chat._make_parser(request, tokenizer, kwargs)

    async def _outputs(
        self,
        serving: OpenAIServingCompletion | OpenAIServingChat,
        request: CompletionRequest | ChatCompletionRequest,
        prompt: EngineInput,
        request_id: str,
        metadata: Mapping[str, str],
        **options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The engine's outputs: one, or one for each step if the request is streamed."""
        config = self._engine.model_config
        max_tokens = get_max_tokens(
            config.max_model_len,
            request.max_tokens,
            extract_prompt_len(config, prompt),
            serving.default_sampling_params,
            serving.override_max_tokens,
            truncate_prompt_tokens=request.truncate_prompt_tokens,
        )
        params = request.to_sampling_params(max_tokens, serving.default_sampling_params)
        assert params.output_kind != RequestOutputKind.CUMULATIVE
        adapter = serving._maybe_get_adapters(request)
        outputs = self._engine.generate(
            prompt,
            params,
            request_id,
            lora_request=adapter,
            trace_headers=extract_trace_headers(metadata) or None,
            session_id=metadata.get("session_id"),
            **options,
        )
        # Closed as soon as nobody reads on, which aborts the request in the engine.
        async with aclosing(outputs):
            async for output in outputs:
                if output.outputs[0].finish_reason == "error":
                    raise GenerationError("the engine could not finish the request; try again")
                yield output


class _StreamMeter:
    """Adds up what a request uses."""

    def __init__(self, parser: Parser | None = None) -> None:
        self._parser = parser
        self._cached = 0
        self._written = 0
        self._token_ids: list[int] = []  # kept only where reasoning has to be counted
        self.prompt: list[int] = []

    def read(self, output: RequestOutput) -> CompletionOutput:
        """Take an output; returns its only sequence."""
        completion: CompletionOutput = output.outputs[0]
        if output.prompt_token_ids:
            self.prompt = output.prompt_token_ids  # with the first output only
        self._cached = max(self._cached, output.num_cached_tokens or 0)
        self._written += len(completion.token_ids)
        if self._parser is not None:
            self._token_ids.extend(completion.token_ids)
        return completion

    def cost(self, output: RequestOutput) -> Cost | None:
        """What was used in all, if this is the last output."""
        if not output.finished:
            return None
        thought = (
            0 if self._parser is None else self._parser.count_reasoning_tokens(self._token_ids)
        )
        returned = (output.kv_transfer_params or {}).get("memshare")
        return Cost(len(self.prompt), self._cached, self._written, thought, returned)


def _piece(completion: CompletionOutput, text: str, reasoning: str, cost: Cost | None) -> Piece:
    return Piece(
        text=text,
        token_ids=completion.token_ids,
        reasoning=reasoning,
        logprobs=completion.logprobs,
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
        cost=cost,
    )


def _told_apart(
    request: ChatCompletionRequest,
    parser: Parser | None,
    completion: CompletionOutput,
    prompt: list[int],
) -> tuple[str, str]:
    """Content and reasoning of an output."""
    if parser is None:
        return completion.text, ""
    if not request.stream:
        parser.set_prompt_token_ids(prompt)
        reasoning, content, _ = parser.parse(
            completion.text, request, model_output_token_ids=completion.token_ids
        )
        return content or "", reasoning or ""
    delta = parser.parse_delta(
        delta_text=completion.text,
        delta_token_ids=list(completion.token_ids),
        request=request,
        prompt_token_ids=prompt,
        finished=completion.finish_reason is not None,
    )
    if delta is None:
        return "", ""
    return delta.content or "", delta.reasoning or ""


def _only(rendered: list[EngineInput] | ErrorResponse) -> EngineInput:
    """The one prompt of a request.

    Raises:
        StatusError: vLLM refuses the request.
    """
    if isinstance(rendered, ErrorResponse):
        raise _refused(rendered)
    (prompt,) = rendered
    return prompt


def _refused(response: ErrorResponse) -> Exception:
    return http_status(HTTPStatus(response.error.code), response.error.message)


def _policy_of(config: VllmConfig) -> str:
    if config.kv_transfer_config is None:  # the engine runs without MemShare
        return ""
    memshare = config_of(config)
    return "" if memshare.mode == "off" else memshare.policy.name
