"""vLLM's engine and its OpenAI app, put together for one replica."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.exceptions import GracefulHTTPError, RetryableRequestError, VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector, RequestState
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

from cluster.guard.answers import AnswerWatch
from cluster.routing.load import LoadMeter
from cluster.routing.outage import try_again
from cluster.telemetry.load_logger import LoadLogger
from cluster.telemetry.step_stats import StepFeed
from cluster.telemetry.tracing import RequestSpans
from cluster.tenancy.call import Call, RefusedError
from cluster.tenancy.gate import Gate
from cluster.tenancy.salt import brings_salt, salted
from memshare.request_options import RequestOptionsError, parse_request_options

_MAX_ID = 300  # 256 of a client's, and what front ends add
_PLAIN_ID = re.compile("[!-~]+")


class _EngineUsage:
    """What one request of a call uses; vLLM's own counts."""

    def __init__(self, states: list[RequestState]) -> None:
        self._states = states  # one for each choice

    def tokens(self) -> tuple[int, int]:
        """See :meth:`cluster.tenancy.call.RequestTokens.tokens`."""
        prompt = self._states[0].prompt_len if self._states else 0
        detokenizers = [s.detokenizer for s in self._states if s.detokenizer is not None]
        return prompt, sum(d.num_output_tokens() for d in detokenizers)


