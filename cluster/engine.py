"""vLLM's engine and its OpenAI app, put together for one replica."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

from memshare.request_options import RequestOptionsError, parse_request_options


class MemShareAsyncLLM(AsyncLLM):
    """vLLM's engine client, which refuses requests with wrong MemShare options.

    Every front end, whatever its protocol, comes through ``generate``.
    """

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """See :meth:`vllm.v1.engine.async_llm.AsyncLLM.generate`.

        Not a generator itself: it raises when called, not when first iterated, while a front end
        can still answer a streamed request with an error.

        Raises:
            VLLMValidationError: HTTP 400; names the option, its value and the fix.
        """
        try:
            parse_request_options(sampling_params.extra_args)
        except RequestOptionsError as error:
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from error
        return super().generate(prompt, sampling_params, request_id, **options)


def start_engine(options: Namespace, uses_memshare: bool) -> AsyncLLM:
    """Start the engine's processes and load the model. Blocks until it is loaded.

    Args:
        options: see :func:`cluster.engine_options.parse_engine_options`.
        uses_memshare: False gives vLLM's own client.
    """
    engine_class = MemShareAsyncLLM if uses_memshare else AsyncLLM
    engine_args = AsyncEngineArgs.from_cli_args(options)
    return engine_class.from_vllm_config(
        vllm_config=engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER),
        usage_context=UsageContext.OPENAI_API_SERVER,
        # The first writes to Ray's metrics, the second to /metrics of the HTTP port.
        stat_loggers=[RayPrometheusStatLogger, PrometheusStatLogger],
        disable_log_stats=options.disable_log_stats,
    )


async def openai_app(engine: AsyncLLM, options: Namespace) -> FastAPI:
    """vLLM's own HTTP app in front of ``engine``."""
    tasks = await engine.get_supported_tasks()
    app = build_app(options, tasks, engine.model_config)
    await init_app_state(engine, app.state, options, tasks)
    # Where vLLM's error handler tells its HTTP server to stop. Here the replica ends by itself.
    app.state.server = SimpleNamespace(should_exit=False)
    return app
