"""Everything that a user can set, as one typed model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from memshare.config import registry
from memshare.config.fields import Fraction, NonEmpty, PolicyParams, Real, Section, Whole
from memshare.config.selection import SelectionConfig
from memshare.config.setup import Setup


class TriggerConfig(Section):
    """When verified pairs are applied."""

    kind: Literal["pressure", "eager"] = "pressure"
    """``pressure``: only while free blocks are short. ``eager``: once verified (the paper)."""
    low_watermark: Fraction = 0.05
    """Fraction of all KV blocks. Reclaiming starts when fewer are free. ``pressure`` only."""
    high_watermark: Fraction = 0.10
    """Fraction of all KV blocks. Reclaiming stops when as many are free, in addition to those that
    running requests will need next. ``pressure`` only."""

    @model_validator(mode="after")
    def _ordered(self) -> TriggerConfig:
        if self.high_watermark < self.low_watermark:
            raise ValueError(
                f"high_watermark ({self.high_watermark}) must not be below "
                f"low_watermark ({self.low_watermark}); raise the one or lower the other"
            )
        return self


class AdmissionConfig(Section):
    """Holding waiting requests back. Mode ``share`` only."""

    lookahead_tokens: Annotated[Whole, Field(ge=0)] | None = None
    """Tokens. A waiting request is admitted only if enough blocks stay free for running requests to
    generate this many more tokens each, less what can be freed. 0 leaves admission to vLLM; null is
    96 for ``compaction``, 256 for other policies, a block's tokens where that is more."""
    hold_steps: Whole = Field(default=1024, ge=1)
    """Engine steps for which the rule above holds after a preemption. Before the first preemption,
    and after this many steps without one, vLLM admits as it always does. With ``compaction`` the
    rule always holds."""


class StepConfig(Section):
    """How output text is cut into reasoning steps, and which steps count as similar."""

    delimiters: tuple[NonEmpty, ...] = Field(default=("\n\n",), min_length=1)
    """Strings that end a step. Compiled against the tokenizer; one may span several tokens."""
    min_tokens: Whole = Field(default=8, ge=1)
    """Tokens. A delimiter closes a step only when the step is at least this long."""
    max_tokens: Whole = Field(default=256, ge=8)
    """Tokens. A step that reaches this length is closed without a delimiter."""
    similarity_threshold: Fraction = 0.9
    """Cosine of two steps' token bags, 0..1. Stage one proposes pairs at or above it."""
    max_matches: Whole = Field(default=2, ge=1, le=64)
    """Steps. At most this many earlier steps are proposed for a new step, best first."""
    max_history: Whole = Field(default=1024, ge=2)
    """Steps that stage one remembers of a request (or tenant); the oldest are dropped first."""

    @model_validator(mode="after")
    def _ordered(self) -> StepConfig:
        if self.max_tokens < self.min_tokens:
            raise ValueError(
                f"max_tokens ({self.max_tokens}) must not be below min_tokens "
                f"({self.min_tokens}); raise the one or lower the other"
            )
        return self


class DistanceConfig(Section):
    """Stage two: how the KV of a candidate pair is compared."""

    norm: Literal["paper", "relative"] = "relative"
    """``paper``: 1 - |A-B| / (|A|+|B|) on cached K and V. ``relative``: 1 - |A-B| / (RMS distance
    of random blocks of the same request) on V and position-corrected K; 0 is random."""
    tensors: Literal["kv", "k", "v"] = "kv"
    """Which tensors are compared. K falls back to V where its rotation cannot be undone."""
    layers: Literal["all"] | Annotated[Whole, Field(ge=1)] = 4
    """Layers, spread evenly over the model's depth; ``all`` compares every layer."""
    similarity_threshold: Fraction = 0.8
    """Similarity under the chosen norm, 0..1. A pair at or above it is verified."""
    max_jobs_per_step: Whole = Field(default=16, ge=1, le=4096)
    """Pairs of blocks that one engine step compares; the rest wait. ``twins`` compares pairs of
    tokens instead: as many as this number of blocks has slots."""
    max_waiting: Whole = Field(default=4096, ge=1)
    """Pairs of blocks that may wait for stage two (``twins``: pairs of tokens, as many as this
    number of blocks has slots). Further candidates are dropped and counted."""


