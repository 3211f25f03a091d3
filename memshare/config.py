"""The configuration: one typed model, one precedence, one kind of error.

Values come from four places. A later one wins, field by field:

1. the defaults below,
2. the YAML file named by ``MEMSHARE_CONFIG`` (or by ``config`` among the explicit options),
3. environment variables ``MEMSHARE_*``; ``__`` steps into a section, the value is read as YAML
   (``MEMSHARE_MODE=observe``, ``MEMSHARE_TRIGGER__LOW_WATERMARK=0.1``),
4. explicit options: ``kv_connector_extra_config`` of vLLM, or the ``memshare`` argument of the
   Ray Serve application.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

ENV_PREFIX = "MEMSHARE_"
ENV_FILE = "MEMSHARE_CONFIG"
ENV_KEY = "MEMSHARE_KEY"
"""A client's key, which is none of the fields: a shell may hold both."""


def _no_switch(value: object) -> object:
    # pydantic would take true for 1, and YAML 1.1 reads a bare `yes` as true.
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not true or false (in YAML also yes, no, on, off)")
    return value


Whole = Annotated[int, BeforeValidator(_no_switch)]
Real = Annotated[float, BeforeValidator(_no_switch)]
Fraction = Annotated[Real, Field(ge=0.0, le=1.0)]
NonEmpty = Annotated[str, Field(min_length=1)]


class ConfigError(ValueError):
    """A configuration that cannot be used. The text names each field, its value and the fix."""