class GatedAsyncLLM(AsyncLLM):
    """vLLM's engine client, through which every front end comes, whatever its protocol.

    It takes the caller from the :class:`~cluster.tenancy.gate.Gate`: prompts are salted for the
    tenant, requests that ask for more than the key allows are refused, and tokens are counted.
    """

    gate: Gate
    public_name: str
    uses_memshare: bool
    unavailable_s: int
    spans: RequestSpans | None = None  # only if `otlp_traces_endpoint` is set
    answers: AnswerWatch | None = None  # only if `guard` is set

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """See :meth:`vllm.v1.engine.async_llm.AsyncLLM.generate`.

        Not a generator itself: it raises when called, not when first iterated, while a front end
        can still answer a streamed request with an error.

        Raises:
            VLLMValidationError: HTTP 400; names the option, its value and the fix.
            GracefulHTTPError: HTTP 401 or 403.
            RetryableRequestError: HTTP 503, when iterated; the engine has died.
        """
        call = self._call()
        _require_plain_id(request_id)
        _require_no_salt(prompt)
        _require_no_transfer(sampling_params.extra_args)
        self._require_model(call, options.get("lora_request"))
        sequences = sampling_params.n
        limit = call.caller.sequences_per_request
        if limit is not None and call.sequences + sequences > limit:
            raise VLLMValidationError(
                f"{call.sequences + sequences} sequences (prompts times n) in one request are more "
                f"than the {limit} that are allowed; send several requests",
                parameter="n",
            )
        if self.uses_memshare:
            sampling_params.extra_args = self._memshare_options(call, sampling_params.extra_args)
        call.sequences += sequences

        def start(params: SamplingParams) -> AsyncGenerator[RequestOutput, None]:
            return self._outputs(prompt, params, request_id, options)

        if self.answers is None:
            outputs = start(sampling_params)
        else:
            adapter = options.get("lora_request")
            outputs = self.answers.follow(start, prompt, sampling_params, call, adapter)
        if sampling_params.structured_outputs is not None:
            outputs = _require_a_text(outputs)
        return _run(outputs, call, request_id, sequences, self.unavailable_s)

    @property
    def dead_error(self) -> BaseException:
        """What front ends raise for a request that comes when the engine has died."""
        return RetryableRequestError(try_again(self.unavailable_s))

    def _outputs(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        options: dict[str, Any],
    ) -> AsyncGenerator[RequestOutput, None]:
        if self.spans is None:
            return super().generate(prompt, sampling_params, request_id, **options)
        generate = super().generate

        def start(context: Mapping[str, str]) -> AsyncGenerator[RequestOutput, None]:
            return generate(
                prompt, sampling_params, request_id, **{**options, "trace_headers": context}
            )

        return self.spans.follow(request_id, options.get("trace_headers"), start)

    async def add_request(
        self, request_id: str, prompt: Any, params: Any, *args: Any, **options: Any
    ) -> RequestOutputCollector:
        """See :meth:`vllm.v1.engine.async_llm.AsyncLLM.add_request`; all requests come by here.

        Raises:
            VLLMValidationError: HTTP 400; the prompt brings a salt, or can't be salted.
        """
        call = self._call()
        _require_no_salt(prompt)
        try:
            own: Any = salted(prompt, call.salt)
        except TypeError as error:
            raise VLLMValidationError(str(error), parameter="prompt") from None
        queue = await super().add_request(request_id, own, params, *args, **options)
        processor = self.output_processor
        states = [
            processor.request_states[internal]
            for internal in processor.external_req_ids.get(request_id, ())
            if processor.request_states[internal].queue is queue
        ]
        call.began(request_id, _EngineUsage(states))
        return queue

    def _call(self) -> Call:
        try:
            return self.gate.call()
        except RefusedError as refusal:
            raise GracefulHTTPError(str(refusal), HTTPStatus.UNAUTHORIZED) from None

    def _require_model(self, call: Call, adapter: LoRARequest | None) -> None:
        try:
            self.gate.require_model(
                call, self.public_name if adapter is None else adapter.lora_name
            )
        except RefusedError as refusal:
            raise GracefulHTTPError(str(refusal), HTTPStatus.FORBIDDEN) from None

    def _memshare_options(
        self, call: Call, extra_args: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """The request's extra arguments, as the caller may set them."""
        try:
            options = parse_request_options(extra_args)
        except RequestOptionsError as error:
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from error
        refused = call.caller.permissions.refused(options)
        if refused is not None:
            refusal = self.gate.refuse_options(call, f"vllm_xargs.{refused}")
            raise GracefulHTTPError(str(refusal), HTTPStatus.FORBIDDEN)
        if not options.enabled:
            return extra_args
        exact = call.caller.permissions.always_exact
        if exact or (self.answers is not None and self.answers.are_to_be_exact()):
            return {**(extra_args or {}), "memshare": "off"}
        return extra_args


async def _run(
    outputs: AsyncGenerator[RequestOutput, None],
    call: Call,
    request_id: str,
    sequences: int,
    unavailable_s: int,
) -> AsyncGenerator[RequestOutput, None]:
    """Pass outputs on. Beam search starts its sequences anew for every token: each ends here."""
    try:
        async with aclosing(outputs):  # whoever stops reading aborts
            async for output in outputs:
                yield output
    except EngineDeadError:
        # vLLM's own text points to a stack trace that no client sees, and its status is 500.
        raise RetryableRequestError(try_again(unavailable_s)) from None
    finally:
        call.sequences -= sequences
        call.ended(request_id)


async def _require_a_text(
    outputs: AsyncGenerator[RequestOutput, None],
) -> AsyncGenerator[RequestOutput, None]:
    """Pass on outputs of a request whose text has to fit a grammar.

    vLLM checks that a grammar can be read. Whether there is a text that fits it shows when no token
    is allowed, or when it can't be compiled: the engine then ends the request with an error, which
    vLLM's front end would call its own (500).

    Raises:
        VLLMValidationError: HTTP 400; nothing fits.
    """
    async with aclosing(outputs):
        async for output in outputs:
            if any(completion.finish_reason == "error" for completion in output.outputs):
                raise VLLMValidationError(
                    "no text fits what structured_outputs or response_format asks for: it can't be "
                    "compiled, or a part of it allows nothing, as a schema that only refers to "
                    "itself; correct it",
                    parameter="structured_outputs",
                )
            yield output


def _require_no_salt(prompt: object) -> None:
    if brings_salt(prompt):
        raise VLLMValidationError(
            "the server derives the salt of a tenant from the key; leave cache_salt out",
            parameter="cache_salt",
        )


def _require_plain_id(request_id: str) -> None:
    """It stands in logs, traces and the live page, and is a client's in part."""
    if len(request_id) > _MAX_ID or not _PLAIN_ID.fullmatch(request_id):
        raise VLLMValidationError(
            f"a request id (header X-Request-Id, field request_id) has at most {_MAX_ID} letters, "
            "digits and signs of ASCII, with what the server adds to it, and no spaces",
            parameter="request_id",
        )


def _require_no_transfer(extra_args: Mapping[str, Any] | None) -> None:
    """With other connectors a client may tell the engine by them to read and keep foreign KV."""
    if extra_args and extra_args.get("kv_transfer_params") is not None:
        raise VLLMValidationError(
            "this server moves no KV between engines; leave kv_transfer_params out",
            parameter="kv_transfer_params",
        )


def start_engine(
    options: Namespace,
    uses_memshare: bool,
    unavailable_s: int,
    gate: Gate,
    meter: LoadMeter,
    feed: StepFeed,
) -> GatedAsyncLLM:
    """Start the engine's processes and load the model. Blocks until it is loaded.

    Args:
        options: see :func:`cluster.engine.options.parse_engine_options`.
        uses_memshare: whether requests may have MemShare's options.
        unavailable_s: seconds after which clients are told to come again when it has died.
        gate: knows the caller of each request.
        meter: is told the engine's load after every step.
        feed: gets what every engine step reports.
    """
    engine_args = AsyncEngineArgs.from_cli_args(options)
    engine = GatedAsyncLLM.from_vllm_config(
        vllm_config=engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER),
        usage_context=UsageContext.OPENAI_API_SERVER,
        # The first writes to Ray's metrics, the second to /metrics of the HTTP port.
        stat_loggers=[
            RayPrometheusStatLogger,
            PrometheusStatLogger,
            lambda vllm_config, _: LoadLogger(meter, vllm_config),
            feed.logger,
        ],
        disable_log_stats=options.disable_log_stats,
    )
    assert isinstance(engine, GatedAsyncLLM)
    engine.gate = gate
    engine.public_name = options.served_model_name[0]
    engine.uses_memshare = uses_memshare
    engine.unavailable_s = unavailable_s
    if options.otlp_traces_endpoint is not None:
        live = engine.output_processor.request_states
        engine.spans = RequestSpans(
            lambda request: live[request].external_req_id if request in live else None
        )
        feed.listeners.append(engine.spans.record)
    return engine


async def openai_app(engine: AsyncLLM, options: Namespace) -> FastAPI:
    """vLLM's own HTTP app in front of ``engine``."""
    tasks = await engine.get_supported_tasks()
    app = build_app(options, tasks, engine.model_config)
    await init_app_state(engine, app.state, options, tasks)
    # Where vLLM's error handler tells its HTTP server to stop. Here the replica ends by itself.
    app.state.server = SimpleNamespace(should_exit=False)
    return app
