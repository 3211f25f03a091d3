"""One replica: vLLM's own OpenAI app around an engine with MemShare, in one Ray Serve actor.

"Direct": the replica is the ingress, so that a token passes no process between engine and proxy.
vLLM is imported when a replica starts, not with this module: Ray Serve imports that, too, when it
builds the application, and would spend many seconds on it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import platform
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from cluster.config import AuthConfig, ClusterArgs, without_secrets
from cluster.dashboard.routes import PREFIX, page_app
from cluster.dashboard.sample_reporter import CountFault, SampleReporter
from cluster.grpc.service import GrpcService
from cluster.http.asgi import DisconnectOnCancel, KeyGate, RetryAfter
from cluster.http.body import StrictBody
from cluster.processes.closing import Closed
from cluster.processes.engine_prewarm import EnginePrewarm
from cluster.processes.orphan_reaper import OrphanReaper
from cluster.processes.workers import Workers
from cluster.routing.load import LoadMeter, to_stats
from cluster.telemetry.metrics import ReplicaMetrics
from cluster.telemetry.serve_logs import (
    log_no_calls,
    log_no_refusals,
    logs_kept,
    say_refusals_in_a_line,
)
from cluster.tenancy.exposure import require_keys_or_localhost
from cluster.tenancy.gate import Gate, TenantCounters
from cluster.tenancy.keys import WatchedKeys
from cluster.tenancy.ledger import RayLedgerClient
from cluster.tenancy.limits import Ledger, Limiter, LocalLedgerClient
from memshare.config import MemShareConfig
from memshare.process_env import collector_at_rest
from memshare.small_model.names import resolve_model
from memshare.telemetry.logs import set_up_logging

if TYPE_CHECKING:
    from fastapi import FastAPI
    from vllm.v1.engine.async_llm import AsyncLLM

    from cluster.dashboard.engine_sampler import EngineSampler
    from cluster.guard.answers import Answer
    from cluster.guard.guard import Guard

logger = logging.getLogger(__name__)

_POOL_WAIT_S = 30.0  # at most so long does an engine's start wait for the evaluators
_WATCH_S = 0.2  # how long an engine's death may go unnoticed
_LAST_WORDS_S = 2.0  # at most so long does a replica wait for failed requests to be answered
_FLUSH_S = 0.5  # for the last of their answers to reach a proxy


class EngineReplica(GrpcService):
    """An engine, its OpenAI app and its gRPC methods.

    Metrics: the engine's series, MemShare's among them, are on ``/metrics`` of the HTTP port and on
    the metrics port of the replica's Ray node. With several replicas the HTTP port shows the one
    that Ray Serve happens to choose; scrape the Ray nodes, where a label tells replicas apart.
    """

    # None also where a constructor has failed: Ray Serve calls the destructor all the same.
    _engine: AsyncLLM | None = None
    _watch: asyncio.Task[None] | None = None
    _tending: asyncio.Task[None] | None = None
    _page: SampleReporter | None = None
    _guard: Guard[Answer] | None = None

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self,
        args: ClusterArgs,
        pool: DeploymentHandle[Any] | None,
        ledger: DeploymentHandle[Any] | None,
        board: DeploymentHandle[Any] | None,
    ) -> None:
        """Start the engine. Takes as long as loading the model does.

        Args:
            args: the application's arguments.
            pool: the :class:`~cluster.evaluator_pool.EvaluatorPool`, if stage one runs on it.
            ledger: the :class:`~cluster.tenancy.ledger.LimitLedger`, if there are other replicas.
            board: the :class:`~cluster.dashboard.hub.DashboardHub`, if there is a live page.

        Raises:
            ConfigError: the key table is wrong, or missing where others can reach the server.
        """
        reaper = OrphanReaper()
        _set_up_logs(args)
        await asyncio.to_thread(require_keys_or_localhost, args.auth)
        prewarm = EnginePrewarm()
        replica_id = serve.get_replica_context().replica_id.unique_id
        counts = ReplicaMetrics(args.public_name, replica_id)
        gate, self._meter = _gate(args.auth, ledger, replica_id, counts), LoadMeter()
        if args.replica.pin_cpus:
            _pin(args)
        await _await_pool(pool)
        model = await asyncio.to_thread(resolve_model, args.model)

        with collector_at_rest():
            from vllm.utils.gc_utils import freeze_gc_heap

            from cluster.dashboard.front_end import watch_engine
            from cluster.engine.client import openai_app, start_engine
            from cluster.engine.generation import Generation
            from cluster.engine.options import parse_engine_options
            from cluster.guard.start import start_guard
            from cluster.telemetry.step_stats import StepFeed

        # Another replica takes the next try at once.
        unavailable_s = args.replica.unavailable_retry_after_s if args.most_replicas == 1 else 1
        count_fault = partial(counts.count, "monitoring_faults")
        feed = StepFeed(count_fault)
        with logs_kept():
            options = parse_engine_options(args, model, _on_this_machine(args.memshare))
            with prewarm.taken():
                engine = start_engine(
                    options, args.uses_memshare, unavailable_s, gate, self._meter, feed
                )
            self._engine = engine
            app = await openai_app(engine, options)
        say_refusals_in_a_line()
        if args.guard is not None:
            selects = args.memshare.selection.on
            self._guard = start_guard(args.guard, engine, gate, self._meter, counts, selects)
        if board is not None:
            state = self._guard.state if self._guard is not None else None
            show_text = args.page.show_text
            watch = watch_engine(engine, replica_id, platform.node(), show_text, state)
            feed.listeners.append(watch.record)
            self._open_page(app, args, board, watch, count_fault)
        self._asgi = _gated(app, args, gate, engine, unavailable_s)
        self._start_grpc(args, gate, Generation(engine, app.state))
        self._watch_over(engine, gate, reaper)
        freeze_gc_heap()  # as vLLM's own server: what is here now stays, and is not searched again

    def _watch_over(self, engine: AsyncLLM, gate: Gate, reaper: OrphanReaper) -> None:
        workers = Workers()
        reaper.remove_at_the_end(workers.shared_memory())
        self._watch = asyncio.create_task(_exit_with(engine, workers, gate))
        self._tending = asyncio.create_task(gate.tend())

    def _open_page(
        self,
        app: FastAPI,
        args: ClusterArgs,
        board: DeploymentHandle[Any],
        watch: EngineSampler,
        count_fault: CountFault,
    ) -> None:
        guard = self._guard
        self._page = SampleReporter(
            watch,
            board,
            args.page.interval_s,
            count_fault,
            lambda: guard.let_go_on("operator") if guard is not None else None,
        )
        self._page.start()
        shown = without_secrets(args).model_dump(mode="json")
        app.mount(PREFIX, page_app(board, shown, count_fault))

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """The app that Ray Serve runs, called once after the constructor."""
        return self._asgi

    async def check_health(self) -> None:
        """Ray Serve's health check.

        Raises:
            RuntimeError: the engine has ended. Not vLLM's EngineDeadError: Ray Serve's controller
                would import vLLM to unpickle it, and stand still for all that time.
        """
        if self._engine is None or self._engine.errored:
            raise RuntimeError("the engine has ended")

    async def record_routing_stats(self) -> dict[str, float]:
        """The replica's load for :mod:`cluster.routing.router`; empty before the first step."""
        load = self._meter.read()
        return to_stats(load) if load else {}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The same for :class:`~cluster.routing.autoscaler.KVPressurePolicy`."""
        return await self.record_routing_stats()

    async def close(self) -> Closed:
        """Take no further requests: who comes is told to come again later. Idempotent. See
        :func:`cluster.processes.closing.drain`."""
        self._gate.close(math.ceil(self._args.replica.retry_after_s))
        if self._guard is not None:
            self._guard.close()
        grace = self._args.replica.graceful_shutdown_timeout_s
        return Closed(grace_s=grace, under_way=self._gate.under_way)

    async def __del__(self) -> None:
        """Ray Serve's destructor, also after a constructor that failed: ends the engine."""
        for task in (self._watch, self._tending):
            if task is not None:
                task.cancel()
        if self._guard is not None:
            self._guard.close()
        if self._page is not None:
            self._page.stop()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.shutdown)