class ProtectConfig(Section):
    """What is never a target."""

    prompt_tokens: Literal["all"] | Annotated[Whole, Field(ge=0)] = "all"
    """Tokens from the start of the prompt, or ``all`` of it."""
    recent_tokens: Annotated[Whole, Field(ge=0)] | None = None
    """The newest tokens of a request, which are never a target (kept exact). null: 32 with
    ``compaction``, which chooses tokens by what they are worth, else 128."""


class BudgetConfig(Section):
    """How much of one request may be approximated."""

    max_shared_fraction: Fraction = 0.25
    """Fraction of a request's blocks that may be re-pointed. After a preemption, admission counts
    on all of it, so a budget above what the policy finds leads to further preemptions."""
    max_dropped_fraction: Fraction = 0.4
    """``compaction``, instead of the above: fraction of a request's blocks that may be freed by
    dropping tokens. Compaction always finds all of it."""
    max_thinning: Fraction = 0.8
    """``compaction``, besides: fraction of the tokens behind the protected prompt and before the
    recent window that may be dropped. It keeps the beginning of an output from being emptied while
    the output is short."""
    max_kept_tokens: Annotated[Whole, Field(ge=1)] | None = None
    """``compaction``: KV tokens that a request keeps, whole blocks of them. It is compacted as it
    grows beyond, whether memory is short or not, and beyond the two fractions above if need be.
    What is protected stays, even if that alone is more. null: tokens go only when blocks are
    short."""


class EvaluatorConfig(Section):
    """Where stage one runs, and how much work may be pending."""

    source: Literal["in_process", "ray"] = "in_process"
    """``in_process``: the bridge thread of the engine. ``ray``: a pool of named Ray actors."""
    queue_size: Whole = Field(default=1024, ge=1)
    """Batches waiting for the bridge thread. When full, steps are dropped and counted."""
    max_requests: Whole = Field(default=2048, ge=1)
    """Requests (or tenants) whose steps an evaluator remembers; least recently used go first."""
    address: str | None = None
    """``ray`` only: ``host:port`` of the Ray cluster. None asks the environment
    (``RAY_ADDRESS``)."""
    namespace: NonEmpty = "memshare"
    """``ray`` only: namespace of the evaluator actors. Each application needs its own."""
    actors: Whole = Field(default=1, ge=1, le=1024)
    """``ray`` only: number of evaluator actors in the pool."""
    cpus_per_actor: Real = Field(default=0.25, ge=0.0)
    """``ray`` only: CPU share that Ray reserves for one actor, in cores."""
    max_pending_calls: Whole = Field(default=64, ge=1)
    """``ray`` only: calls waiting at one actor before it pushes back; then steps are dropped."""
    call_timeout_s: Real = Field(default=5.0, gt=0.0)
    """``ray`` only: seconds after which an unanswered call counts as failed."""
    retry_after_s: Real = Field(default=1.0, gt=0.0)
    """``ray`` only: seconds before a failed actor is looked up and called again."""

    @field_validator("address")
    @classmethod
    def _host_and_port(cls, address: str | None) -> str | None:
        if address is not None and not re.fullmatch(r"[^\s/]+:\d+", address):
            raise ValueError("is not host:port, such as 10.0.0.1:6379")
        return address


class IntegrityConfig(Section):
    """Checks of MemShare's bookkeeping against vLLM's. See ``check_integrity()``."""

    check_every: Whole = Field(default=0, ge=0)
    """Engine steps between two full checks; 0 checks only on demand, 1 at every step (tests)."""
    on_failure: Literal["stop_sharing", "raise"] = "stop_sharing"
    """``stop_sharing``: log, count, and continue to serve without further remaps. ``raise``: stop
    the engine (tests)."""


class ReportConfig(Section):
    """What the engine reports about its blocks and requests, for metrics and the live page."""

    every_s: Real = Field(default=1.0, ge=0.0)
    """Least number of seconds between two examinations of all blocks. They become less frequent if
    one takes long, so that they cost at most a thousandth of the engine's time. 0: never."""
    requests: Whole = Field(default=32, ge=0, le=1024)
    """Requests reported with each examination: those with most blocks."""


