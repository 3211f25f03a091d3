"""Arguments of the Ray Serve application: one typed model, checked before anything starts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from cluster.contradictions import refuse_contradictions
from cluster.guard.config import GuardConfig
from cluster.tenancy.keys import KeylessConfig, KeySource
from memshare.config import (
    ENV_PREFIX,
    ConfigError,
    Fraction,
    MemShareConfig,
    Real,
    Section,
    Whole,
    explain,
    load_config,
)

ExtraValue = str | int | float | bool

MAX_REQUEST_BYTES = 64 * 2**20
"""No replica may be told to take larger requests, and gRPC proxies take none."""


class EngineConfig(Section):
    """Options of the vLLM engine in every replica. None leaves vLLM's own default."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """Workers (GPUs, or CPU processes) that share one copy of the model."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of weights and activations; ``auto`` takes the model's own."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Tokens of prompt and output together that one request may have."""
    block_size: int | None = Field(default=None, ge=1)
    """Token slots in one KV block. On a CPU a multiple of 32."""
    num_gpu_blocks_override: int | None = Field(default=None, ge=2)
    """KV blocks, instead of as many as memory holds. For tests under a short KV cache."""
    max_num_seqs: int | None = Field(default=None, ge=1)
    """Requests that run at the same time in one replica."""
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    """Tokens computed in one engine step."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0.0, le=1.0)
    """Fraction of a GPU's memory that one replica may take."""
    enable_prefix_caching: bool = True
    """Whether requests reuse KV blocks of equal prefixes. MemShare works with it on."""
    enforce_eager: bool = False
    """Whether to run without CUDA graphs and compilation. Starts faster, serves slower on a GPU."""
    seed: int = Field(default=0, ge=0)
    """Seed of the engine's random numbers."""
    load_format: str | None = Field(default=None, min_length=1)
    """Format of the weights on disk, such as ``safetensors``; ``dummy`` makes random weights."""
    distributed_executor_backend: Literal["uni", "mp", "ray"] | None = None
    """How workers run: in the engine's process (``uni``), as its child processes (``mp``) or, with
    GPUs only, as Ray actors in a placement group (``ray``). None lets vLLM choose."""
    extra: dict[str, ExtraValue] = Field(default_factory=dict)
    """Any other option of vLLM's OpenAI server by its name, with ``_`` or ``-``, value as on its
    command line. Checked by vLLM's own parser when the application is built."""

    @field_validator("extra", mode="before")
    @classmethod
    def _flat(cls, extra: object) -> object:
        # One line for a wrong value, where pydantic would report each member of the union.
        if isinstance(extra, Mapping):
            for name, value in extra.items():
                if not isinstance(value, ExtraValue):
                    raise ValueError(
                        f"{name} = {value!r} is neither text, number nor boolean; "
                        "write lists and objects as JSON text"
                    )
        return extra

    @model_validator(mode="after")
    def _one_process_one_rank(self) -> EngineConfig:
        if self.distributed_executor_backend == "uni" and self.tensor_parallel_size > 1:
            raise ValueError(
                f"tensor_parallel_size ({self.tensor_parallel_size}) needs more than one process, "
                "but distributed_executor_backend is 'uni'; set 'mp', 'ray' or leave it out"
            )
        return self