def _set_up_logs(args: ClusterArgs) -> None:
    log_no_calls()
    log_no_refusals()
    set_up_logging(args.memshare.logs)


def _gated(
    app: FastAPI, args: ClusterArgs, gate: Gate, engine: AsyncLLM, unavailable_s: float
) -> ASGIApp:
    """vLLM's app behind what comes before it: keys, strict bodies, and when to come again."""
    strict = StrictBody(app, args.replica.max_body_bytes, args.replica.body_timeout_s)
    hinted = RetryAfter(
        strict, lambda: unavailable_s if engine.errored else args.replica.retry_after_s
    )
    return DisconnectOnCancel(KeyGate(hinted, gate), routes=app.routes)


def _gate(
    auth: AuthConfig, ledger: DeploymentHandle[Any] | None, replica_id: str, counts: TenantCounters
) -> Gate:
    keys = WatchedKeys(auth.keys) if auth.keys.exists else None
    ledger_client = LocalLedgerClient(Ledger()) if ledger is None else RayLedgerClient(ledger)
    return Gate(keys, Limiter(ledger_client, replica_id), counts, auth.without_keys)


async def _exit_with(engine: AsyncLLM, workers: Workers, gate: Gate) -> None:
    """End this process when the engine has died, so that Ray Serve replaces the replica at once."""
    while not engine.errored:
        await asyncio.sleep(_WATCH_S)
        if workers.one_is_lost():
            workers.kill_engines()  # and the engine is errored in a moment
    logger.error("the engine has died: the replica exits, to be replaced")
    end = time.monotonic() + _LAST_WORDS_S
    while gate.under_way and time.monotonic() < end:
        await asyncio.sleep(_FLUSH_S / 10)
    await asyncio.sleep(_FLUSH_S)
    logging.shutdown()
    # Not sys.exit: this is not the actor's own thread, and Ray Serve would wait for requests.
    os._exit(1)


