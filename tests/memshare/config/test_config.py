"""The configuration: every field refuses what is wrong, from every place that it can come from."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from memshare.config import (
    ConfigError,
    MemShareConfig,
    PolicyParams,
    load_config,
    registry,
    without_fields,
)

NAN, INF = float("nan"), float("inf")
NO_NUMBERS = ["x", [], {}, None, True, NAN]
NO_FRACTIONS = [-0.01, 1.01, *NO_NUMBERS]
NO_COUNTS = [0, -1, 1.5, INF, *NO_NUMBERS]  # counts that begin at 1
NO_WORDS = ["x", "", 1, [], None, True]

# Per field, values that it must refuse. A field added later fails a test until it is added here.
BAD: dict[str, list[object]] = {
    "mode": [*NO_WORDS, "ON"],
    "policy": ["paper", 1, [], None, True],
    "policy.name": ["x", "", 1, ["paper"], None],
    "policy[paper].survivor": NO_WORDS,
    "policy[random].seed": [-1, 0.5, *NO_NUMBERS],
    "policy[compaction].scorer": NO_WORDS,
    "policy[compaction].probe": ["", 3],
    "policy[compaction].position_weight": NO_FRACTIONS,
    "policy[compaction].seed": [-1, 0.5, *NO_NUMBERS],
    "policy[compaction].round_fraction": [0, *NO_FRACTIONS],
    "policy[compaction].min_round": NO_COUNTS,
    "policy[twins].age_weight": [-0.01, 8.01, *NO_NUMBERS],
    "policy[twins].shortest_run": [0, 9, 1.5, *NO_NUMBERS],
    "policy[twins].min_coverage": NO_FRACTIONS,
    "policy[twins].order": ["best", "", 1, None],
    "trigger": ["eager", 1, [], None, True],
    "trigger.kind": NO_WORDS,
    "trigger.low_watermark": NO_FRACTIONS,
    "trigger.high_watermark": NO_FRACTIONS,
    "admission": ["x", 1, [], None, True],
    "admission.lookahead_tokens": [-1, 1.5, *(value for value in NO_NUMBERS if value is not None)],
    "admission.hold_steps": NO_COUNTS,
    "steps": ["x", 1, [], None, True],
    "steps.delimiters": ["\n\n", 5, [], [""], ["\n", 5], None, {}],
    "steps.min_tokens": NO_COUNTS,
    "steps.max_tokens": [7, *NO_COUNTS],
    "steps.similarity_threshold": NO_FRACTIONS,
    "steps.max_matches": [65, *NO_COUNTS],
    "steps.max_history": [1, *NO_COUNTS],
    "distance": ["x", 1, [], None, True],
    "distance.norm": NO_WORDS,
    "distance.tensors": NO_WORDS,
    "distance.layers": NO_COUNTS,
    "distance.similarity_threshold": NO_FRACTIONS,
    "distance.max_jobs_per_step": [4097, *NO_COUNTS],
    "distance.max_waiting": NO_COUNTS,
    "protect": ["all", 1, [], None, True],
    "protect.prompt_tokens": [-1, 1.5, *NO_NUMBERS],
    "protect.recent_tokens": [-1, 1.5, *(value for value in NO_NUMBERS if value is not None)],
    "budget": ["x", 1, [], None, True],
    "budget.max_shared_fraction": NO_FRACTIONS,
    "budget.max_dropped_fraction": NO_FRACTIONS,
    "budget.max_thinning": NO_FRACTIONS,
    "budget.max_kept_tokens": [0, 1.5, *(value for value in NO_NUMBERS if value is not None)],
    "scope": NO_WORDS,
    "selection": ["x", 1, [], None, True, {"budget": 0.5, "pages": 8}, {"pages": 2}],
    "selection.budget": [0, -0.1, 1.1, INF, *(value for value in NO_NUMBERS if value is not None)],
    "selection.pages": [0, 1.5, *(value for value in NO_NUMBERS if value is not None)],
    "selection.first_pages": [-1, 1.5, *NO_NUMBERS],
    "selection.recent_pages": [0, 1.5, *NO_NUMBERS],
    "selection.exempt_layers": [-1, 1.5, *NO_NUMBERS],
    "agents": ["stacked", 1, [], None, True],
    "agents.scheme": NO_WORDS,
    "agents.adapters": ["plan", 1, [], None, True],
    "agents.max_rank": [65, *NO_COUNTS],
    "evaluator": ["ray", 1, [], None, True],
    "evaluator.source": NO_WORDS,
    "evaluator.queue_size": NO_COUNTS,
    "evaluator.max_requests": NO_COUNTS,
    "evaluator.address": [5, [], {}, True, "auto", "ray://head:10001", "head"],
    "evaluator.namespace": ["", 5, [], None, True],
    "evaluator.actors": [1025, *NO_COUNTS],
    "evaluator.cpus_per_actor": [-0.1, INF, *NO_NUMBERS],
    "evaluator.max_pending_calls": NO_COUNTS,
    "evaluator.call_timeout_s": [0, -1.0, INF, *NO_NUMBERS],
    "evaluator.retry_after_s": [0, -1.0, INF, *NO_NUMBERS],
    "integrity": ["x", 1, [], None, True],
    "integrity.check_every": [-1, 1.5, *NO_NUMBERS],
    "integrity.on_failure": NO_WORDS,
    "experts": ["x", 1, [], None, True],
    "experts.count_every": [-1, 1.5, *NO_NUMBERS],
    "report": ["x", 1, [], None, True],
    "report.every_s": [-0.1, INF, *NO_NUMBERS],
    "report.requests": [-1, 1025, 1.5, *NO_NUMBERS],
    "logs": ["json", 1, [], None, True],
    "logs.format": NO_WORDS,
    "logs.level": NO_WORDS,
    "logs.explain_every_s": [-0.1, INF, *NO_NUMBERS],
    "event_log": [5, [], {}, True],
}


def models_in(field: FieldInfo) -> list[type[BaseModel]]:
    if field.annotation is PolicyParams:
        return list(registry.built_in_params())
    options = get_args(field.annotation) or (field.annotation,)
    return [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]


def tag_of(variant: type[BaseModel]) -> str:
    """The name by which a user chooses this variant."""
    (name,) = get_args(variant.model_fields["name"].annotation)
    return name


def sections(
    model: type[BaseModel] = MemShareConfig, path: str = ""
) -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section, by the path of its fields: ``""``, ``trigger.``, ``policy[paper].``."""
    yield path, model
    for name, field in model.model_fields.items():
        variants = models_in(field)
        for variant in variants:
            tag = f"[{tag_of(variant)}]" if len(variants) > 1 else ""
            yield from sections(variant, f"{path}{name}{tag}.")