class ReplicaConfig(Section):
    """One replica as Ray Serve sees it: resources, limits and supervision."""

    cpus: float = Field(default=1.0, ge=0.0)
    """CPU cores that Ray reserves for one replica."""
    gpus: float = Field(default=0.0, ge=0.0)
    """GPUs that Ray reserves for one replica; 0 on a CPU. At least ``tensor_parallel_size``; under
    the ``ray`` executor exactly as many, one for each worker."""
    nodes: int = Field(default=1, ge=1)
    """Nodes that the workers of one replica are spread over. More than one needs GPUs, the ``ray``
    executor, and a fast network between the nodes."""
    pin_cpus: bool = False
    """CPU only, refused with ``gpus``: bind every worker to cores of its own, so that replicas of
    one machine don't compete. Needs ``cpus`` x ``tensor_parallel_size`` x replicas cores."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the replica and its engine, name to value."""
    max_ongoing_requests: int = Field(default=256, ge=1)
    """Requests that one replica works on; vLLM queues those beyond ``max_num_seqs``."""
    max_queued_requests: int | None = Field(default=1024, ge=1)
    """Requests that wait in a proxy while every replica is full; further ones get HTTP 429 or gRPC
    ``RESOURCE_EXHAUSTED``. None has no limit."""
    retry_after_s: float = Field(default=2.0, gt=0.0)
    """Seconds after which a client that got HTTP 429 should try again: its ``Retry-After``."""
    unavailable_retry_after_s: int = Field(default=20, ge=1)
    """Seconds after which a client should try again that came while no replica was left: the
    ``Retry-After`` of HTTP 503 and of gRPC ``UNAVAILABLE``. OpenAI's client tries twice: choose
    half of what a start takes, and at most 60, which it takes for the most."""
    max_body_bytes: int = Field(default=16 * 2**20, ge=1024, le=MAX_REQUEST_BYTES)
    """Bytes of a request; larger ones get HTTP 413 or gRPC ``INVALID_ARGUMENT``."""
    body_timeout_s: Real = Field(default=60.0, gt=0.0)
    """Seconds that a client has to send an HTTP request's body, before it gets HTTP 408."""
    health_check_period_s: float = Field(default=1.0, gt=0.0)
    """Seconds between health checks. A dead engine ends its replica at once; it is replaced at the
    next check."""
    health_check_timeout_s: float = Field(default=30.0, gt=0.0)
    """Seconds without an answer after which a health check has failed; three failures end a
    replica."""
    graceful_shutdown_timeout_s: float = Field(default=300.0, ge=0.0)
    """Seconds that a stopping replica has to finish its requests, before it is killed. It gets no
    new ones meanwhile, and ends as soon as it has none."""
    max_surge_percent: int = Field(default=0, ge=0, le=100)
    """Replicas that a rolling update starts before it stops as many old ones, in percent of all,
    rounded up. They need resources of their own, or the update waits for ever. With 0, old ones
    stop first, and requests to a single replica wait until the new one has loaded the model."""

    @field_validator("env", mode="before")
    @classmethod
    def _texts(cls, env: object) -> object:
        if not isinstance(env, Mapping):
            return env
        for name, value in env.items():
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise ValueError(f"{name} = {value!r} is not text; put it in quotes")
        return {name: str(value) for name, value in env.items()}