async def _await_pool(pool: DeploymentHandle[Any] | None) -> None:
    """Give the pool a chance to be first. An engine serves without it as well."""
    if pool is None:
        return
    try:
        await asyncio.wait_for(pool.ready.remote(), _POOL_WAIT_S)
    except Exception as error:
        logger.warning("the evaluator pool is not ready, the engine starts without it: %r", error)


def _on_this_machine(config: MemShareConfig) -> MemShareConfig:
    """Tell the engine's process, which is not part of the Ray cluster, where that is."""
    if config.evaluator.address is not None:
        return config
    address = ray.get_runtime_context().gcs_address
    evaluator = config.evaluator.model_copy(update={"address": address})
    return config.model_copy(update={"evaluator": evaluator})


def _pin(args: ClusterArgs) -> None:
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = core_lists(
        available=sorted(os.sched_getaffinity(0)),
        replica=serve.get_replica_context().rank.local_rank,
        workers=args.engine.tensor_parallel_size,
        cores=max(1, round(args.replica.cpus)),
    )


def core_lists(available: list[int], replica: int, workers: int, cores: int) -> str:
    """Cores for the workers of one replica, in the form of ``VLLM_CPU_OMP_THREADS_BIND``.

    Args:
        available: ids of the machine's cores; when they run out, counting starts again.
        replica: which replica of this machine, from 0.
        workers: workers of one replica.
        cores: cores of one worker.
    """
    first = replica * workers * cores
    lists = [
        [available[(first + w * cores + c) % len(available)] for c in range(cores)]
        for w in range(workers)
    ]
    return "|".join(",".join(map(str, sorted(set(ids)))) for ids in lists)