SECTIONS = dict(sections())


def plain(path: str) -> str:
    """A field's path as a user writes it."""
    return re.sub(r"\[\w+\]", "", path)


def nested(path: str, value: object) -> dict[str, Any]:
    """``policy[random].seed`` -> ``{"policy": {"name": "random", "seed": value}}``."""
    *outer, name = path.split(".")
    result: dict[str, Any] = {name: value}
    for section in reversed(outer):
        key, _, variant = section.rstrip("]").partition("[")
        result = {key: ({"name": variant} if variant else {}) | result}
    return result


Source = Callable[[Path, str, object], MemShareConfig]


def from_options(_: Path, path: str, value: object) -> MemShareConfig:
    return load_config(nested(path, value), {})


def from_yaml(folder: Path, path: str, value: object) -> MemShareConfig:
    file = folder / "memshare.yaml"
    file.write_text(yaml.safe_dump(nested(path, value)))
    return load_config(None, {"MEMSHARE_CONFIG": str(file)})


def from_environment(_: Path, path: str, value: object) -> MemShareConfig:
    variables: dict[str, str] = {}

    def spell(prefix: str, fields: dict[str, Any]) -> None:
        for name, inner in fields.items():
            key = f"{prefix}{name.upper()}"
            if isinstance(inner, dict) and inner:
                spell(f"{key}__", inner)
            else:
                variables[key] = yaml.safe_dump(inner).removesuffix("...\n")

    spell("MEMSHARE_", nested(path, value))
    return load_config({}, variables)