class Section(BaseModel):
    """Base of every section: unknown fields are refused, values are frozen."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class TriggerConfig(Section):
    """When verified pairs are applied."""

    kind: Literal["pressure", "eager"] = "pressure"
    """``pressure``: only while free blocks are short. ``eager``: once verified (the paper)."""
    low_watermark: Fraction = 0.05
    """Fraction of all KV blocks. Reclaiming starts when fewer are free. ``pressure`` only."""
    high_watermark: Fraction = 0.10
    """Fraction of all KV blocks. Reclaiming stops when as many are free beside those that running
    requests will need next. ``pressure`` only."""

    @model_validator(mode="after")
    def _ordered(self) -> TriggerConfig:
        if self.high_watermark < self.low_watermark:
            raise ValueError(
                f"high_watermark ({self.high_watermark}) must not be below "
                f"low_watermark ({self.low_watermark}); raise the one or lower the other"
            )
        return self


class AdmissionConfig(Section):
    """Holding waiting requests back after a preemption. Mode ``share`` only."""

    lookahead_tokens: Whole = Field(default=256, ge=0)
    """Tokens. A waiting request is admitted only if the blocks that running requests will need for
    so many more tokens each, less what sharing can free, stay available. 0 leaves admission to
    vLLM."""
    hold_steps: Whole = Field(default=1024, ge=1)
    """Engine steps. For so long after a preemption the rule above holds; before the first one, and
    again after so many steps without one, vLLM admits as it always does."""


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
    """Steps. At most so many earlier steps are proposed for one new step, best first."""
    max_history: Whole = Field(default=1024, ge=2)
    """Steps. Stage one remembers so many steps of a request (or tenant); the oldest go first."""

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
    """Pairs of blocks. So many are compared in one engine step; the rest wait. ``twins`` compares
    tokens: as many pairs of them as so many blocks have slots."""
    max_waiting: Whole = Field(default=4096, ge=1)
    """Pairs of blocks (``twins``: slots of so many blocks). So many may wait for stage two; further
    candidates are dropped and counted."""


class ProtectConfig(Section):
    """What is never a target."""

    prompt_tokens: Literal["all"] | Annotated[Whole, Field(ge=0)] = "all"
    """Tokens from the start of the prompt, or ``all`` of it."""
    recent_tokens: Whole = Field(default=128, ge=0)
    """Tokens. The newest so many of a request are never a target (kept exact)."""


class BudgetConfig(Section):
    """How much of one request may be approximated."""

    max_shared_fraction: Fraction = 0.25
    """Fraction of a request's blocks that may be re-pointed. After a preemption, admission counts
    on all of it, so that more than the policy really finds leads to further preemptions."""


class PaperParams(Section):
    """Aligned blocks of similar steps, as MemShare describes them (arXiv 2507.21433)."""

    name: Literal["paper"]
    survivor: Literal["oldest", "newest"] = "oldest"
    """Which copy of a pair stays. The paper keeps the ``oldest``."""


class OldestParams(Section):
    """Baseline: the oldest unprotected blocks first, whatever they hold."""

    name: Literal["oldest"]


class RandomParams(Section):
    """Baseline: unprotected blocks in random order."""

    name: Literal["random"]
    seed: Whole = Field(default=0, ge=0)
    """Seed of the generator that draws victims and donors."""


class TwinsParams(Section):
    """Blocks first whose tokens stand elsewhere in the request too, at whatever offset."""

    name: Literal["twins"]
    shortest_run: Whole = Field(default=4, ge=1, le=8)
    """Tokens, rounded up to 1, 2, 4 or 8. Two tokens are twins only if they stand in equal runs of
    so many. Short runs are chance: they find more twins, and take the number in one sum for that
    in another."""
    age_weight: Real = Field(default=1.0, ge=0.0, le=8.0)
    """Exponent of a block's place in its request, 0..1, in what losing it is expected to cost: what
    has no twin, times place to this power. 0 looks at coverage alone."""
    min_coverage: Fraction = 0.05
    """Coverage, 0..1. Blocks below it are never targets, and vLLM preempts if memory is short all
    the same; with 0, memory comes before exactness."""
    order: Literal["most_covered", "least_covered"] = "most_covered"
    """Which blocks go first. ``least_covered`` is the negative control of measurements. It does not
    look at age; what it costs more than ``most_covered`` is what the order is worth."""


PolicyParams = Annotated[
    PaperParams | OldestParams | RandomParams | TwinsParams, Field(discriminator="name")
]


class EvaluatorConfig(Section):
    """Who runs stage one, and how much may be under way."""

    source: Literal["in_process", "ray"] = "in_process"
    """``in_process``: the bridge thread of the engine. ``ray``: a pool of named Ray actors."""
    queue_size: Whole = Field(default=1024, ge=1)
    """Batches waiting for the bridge thread. When full, steps are dropped and counted."""
    max_requests: Whole = Field(default=2048, ge=1)
    """Requests (or tenants) whose steps one evaluator remembers; least recently used go first."""
    address: str | None = None
    """``ray`` only: ``host:port`` of the Ray cluster. None asks the environment
    (``RAY_ADDRESS``)."""
    namespace: NonEmpty = "memshare"
    """``ray`` only: namespace of the evaluator actors. Two applications must not have the same."""
    actors: Whole = Field(default=1, ge=1, le=1024)
    """``ray`` only: number of evaluator actors in the pool."""
    cpus_per_actor: Real = Field(default=0.25, ge=0.0)
    """``ray`` only: CPU share that Ray reserves for one actor, in cores."""
    max_pending_calls: Whole = Field(default=64, ge=1)
    """``ray`` only: calls waiting at one actor before it pushes back; then steps are dropped."""
    call_timeout_s: Real = Field(default=5.0, gt=0.0)
    """``ray`` only: seconds after which an unanswered call counts as failed."""
    retry_after_s: Real = Field(default=1.0, gt=0.0)
    """``ray`` only: seconds to leave a failed actor alone before it is looked up again."""

    @field_validator("address")
    @classmethod
    def _host_and_port(cls, address: str | None) -> str | None:
        if address is not None and not re.fullmatch(r"[^\s/]+:\d+", address):
            raise ValueError("is not host:port, such as 10.0.0.1:6379")
        return address


class IntegrityConfig(Section):
    """Checks of our own bookkeeping against vLLM's. See ``check_integrity()``."""

    check_every: Whole = Field(default=0, ge=0)
    """Engine steps between two full checks; 0 checks only on demand, 1 at every step (tests)."""
    on_failure: Literal["stop_sharing", "raise"] = "stop_sharing"
    """``stop_sharing``: log, count, and serve on without further remaps. ``raise``: stop the
    engine (tests)."""