class ExpertsConfig(Section):
    """Experts of a mixture of experts: which ones a step's tokens chose. Independent of ``mode``
    and ``policy``; changes nothing of what is computed."""

    count_every: Whole = Field(default=0, ge=0)
    """Engine steps from one of which the experts are counted to the next; 0: never. Dense models
    are refused."""

    @property
    def counts(self) -> bool:
        """Whether experts are counted at all."""
        return self.count_every > 0


class LogConfig(Section):
    """MemShare's own log lines, on standard error."""

    format: Literal["text", "json"] = "text"
    """``json`` writes one object per line, with fields such as ``request`` and ``blocks``. In the
    cluster vLLM's lines are then JSON too; plain vLLM has ``--logging-config.formatter json``."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Lines below it are not written."""
    explain_every_s: Real = Field(default=10.0, ge=0.0)
    """Least number of seconds between two lines that explain reclaims, and between two that explain
    preemptions: which requests, why, how many blocks. A line covers the time since the previous
    one. 0 writes none."""


class AgentsConfig(Section):
    """LoRA adapters of one base model, and what they share of the KV cache. Not together with
    reclaiming, whatever the policy, nor with fp8: set ``mode: off`` with any scheme but
    ``nonshared``."""

    scheme: Literal["nonshared", "base_lr_shared", "stacked", "full_shared"] = "nonshared"
    """``nonshared``: each adapter has a cache of its own, as in vLLM. ``base_lr_shared``: adapters
    with the same A matrices on ``v_proj`` read each other's blocks. ``stacked``: adapters with any
    A matrices do. ``full_shared``: they take each other's values as their own, which is wrong; a
    baseline for measurements."""
    adapters: dict[NonEmpty, Path] = Field(default_factory=dict)
    """Folder of each adapter, as peft writes it, by the name that requests ask for. With a scheme
    that shares, these are the adapters that are served, and all of them are one family."""
    max_rank: Whole = Field(default=64, ge=1, le=64)
    """Adapters of a higher rank are refused. A token's cache has a column for each rank, in every
    layer and KV head."""

    @property
    def shares(self) -> bool:
        """Whether adapters read each other's blocks."""
        return self.scheme != "nonshared"

    @property
    def widens_values(self) -> bool:
        """Whether cached values get columns for the low-rank part."""
        return self.scheme in ("base_lr_shared", "stacked")

    def takes_cache_type(self, name: str) -> bool:
        """Whether the adapters work with this ``kv_cache_dtype`` of vLLM."""
        return not self.shares or name in ("auto", "float16", "bfloat16")