class AuthConfig(Section):
    """Who may use the server. Without a key table its own machine only; other set-ups that others
    can reach are refused at start."""

    file: Path | None = None
    """Key table, as an absolute path that exists wherever replicas run. Changes are taken over
    while the server runs. ``memshare keys new`` makes an entry."""
    variable: str | None = Field(default=None, pattern="^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of an environment variable of the replicas that holds a key table, instead of a file or
    beside it. Not ``MEMSHARE_...``: those are MemShare's configuration."""
    without_keys: KeylessConfig = KeylessConfig()
    """Bounds while neither is set."""

    @field_validator("file")
    @classmethod
    def _absolute(cls, file: Path | None) -> Path | None:
        if file is not None and not file.is_absolute():
            raise ValueError("is not absolute; replicas run in folders of their own")
        return file

    @field_validator("variable")
    @classmethod
    def _no_field(cls, variable: str | None) -> str | None:
        if variable is not None and variable.startswith(ENV_PREFIX):
            raise ValueError(f"begins with {ENV_PREFIX}, as only MemShare's configuration may")
        return variable

    @model_validator(mode="after")
    def _one_kind_of_bounds(self) -> AuthConfig:
        if self.keys.exists and "without_keys" in self.model_fields_set:
            raise ValueError(
                "without_keys has no effect beside a key table; leave it out, and set limits of "
                "the table's tenants"
            )
        return self

    @property
    def keys(self) -> KeySource:
        """Where the key table is."""
        return KeySource(self.file, self.variable)


class RoutingConfig(Section):
    """Which replica a request goes to."""

    sessions: bool = True
    """Whether requests of one session, by the header ``x-session-id`` or the gRPC metadata
    ``session_id``, go to one replica, where their prefix is cached."""
    load: Literal["kv", "requests"] = "kv"
    """What tells the better of two replicas: the share of its KV cache that its requests will hold,
    or their number alone."""
    spill_demand: Real = Field(default=1.0, ge=0.0)
    """Load (1: all KV blocks or slots wanted) above which a session may leave its replica. Needs
    ``load: kv`` and ``sessions``."""
    spill_imbalance: Real = Field(default=1.5, ge=1.0)
    """Ratio. It leaves only if its replica's load is so many times the mean of all replicas; so
    does a request without a session its kind's. Needs ``load: kv``, and ``sessions`` or
    ``kinds``."""
    fallbacks: Whole = Field(default=2, ge=0)
    """Replicas. So many others may take a session, the same ones each time; further requests of it
    go anywhere. Needs ``sessions``."""
    kinds: bool = False
    """Whether requests whose kind is named, by the header ``serve_multiplexed_model_id`` or the
    gRPC metadata ``multiplexed_model_id``, prefer replicas that serve this kind. For mixtures of
    experts whose kinds of requests use different experts."""
    report_period_s: Real = Field(default=2.0, gt=0.0)
    """Seconds between two reports of a replica's load. Each goes to every proxy. Needs
    ``load: kv``."""


class ScalingConfig(Section):
    """Replicas by KV pressure."""

    min_replicas: Whole = Field(default=1, ge=1)
    """Never fewer."""
    max_replicas: Whole = Field(ge=1)
    """Never more. Ray needs the resources for them."""
    up_demand: Real = Field(default=0.85, gt=0.0)
    """Load (1: all KV blocks or slots wanted), mean of all replicas, above which some are added."""
    target_demand: Real = Field(default=0.65, gt=0.0)
    """Mean load that their new number aims at."""
    down_demand: Real = Field(default=0.5, ge=0.0)
    """Replicas go only if the mean load stays below this with one fewer, and the two values below
    are at most half their thresholds."""
    up_waiting_share: Fraction = 0.2
    """Fraction of requests that wait in the engines, above which replicas are added."""
    up_preemptions_per_minute: Real = Field(default=2.0, ge=0.0)
    """Preemptions of one replica in a minute, mean, above which replicas are added. Each recomputes
    a request."""
    up_delay_s: Real = Field(default=30.0, ge=0.0)
    """Seconds that pressure must last."""
    down_delay_s: Real = Field(default=300.0, ge=0.0)
    """Seconds that slack must last."""
    look_back_s: Real = Field(default=30.0, gt=0.0)
    """Seconds over which loads are averaged. More than ``report_period_s``."""
    report_period_s: Real = Field(default=5.0, gt=0.0)
    """Seconds between two reports of a replica to the autoscaler."""

    @model_validator(mode="after")
    def _ordered(self) -> ScalingConfig:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) must not be below min_replicas "
                f"({self.min_replicas}); raise the one or lower the other"
            )
        if not self.down_demand < self.target_demand < self.up_demand:
            raise ValueError(
                f"down_demand ({self.down_demand}) < target_demand ({self.target_demand}) < "
                f"up_demand ({self.up_demand}) must hold, or replicas come and go without end"
            )
        if self.look_back_s <= self.report_period_s:
            raise ValueError(
                f"look_back_s ({self.look_back_s}) must be more than report_period_s "
                f"({self.report_period_s})"
            )
        return self


class PageConfig(Section):
    """The live page, served at ``/memshare/``."""

    enabled: bool = True
    """Whether it is served, and its board started."""
    interval_s: float = Field(default=1.0, ge=0.2)
    """Seconds between two samples of a replica."""
    minutes: float = Field(default=10.0, ge=1.0, le=120.0)
    """Minutes that are remembered, and that a replica which is gone stays visible."""
    show_text: bool = False
    """Whether a request's trace shows its prompt and output. Whoever may see the page may read
    them then, for as long as a request runs and for the last few that have ended."""


class ClusterArgs(Section):
    """``args`` of the application in a Ray Serve config file."""

    model: str = Field(min_length=1)
    """``smollm2-135m`` (made locally, no download), a local folder, or a Hugging Face id."""
    served_model_name: str | None = Field(default=None, min_length=1)
    """Name of the model in the OpenAI API. None takes ``model``."""
    replicas: int = Field(default=1, ge=1)
    """Copies of the engine, each with all its workers. With ``scaling``, so many at first."""
    engine: EngineConfig = EngineConfig()
    """The vLLM engine."""
    replica: ReplicaConfig = ReplicaConfig()
    """Resources and supervision of a replica."""
    auth: AuthConfig = AuthConfig()
    """Keys and tenants."""
    routing: RoutingConfig = RoutingConfig()
    """Which replica a request goes to."""
    scaling: ScalingConfig | None = None
    """Replicas by KV pressure; None keeps their number at ``replicas``."""
    memshare: MemShareConfig = MemShareConfig()
    """What MemShare does; ``mode: off`` leaves a plain vLLM, without connector and worker class,
    unless ``agents`` share. Each of ``agents.adapters`` is a model of the API by its name; their
    folders are absolute, and exist wherever replicas run and where the application is built."""
    page: PageConfig = PageConfig()
    """The live page."""
    guard: GuardConfig | None = None
    """A guard on quality; None has none."""

    @model_validator(mode="after")
    def _starts_within_bounds(self) -> ClusterArgs:
        scaling = self.scaling
        if scaling and not scaling.min_replicas <= self.replicas <= scaling.max_replicas:
            raise ValueError(
                f"replicas ({self.replicas}) must lie within scaling.min_replicas "
                f"({scaling.min_replicas}) and scaling.max_replicas ({scaling.max_replicas})"
            )
        return self

    @property
    def most_replicas(self) -> int:
        """Replicas that there may be at one time, besides those of a rolling update."""
        return self.scaling.max_replicas if self.scaling else self.replicas

    @property
    def public_name(self) -> str:
        """Name of the model in the OpenAI API."""
        return self.served_model_name or self.model

    @property
    def uses_memshare(self) -> bool:
        """Whether engines run with MemShare's connector and worker class."""
        memshare = self.memshare
        return memshare.mode != "off" or memshare.agents.shares or memshare.experts.counts

    @property
    def uses_ledger(self) -> bool:
        """Whether replicas have to agree on what tenants use."""
        return self.auth.keys.exists and self.most_replicas > 1

    @property
    def uses_pool(self) -> bool:
        """Whether a pool of evaluator actors is needed."""
        return (
            self.memshare.mode != "off"
            and self.memshare.uses_stages
            and self.memshare.evaluator.source == "ray"
        )


def without_secrets(cluster: ClusterArgs) -> ClusterArgs:
    """The arguments as they may be shown: what may be a key or a token is ``***``."""
    env = dict.fromkeys(cluster.replica.env, "***")
    extra = {
        name: "***" if re.search("key|token|secret|password", name, re.IGNORECASE) else value
        for name, value in cluster.engine.extra.items()
    }
    return cluster.model_copy(
        update={
            "replica": cluster.replica.model_copy(update={"env": env}),
            "engine": cluster.engine.model_copy(update={"extra": extra}),
        }
    )


def parse_cluster_args(
    args: Mapping[str, object], environ: Mapping[str, str] | None = None
) -> ClusterArgs:
    """Validate the application's arguments.

    The section ``memshare`` follows the precedence of :mod:`memshare.config` and counts as its
    explicit options.

    Args:
        args: as in the config file.
        environ: the environment; ``os.environ`` if None.

    Raises:
        ConfigError: names each wrong field, its value and the fix.
    """
    section = args.get("memshare") or {}
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"memshare = {section!r} is a {type(section).__name__}\n"
            "    fix: write its fields below it, for example 'mode: observe'"
        )
    try:
        config = load_config(section, environ)
    except ConfigError as error:
        raise ConfigError(f"In the section 'memshare' of the application:\n{error}") from None
    try:
        cluster = ClusterArgs.model_validate({**args, "memshare": config})
    except ValidationError as error:
        raise ConfigError(explain(error, ClusterArgs, ["args of the application"])) from None
    refuse_contradictions(cluster)
    return cluster