class ReportConfig(Section):
    """What the engine tells of its blocks and requests, for metrics and the live page."""

    every_s: Real = Field(default=1.0, ge=0.0)
    """Seconds, at least, between two looks at which block is what. Looks are rarer where one takes
    long: they cost at most a thousandth of the engine's time. 0 never looks."""
    requests: Whole = Field(default=32, ge=0, le=1024)
    """Requests that are reported with each look: those with most blocks."""


class LogConfig(Section):
    """MemShare's own log lines, on standard error."""

    format: Literal["text", "json"] = "text"
    """``json`` writes one object a line, with fields such as ``request`` and ``blocks``. In the
    cluster vLLM's lines follow suit; plain vLLM has ``--logging-config.formatter json``."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Lines below it are not written."""
    explain_every_s: Real = Field(default=10.0, ge=0.0)
    """Seconds, at least, between two lines that explain reclaims, and between two that explain
    preemptions: who, why, how many blocks. What happens in between is summed up. 0 writes none."""


class MemShareConfig(Section):
    """Everything a user can set."""

    mode: Literal["off", "observe", "share"] = "share"
    """``off``: nothing of MemShare runs. ``observe``: everything but remaps. ``share``: all."""
    policy: PolicyParams = TwinsParams(name="twins")
    """What picks pairs, with its parameters: ``paper``, ``twins``, ``oldest`` or ``random``."""
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
    evaluator: EvaluatorConfig = EvaluatorConfig()
    """Who runs stage one."""
    integrity: IntegrityConfig = IntegrityConfig()
    """Self-checks."""
    report: ReportConfig = ReportConfig()
    """What the engine tells of its blocks and requests."""
    logs: LogConfig = LogConfig()
    """MemShare's own log lines."""
    event_log: Path | None = None
    """File that receives every transition as a JSON line; None writes none."""

    @field_validator("mode", mode="before")
    @classmethod
    def _yaml_off(cls, value: object) -> object:
        # YAML 1.1 reads a bare `off` as false; `mode: off` must mean what it says.
        return "off" if value is False else value

    @property
    def uses_stages(self) -> bool:
        """Whether the policy needs stage one and stage two."""
        return isinstance(self.policy, PaperParams | TwinsParams)

    @model_validator(mode="after")
    def _twins_are_of_one_request(self) -> MemShareConfig:
        if isinstance(self.policy, TwinsParams):
            if self.scope != "request":
                raise ValueError(
                    f"scope = {self.scope!r}: policy.name 'twins' works within one request\n"
                    "    fix: set scope to 'request', or policy.name to 'paper'"
                )
            if self.distance.norm != "relative":
                raise ValueError(
                    f"distance.norm = {self.distance.norm!r}: policy.name 'twins' compares tokens "
                    "by the norm 'relative'\n"
                    "    fix: set distance.norm to 'relative', or policy.name to 'paper'"
                )
        return self


def load_config(
    explicit: Mapping[str, object] | None = None, environ: Mapping[str, str] | None = None
) -> MemShareConfig:
    """Merge all sources (module docstring) and validate the result.

    Args:
        explicit: nested options that win over everything else; may hold ``config``, a YAML path.
        environ: the environment; ``os.environ`` if None.

    Raises:
        ConfigError: a file cannot be read, or a field is unknown or wrong.
    """
    environ = os.environ if environ is None else environ
    explicit = dict(explicit or {})
    path = explicit.pop("config", None) or environ.get(ENV_FILE)
    layers: list[tuple[str, dict[str, Any]]] = []
    if path:
        layers.append((str(path), _read_yaml(str(path))))
    layers.append((f"{ENV_PREFIX}* variables", _from_environ(environ)))
    layers.append(("explicit options", explicit))
    merged: dict[str, Any] = {}
    for _, values in layers:
        merged = merge(merged, values)
    try:
        return MemShareConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(explain(error, MemShareConfig, [n for n, v in layers if v])) from None