class MemShareConfig(Section):
    """Everything a user can set."""

    mode: Literal["off", "observe", "share"] = "share"
    """``off``: nothing is reclaimed or observed. ``observe``: everything except remaps. ``share``:
    all. ``agents`` and ``experts`` have switches of their own, ``agents.scheme`` and
    ``experts.count_every``; ``selection`` works in both of the others."""
    policy: Annotated[SerializeAsAny[PolicyParams], BeforeValidator(registry.read_policy)] = Field(
        default_factory=registry.default_policy
    )
    """The policy and its parameters: ``auto``, ``paper``, ``twins``, ``compaction``, ``oldest`` or
    ``random``."""
    trigger: TriggerConfig = TriggerConfig()
    """When pairs are applied."""
    admission: AdmissionConfig = AdmissionConfig()
    """When waiting requests are held back."""
    steps: StepConfig = StepConfig()
    """Stage one."""
    distance: DistanceConfig = DistanceConfig()
    """Stage two."""
    protect: ProtectConfig = ProtectConfig()
    """What is never a target."""
    budget: BudgetConfig = BudgetConfig()
    """How much of one request may be approximated."""
    scope: Literal["request", "tenant"] = "request"
    """``request``: both blocks of a pair belong to one request. ``tenant``: to requests with the
    same ``cache_salt`` and LoRA adapter."""
    selection: SelectionConfig = SelectionConfig()
    """Pages that attention reads."""
    agents: AgentsConfig = AgentsConfig()
    """LoRA adapters that share one KV cache."""
    experts: ExpertsConfig = ExpertsConfig()
    """Counting the experts of a mixture of experts."""
    evaluator: EvaluatorConfig = EvaluatorConfig()
    """Where stage one runs."""
    integrity: IntegrityConfig = IntegrityConfig()
    """Self-checks."""
    report: ReportConfig = ReportConfig()
    """What the engine reports about its blocks and requests."""
    logs: LogConfig = LogConfig()
    """MemShare's own log lines."""
    event_log: Path | None = None
    """File to which every transition is written as a JSON line; None writes none."""

    @field_validator("mode", mode="before")
    @classmethod
    def _yaml_off(cls, value: object) -> object:
        # YAML 1.1 reads a bare `off` as false; `mode: off` must mean what it says.
        return "off" if value is False else value

    @property
    def uses_stages(self) -> bool:
        """Whether the policy needs stage one and stage two, or may turn out to."""
        return any(mechanism.searches for mechanism in registry.candidates(self.policy))

    @property
    def drops_tokens(self) -> bool:
        """Whether the policy drops tokens instead of re-pointing blocks."""
        return all(mechanism.drops_tokens for mechanism in registry.candidates(self.policy))

    @property
    def max_given_up(self) -> float:
        """The most that a request may lose, as a fraction of its full blocks."""
        budget = self.budget
        return budget.max_dropped_fraction if self.drops_tokens else budget.max_shared_fraction

    @property
    def recent_tokens(self) -> int:
        """How many of a request's newest tokens are never a target."""
        asked = self.protect.recent_tokens
        return asked if asked is not None else 32 if self.drops_tokens else 128

    @property
    def max_thinning(self) -> float:
        """The most that it may lose of what may go."""
        return self.budget.max_thinning if self.drops_tokens else 1.0

    @model_validator(mode="after")
    def _suits_its_agents(self) -> MemShareConfig:
        agents = self.agents
        if agents.shares and not agents.adapters:
            raise ValueError(
                f"agents.scheme = {agents.scheme!r}: agents.adapters is empty\n"
                "    fix: name the adapters that share, or set agents.scheme to 'nonshared'"
            )
        if agents.shares and self.mode != "off":
            default = "" if "mode" in self.model_fields_set else " (the default)"
            raise ValueError(
                f"mode = {self.mode!r}{default}: with agents.scheme {agents.scheme!r} nothing can "
                f"be reclaimed. What one role writes is what the next one reads, and policy "
                f"{self.policy.name!r} would hand none of it on: a request that has given up KV "
                "publishes no more blocks\n"
                "    fix: set mode to 'off', or agents.scheme to 'nonshared'"
            )
        return self

    @model_validator(mode="after")
    def _suits_its_selection(self) -> MemShareConfig:
        if self.selection.on and self.mode == "off":
            raise ValueError(
                "mode = 'off': selection needs the parts of MemShare that run beside the engine\n"
                "    fix: set mode to 'observe', which reclaims nothing, or leave selection.budget "
                "and selection.pages out"
            )
        return self

    @model_validator(mode="after")
    def _keeps_what_it_protects(self) -> MemShareConfig:
        most, recent = self.budget.max_kept_tokens, self.recent_tokens
        if most is not None and not self.drops_tokens:
            raise ValueError(
                f"budget.max_kept_tokens = {most}: policy.name {self.policy.name!r} drops no "
                "tokens\n    fix: set policy.name to 'compaction', or leave "
                "budget.max_kept_tokens out"
            )
        if most is not None and most <= recent:
            raise ValueError(
                f"budget.max_kept_tokens = {most}: protect.recent_tokens ({recent}) alone keeps as "
                "many\n    fix: raise the one, or lower the other"
            )
        return self

    @model_validator(mode="after")
    def _suits_its_policy(self) -> MemShareConfig:
        for refusal in registry.candidates(self.policy)[-1].refusals(Setup(self)):
            raise ValueError(refusal)
        return self