SOURCES: dict[str, Source] = {
    "options": from_options,
    "yaml": from_yaml,
    "environment": from_environment,
}
sources = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)


def assert_refused(
    source: Source, folder: Path, path: str, value: object, unknown: bool = False
) -> None:
    """The error names the dotted field, the value, and what to do."""
    with pytest.raises(ConfigError) as caught:
        source(folder, path, value)
    head, *rest = str(caught.value).splitlines()
    assert head.startswith("MemShare configuration is not valid (")
    lines = list(zip(rest[::2], rest[1::2], strict=True))
    assert lines
    expected = [f"  {plain(path)}" + (": " if unknown else f" = {value!r}: ")]
    if isinstance(value, list):  # the error may be one element's
        expected += [f"  {plain(path)}[{i}] = {item!r}: " for i, item in enumerate(value)]
    for line, fix in lines:
        (start,) = (text for text in expected if line.startswith(text))
        assert len(line) > len(start)
        assert fix.startswith("    fix: ")
        assert len(fix) > len("    fix: give it")
        assert unknown == ("there is no such field" in line)


# ---- every field ----


def test_every_field_has_bad_values() -> None:
    fields = {path + name for path, model in SECTIONS.items() for name in model.model_fields}
    # The name of a variant is the same field in all of them.
    fields = {
        "policy.name" if f.startswith("policy[") and f.endswith("].name") else f for f in fields
    }
    assert fields == BAD.keys()
    assert all(BAD.values())


@sources
@pytest.mark.parametrize("path", BAD)
def test_a_wrong_value_is_refused(source: Source, path: str, tmp_path: Path) -> None:
    for value in BAD[path]:
        assert_refused(source, tmp_path, path, value)


@sources
@pytest.mark.parametrize("section", SECTIONS)
def test_an_unknown_name_is_refused(source: Source, section: str, tmp_path: Path) -> None:
    assert_refused(source, tmp_path, f"{section}no_such_thing", 1, unknown=True)
    assert_refused(source, tmp_path, f"{section}zz", {"a": 1}, unknown=True)


def test_what_is_no_field_may_be_a_secret() -> None:
    """A client's key beside a server's configuration is none; of other names no value is shown."""
    assert load_config({}, {"MEMSHARE_KEY": "sk-1234"}) == load_config({}, {})
    with pytest.raises(ConfigError, match="keys: there is no such field") as caught:
        load_config({}, {"MEMSHARE_KEYS": "sk-1234"})
    assert "sk-1234" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"scope": "tenant"}, "  scope = 'tenant': policy.name 'twins' works within one request"),
        ({"distance": {"norm": "paper"}}, "  distance.norm = 'paper': policy.name 'twins'"),
    ],
)
def test_a_rule_about_several_fields_names_them(values: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(values, {})
    _, line, fix = str(caught.value).splitlines()
    assert line.startswith(named)
    assert fix.startswith("    fix: set ")
    assert load_config(values | {"policy": {"name": "paper"}}, {})


@pytest.mark.parametrize(
    ("values", "named", "fix"),
    [
        (
            {"policy": {"name": "oldest"}, "budget": {"max_kept_tokens": 640}},
            "  budget.max_kept_tokens = 640: policy.name 'oldest' drops no tokens",
            "set policy.name to 'compaction'",
        ),
        (
            {
                "policy": {"name": "compaction"}, "budget": {"max_kept_tokens": 64},
                "protect": {"recent_tokens": 64},
            },
            "  budget.max_kept_tokens = 64: protect.recent_tokens (64) alone keeps as many",
            "raise the one, or lower the other",
        ),
    ],
)  # fmt: skip
def test_a_budget_of_tokens_that_cannot_be_kept_is_refused(
    values: dict[str, object], named: str, fix: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(values, {})
    _, line, way_out = str(caught.value).splitlines()
    assert line == named
    assert way_out.startswith(f"    fix: {fix}")


@pytest.mark.parametrize("scheme", ["base_lr_shared", "stacked", "full_shared"])
def test_agents_share_only_where_nothing_is_reclaimed(scheme: str) -> None:
    agents: dict[str, object] = {"scheme": scheme, "adapters": {"plan": "/adapters/plan"}}
    config = load_config({"mode": "off", "agents": agents}, {})
    assert config.agents.shares
    assert config.agents.widens_values == (scheme != "full_shared")
    for mode, policy in itertools.product(("observe", "share"), registry.names()):
        values = {"mode": mode, "policy": {"name": policy}, "agents": agents}
        why = rf"  mode = '{mode}': with agents.scheme '{scheme}' .*policy '{policy}'.*publishes no"
        with pytest.raises(ConfigError, match=rf"{why}.*\n.*set mode to 'off'"):
            load_config(values, {})
        assert load_config(values | {"mode": "off"}, {})
        assert load_config(values | {"agents": agents | {"scheme": "nonshared"}}, {})
    with pytest.raises(ConfigError, match=r"  mode = 'share' \(the default\): "):
        load_config({"agents": agents}, {})
    with pytest.raises(ConfigError, match=r"agents.adapters is empty\n    fix: name"):
        load_config({"mode": "off", "agents": {"scheme": scheme}}, {})
    assert load_config({"agents": agents | {"scheme": "nonshared"}}, {}).mode == "share"


def test_a_comparison_is_not_configured_by_its_shell() -> None:
    shell = {"PATH": "/bin", "MEMSHARE_MODE": "off", "MEMSHARE_CONFIG": "x.yaml"}
    assert without_fields(shell) == {"PATH": "/bin"}


@pytest.mark.parametrize("section", SECTIONS)
def test_a_misspelt_name_is_put_right(section: str) -> None:
    for name in SECTIONS[section].model_fields:
        with pytest.raises(ConfigError, match=f"did you mean '{name}'"):
            load_config(nested(f"{section}{name}x", 1), {})


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_says_what_it_is(section: str) -> None:
    for name, field in SECTIONS[section].model_fields.items():
        if name == "name":
            continue
        assert field.description, f"{section}{name} has no docstring"
        assert not field.is_required(), f"{section}{name} has no default"


@sources
def test_every_default_can_be_given_back(source: Source, tmp_path: Path) -> None:
    """Negative control of the tests above: what is right passes, from everywhere."""
    for section, model in SECTIONS.items():
        for name, field in model.model_fields.items():
            value = field.get_default(call_default_factory=True)
            if name == "name" or isinstance(value, BaseModel):
                continue
            value = list(value) if isinstance(value, tuple) else value
            config = source(tmp_path, section + name, value)
            for part in plain(section).split(".")[:-1]:
                config = getattr(config, part)
            default = field.get_default(call_default_factory=True)
            assert getattr(config, name) == default


@sources
def test_every_policy_can_be_named(source: Source, tmp_path: Path) -> None:
    policies = models_in(MemShareConfig.model_fields["policy"])
    assert len(policies) > 1
    for params in policies:
        assert type(source(tmp_path, "policy.name", tag_of(params)).policy) is params


def test_every_fault_is_reported_at_once() -> None:
    faults = {
        "mode": "x",
        "trigger": {"kind": "y", "z": 1},
        "policy": {"name": "random", "seed": -1},
    }
    with pytest.raises(ConfigError) as caught:
        load_config(faults, {})
    for name in ("mode = 'x'", "trigger.kind = 'y'", "trigger.z: there is no", "policy.seed = -1"):
        assert name in str(caught.value)


def test_names_that_are_no_text() -> None:
    with pytest.raises(ConfigError, match=r"trigger\.1 = .*Keys should be strings"):
        load_config({"trigger": {1: 2}}, {})


# ---- cross-field checks ----


@sources
def test_watermarks_must_be_in_order(source: Source, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"trigger = .*high_watermark \(0\.1\).*low_watermark \(0\.2\)"
    ):
        source(tmp_path, "trigger.low_watermark", 0.2)
    assert source(tmp_path, "trigger.low_watermark", 0.1).trigger.high_watermark == 0.1


@sources
def test_step_lengths_must_be_in_order(source: Source, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"steps = .*max_tokens \(256\).*min_tokens \(257\)"):
        source(tmp_path, "steps.min_tokens", 257)
    assert source(tmp_path, "steps.min_tokens", 256).steps.max_tokens == 256