def explain(error: ValidationError, model: type[BaseModel], sources: list[str]) -> str:
    """Turn a pydantic error into lines of field, value and fix."""
    lines = [f"MemShare configuration is not valid ({', '.join(sources) or 'defaults'}):"]
    for item in error.errors():
        path, owner, field = _locate(model, item["loc"])
        value = item["input"]
        if item["type"].startswith("union_tag_"):  # the field that tells the variants apart
            path.append("name")
            value = value.get("name")
        name = ".".join(path)
        if item["type"] == "extra_forbidden":
            known = list(owner.model_fields)
            close = difflib.get_close_matches(path[-1], known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known fields: {', '.join(known)}"
            # Not its value: what is no field may be a secret.
            lines.append(f"  {name}: there is no such field\n    fix: {hint}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            if not path:  # a rule about several fields, which names them
                lines.append(f"  {message}")
                continue
            lines.append(f"  {name} = {value!r}: {message}\n    fix: {_fix(field)}")
    return "\n".join(lines)


def _fix(field: FieldInfo | None) -> str:
    if field is None:
        return "give the values that the message asks for"
    text = " ".join((field.description or "").split())
    if field.is_required():
        return f"set it; {text}" if text else f"set it to {get_args(field.annotation)}"
    default = field.get_default(call_default_factory=True)
    shown = "" if isinstance(default, BaseModel) else f" (default: {default!r})"
    return f"{text}{shown}"


def _locate(
    model: type[BaseModel], loc: tuple[int | str, ...]
) -> tuple[list[str], type[BaseModel], FieldInfo | None]:
    """Follow an error's location; returns (field names, model that owns the last, its field).

    pydantic puts the tag of a discriminated union and the name of a union member among the
    location; a user never wrote those, so they are left out.
    """
    path: list[str] = []
    owner, field = model, None
    for part in loc:
        if field is not None:
            members = _models_of(field)
            tagged = [m for m in members if _tag(m) == part]
            if tagged:
                owner, field = tagged[0], None
                continue
            if not members:
                if isinstance(part, int):
                    path[-1] += f"[{part}]"
                elif get_origin(field.annotation) is dict and part != "[key]":
                    path.append(part)
                continue
            owner = members[0]
        path.append(str(part))
        field = owner.model_fields.get(str(part))
    return path, owner, field


def _models_of(field: FieldInfo) -> list[type[BaseModel]]:
    options = get_args(field.annotation) or (field.annotation,)
    return [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]


def _tag(model: type[BaseModel]) -> str | None:
    name = model.model_fields.get("name")
    return get_args(name.annotation)[0] if name is not None else None


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"MemShare configuration file {path!r} cannot be read: {error.strerror}\n"
            f"    fix: correct the path in {ENV_FILE} or in the option 'config'"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"MemShare configuration file {path!r} is not YAML: {error}\n"
            "    fix: correct the line that the message names"
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"MemShare configuration file {path!r} holds a {type(values).__name__}\n"
            "    fix: write fields at its top level, for example 'mode: observe'"
        )
    return values


def without_fields(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what would configure MemShare: for comparisons, which say themselves
    how each side is configured."""
    return {key: value for key, value in environ.items() if not key.startswith(ENV_PREFIX)}


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    # A section's name first: merged later, it would replace what came before it.
    for key in sorted(environ, key=lambda key: (not key.endswith("__NAME"), key)):
        if not key.startswith(ENV_PREFIX) or key in (ENV_FILE, ENV_KEY):
            continue
        *sections, name = key.removeprefix(ENV_PREFIX).lower().split("__")
        try:
            value = yaml.safe_load(environ[key])
        except yaml.YAMLError:
            value = environ[key]
        nested: dict[str, Any] = {name: value}
        for section in reversed(sections):
            nested = {section: nested}
        values = merge(values, nested)
    return values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge; a section that names another policy replaces the whole policy section."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        replaces = (
            isinstance(value, Mapping)
            and isinstance(old, Mapping)
            and "name" in value
            and value["name"] != old.get("name")
        )
        if isinstance(value, Mapping) and key in base and not isinstance(old, Mapping):
            continue  # a section was given as something else: keep that, so that it is refused
        if isinstance(value, Mapping) and isinstance(old, Mapping) and not replaces:
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged
