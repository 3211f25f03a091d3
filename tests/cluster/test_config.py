"""Arguments of the application: what is accepted, and what the errors say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from cluster.config import (
    AuthConfig,
    ClusterArgs,
    EngineConfig,
    PageConfig,
    ReplicaConfig,
    RoutingConfig,
    ScalingConfig,
    parse_cluster_args,
)
from cluster.guard.config import GuardConfig
from cluster.tenancy.keys import KeylessConfig
from memshare.config import ConfigError
from tests.cluster.support.arguments import parse

# (section, field, wrong value, what the message must say besides field and value)
WRONG: list[tuple[str, str, object, str]] = [
    ("", "model", "", "at least 1 character"),
    ("", "served_model_name", "", "at least 1 character"),
    ("", "replicas", 0, "greater than or equal to 1"),
    ("", "engine", 3, "EngineConfig"),
    ("", "replica", "big", "ReplicaConfig"),
    ("", "auth", "keys.yaml", "AuthConfig"),
    ("", "routing", "random", "RoutingConfig"),
    ("", "scaling", "auto", "ScalingConfig"),
    ("engine", "tensor_parallel_size", 0, "greater than or equal to 1"),
    ("engine", "dtype", "int8", "'bfloat16'"),
    ("engine", "max_model_len", 0, "greater than or equal to 1"),
    ("engine", "block_size", "large", "valid integer"),
    ("engine", "num_gpu_blocks_override", 1, "greater than or equal to 2"),
    ("engine", "max_num_seqs", -3, "greater than or equal to 1"),
    ("engine", "max_num_batched_tokens", 0, "greater than or equal to 1"),
    ("engine", "gpu_memory_utilization", 1.5, "less than or equal to 1"),
    ("engine", "enable_prefix_caching", "perhaps", "valid boolean"),
    ("engine", "enforce_eager", "perhaps", "valid boolean"),
    ("engine", "seed", -1, "greater than or equal to 0"),
    ("engine", "load_format", "", "at least 1 character"),
    ("engine", "distributed_executor_backend", "threads", "'ray'"),
    ("engine", "extra", ["swap"], "valid dictionary"),
    ("engine", "extra", {"max_logprobs": [1]}, "write lists and objects as JSON text"),
    ("replica", "cpus", -1, "greater than or equal to 0"),
    ("replica", "gpus", -1, "greater than or equal to 0"),
    ("replica", "nodes", 0, "greater than or equal to 1"),
    ("replica", "pin_cpus", "both", "valid boolean"),
    ("replica", "env", ["A=1"], "valid dictionary"),
    ("replica", "env", {"DEBUG": True}, "DEBUG = True is not text; put it in quotes"),
    ("replica", "max_ongoing_requests", 0, "greater than or equal to 1"),
    ("replica", "max_queued_requests", 0, "greater than or equal to 1"),
    ("replica", "max_body_bytes", 0, "greater than or equal to 1024"),
    ("replica", "body_timeout_s", 0, "greater than 0"),
    ("replica", "body_timeout_s", True, "a number is wanted"),
    ("replica", "health_check_period_s", 0, "greater than 0"),
    ("replica", "health_check_timeout_s", 0, "greater than 0"),
    ("replica", "graceful_shutdown_timeout_s", -1, "greater than or equal to 0"),
    ("auth", "file", "keys.yaml", "is not absolute"),
    ("auth", "variable", "MY KEYS", "match pattern"),
    ("auth", "without_keys", 128, "KeylessConfig"),
    ("replica", "retry_after_s", 0, "greater than 0"),
    ("replica", "unavailable_retry_after_s", 0, "greater than or equal to 1"),
    ("replica", "max_surge_percent", 101, "less than or equal to 100"),
    ("routing", "sessions", "perhaps", "valid boolean"),
    ("routing", "load", "cpu", "'requests'"),
    ("routing", "spill_demand", -1, "greater than or equal to 0"),
    ("routing", "spill_imbalance", 0.5, "greater than or equal to 1"),
    ("routing", "fallbacks", True, "a number is wanted"),
    ("routing", "kinds", 2, "valid boolean"),
    ("routing", "report_period_s", 0, "greater than 0"),
    ("scaling", "min_replicas", 0, "greater than or equal to 1"),
    ("scaling", "max_replicas", 0, "greater than or equal to 1"),
    ("scaling", "up_demand", 0, "greater than 0"),
    ("scaling", "target_demand", 0, "greater than 0"),
    ("scaling", "down_demand", -1, "greater than or equal to 0"),
    ("scaling", "up_waiting_share", 2, "less than or equal to 1"),
    ("scaling", "up_preemptions_per_minute", -1, "greater than or equal to 0"),
    ("scaling", "up_delay_s", -1, "greater than or equal to 0"),
    ("scaling", "down_delay_s", -1, "greater than or equal to 0"),
    ("scaling", "look_back_s", 0, "greater than 0"),
    ("scaling", "report_period_s", 0, "greater than 0"),
    ("", "page", "on", "PageConfig"),
    ("page", "enabled", "perhaps", "valid boolean"),
    ("page", "interval_s", 0.1, "greater than or equal to 0.2"),
    ("page", "minutes", 0.5, "greater than or equal to 1"),
    ("page", "minutes", 121, "less than or equal to 120"),
    ("page", "show_text", "perhaps", "valid boolean"),
    ("", "guard", "on", "GuardConfig"),
    ("guard", "share", 0, "greater than 0"),
    ("guard", "bound", 1, "less than 1"),
    ("guard", "false_alarm_rate", 0.5, "less than or equal to 0.2"),
    ("guard", "window", 10, "greater than or equal to 20"),
    ("guard", "on_alarm", "halt", "'report'"),
    ("guard", "cool_down_s", 0, "greater than 0"),
    ("guard", "concurrent", 0, "greater than or equal to 1"),
    ("guard", "waiting", 0, "greater than or equal to 1"),
    ("guard", "patience_s", -1, "greater than or equal to 0"),
    ("guard", "max_usage", 1.5, "less than or equal to 1"),
    ("memshare", "mode", "shar", "'observe'"),
]


@pytest.mark.parametrize(("section", "field", "value", "text"), WRONG)
def test_a_wrong_value_is_named_with_its_fix(
    section: str, field: str, value: object, text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(**({section: {field: value}} if section else {field: value}))
    message = str(caught.value)
    assert section in message
    assert f"{field} = {value!r}" in message
    assert text in message
    assert "fix: " in message


def test_every_field_has_a_wrong_value_above() -> None:
    tried = {(section, field) for section, field, _, _ in WRONG}
    models: dict[str, type[BaseModel]] = {
        "": ClusterArgs,
        "engine": EngineConfig,
        "replica": ReplicaConfig,
        "auth": AuthConfig,
        "routing": RoutingConfig,
        "scaling": ScalingConfig,
        "page": PageConfig,
        "guard": GuardConfig,
    }
    fields = {(section, field) for section, model in models.items() for field in model.model_fields}
    assert fields - tried == {("", "memshare")}, "tested where it is defined"


@pytest.mark.parametrize(
    "model",
    [
        ClusterArgs,
        EngineConfig,
        ReplicaConfig,
        AuthConfig,
        KeylessConfig,
        RoutingConfig,
        ScalingConfig,
        PageConfig,
        GuardConfig,
    ],
)
def test_every_field_is_documented(model: type[BaseModel]) -> None:
    assert [n for n, field in model.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        ({"engin": {}}, "did you mean 'engine'?"),
        ({"engine": {"max_seqs": 3}}, "did you mean 'max_num_seqs'?"),
        ({"replica": {"gpu": 3}}, "did you mean 'gpus'?"),
        ({"memshare": {"trigger": {"low_mark": 3}}}, "did you mean 'low_watermark'?"),
    ],
)
def test_an_unknown_field_gets_a_hint(args: dict[str, object], hint: str) -> None:
    with pytest.raises(ConfigError, match="there is no such field") as caught:
        parse(**args)
    assert hint in str(caught.value)


def test_a_key_table_is_in_no_variable_that_configures_memshare() -> None:
    with pytest.raises(ConfigError, match=r"auth\.variable = 'MEMSHARE_KEYS': begins with"):
        parse(auth={"variable": "MEMSHARE_KEYS"})
    assert parse(auth={"variable": "KEYS_OF_MEMSHARE"}).auth.keys.exists


@pytest.mark.parametrize("field", KeylessConfig.model_fields)
def test_bounds_without_keys_are_no_zero(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"auth\.without_keys\.{field} = 0: .* equal to 1"):
        parse(auth={"without_keys": {field: 0}})


def test_bounds_without_keys_are_not_set_beside_keys() -> None:
    bounds = {"sequences_per_request": 16}
    assert parse(auth={"without_keys": bounds}).auth.without_keys.sequences_per_request == 16
    with pytest.raises(ConfigError, match="without_keys has no effect beside a key table"):
        parse(auth={"variable": "KEYS", "without_keys": bounds})


def test_a_missing_model_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model = .*Field required"):
        parse_cluster_args({}, environ={})


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (
            {"engine": {"tensor_parallel_size": 2}, "replica": {"gpus": 1}},
            "fix: set replica.gpus to 2",
        ),
        (
            {"engine": {"tensor_parallel_size": 2, "distributed_executor_backend": "uni"}},
            "set 'mp', 'ray' or leave it out",
        ),
        ({"memshare": "share"}, "fix: write its fields below it"),
        ({"engine": {"distributed_executor_backend": "ray"}}, "fix: set it to 'mp'"),
    ],
)
def test_fields_that_contradict_each_other(args: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(**args)
    assert text in str(caught.value)


RAY = {"distributed_executor_backend": "ray"}


@pytest.mark.parametrize(
    ("args", "field", "fix"),
    [
        (
            {"routing": {"load": "requests", "spill_demand": 1.0}},
            "routing.spill_demand = 1.0: has no effect with routing.load = 'requests'",
            "fix: leave it out, or set routing.load to 'kv'",
        ),
        (
            {"routing": {"load": "requests", "spill_imbalance": 2}},
            "routing.spill_imbalance = 2.0: has no effect",
            "set routing.load to 'kv'",
        ),
        (
            {"routing": {"load": "requests", "report_period_s": 1}},
            "routing.report_period_s = 1.0: has no effect",
            "set routing.load to 'kv'",
        ),
        (
            {"routing": {"sessions": False, "spill_imbalance": 2}},
            "routing.spill_imbalance = 2.0: has no effect with routing.sessions = False",
            "fix: leave it out, or set routing.sessions to true",
        ),
        (
            {"routing": {"sessions": False, "fallbacks": 3}},
            "routing.fallbacks = 3: has no effect with routing.sessions = False",
            "fix: leave it out, or set routing.sessions to true",
        ),
        (
            {"routing": {"sessions": False, "spill_demand": 0.9}},
            "routing.spill_demand = 0.9: has no effect with routing.sessions = False",
            "set routing.sessions to true",
        ),
        (
            {"engine": {"tensor_parallel_size": 2, **RAY}, "replica": {"gpus": 1}},
            "replica.gpus = 1: has no effect",
            "fix: set replica.gpus to 2, or engine.distributed_executor_backend to 'mp'",
        ),
        (
            {"engine": {"tensor_parallel_size": 2, **RAY}, "replica": {"gpus": 4}},
            "replica.gpus = 4: has no effect",
            "fix: set replica.gpus to 2",
        ),
        (
            {"replica": {"gpus": 1, "pin_cpus": True}},
            "replica.pin_cpus = True: has no effect",
            "fix: leave it out",
        ),
        (
            {"guard": {}, "memshare": {"mode": "observe"}},
            "guard: has no effect with memshare.mode = 'observe'",
            "fix: leave it out, or set memshare.mode to 'share'",
        ),
        (
            {"guard": {"on_alarm": "report", "cool_down_s": 60}},
            "cool_down_s (60) has no effect with on_alarm 'report'",
            "leave it out, or set on_alarm to 'stop'",
        ),
        (
            {"guard": {}, "engine": {"extra": {"logprobs-mode": "processed_logprobs"}}},
            "engine.extra.logprobs-mode = 'processed_logprobs': the guard compares",
            "fix: leave it out, or leave out guard",
        ),
        (
            {"guard": {}, "page": {"enabled": False}},
            "guard.cool_down_s = None: an operator lets a replica go on by the live page",
            "fix: set guard.cool_down_s, or page.enabled to true",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(
    args: dict[str, object], field: str, fix: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(**args)
    assert field in str(caught.value)
    assert fix in str(caught.value)


@pytest.mark.parametrize(
    "args",
    [
        {"routing": {"load": "requests", "fallbacks": 3}},
        {"routing": {"load": "requests", "sessions": False}},
        {"routing": {"sessions": False, "report_period_s": 1}},
        {"engine": {"tensor_parallel_size": 2, **RAY}, "replica": {"gpus": 2}},
        {"guard": {}},
        {"guard": {}, "memshare": {"mode": "observe", "selection": {"pages": 8}}},
        {"guard": {"cool_down_s": 60}, "page": {"enabled": False}},
        {"guard": {"on_alarm": "report"}, "page": {"enabled": False}},
        {"replica": {"gpus": 2}},  # an operator may reserve more than workers need
    ],
)
def test_what_has_an_effect_is_accepted(args: dict[str, object]) -> None:
    parse(**args)


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(routing={"sessions": False, "fallbacks": 3}, engine={**RAY})
    assert str(caught.value).count("fix: ") == 2


def test_memshare_follows_its_own_precedence(tmp_path: Path) -> None:
    file = tmp_path / "memshare.yaml"
    file.write_text("mode: observe\nscope: tenant\nbudget: {max_shared_fraction: 0.1}\n")
    environ = {"MEMSHARE_CONFIG": str(file), "MEMSHARE_SCOPE": "request"}
    explicit = {"budget": {"max_shared_fraction": 0.2}}
    config = parse_cluster_args({"model": "m", "memshare": explicit}, environ).memshare
    assert (config.mode, config.scope) == ("observe", "request")
    assert config.budget.max_shared_fraction == 0.2


def test_yaml_off_means_off() -> None:
    args = parse(memshare=yaml.safe_load("mode: off"))
    assert not args.uses_memshare
    assert not args.uses_pool


def test_numbers_in_the_environment_become_text() -> None:
    assert parse(replica={"env": {"A": 1, "B": "2"}}).replica.env == {"A": "1", "B": "2"}


@pytest.mark.parametrize(
    ("memshare", "needed"),
    [
        ({"evaluator": {"source": "ray"}, "policy": {"name": "paper"}}, True),
        ({"evaluator": {"source": "ray"}, "policy": {"name": "oldest"}}, False),
        ({"evaluator": {"source": "ray"}}, True),  # `auto` may settle on a policy that needs it
        ({"evaluator": {"source": "in_process"}}, False),
    ],
)
def test_the_pool_is_deployed_when_stage_one_needs_it(
    memshare: dict[str, object], needed: bool
) -> None:
    assert parse(memshare=memshare).uses_pool is needed


@pytest.mark.parametrize(
    ("args", "needed"),
    [
        ({}, False),
        ({"replicas": 2}, False),
        ({"auth": {"file": "/keys.yaml"}}, False),
        ({"auth": {"variable": "KEYS"}, "replicas": 2}, True),
    ],
)
def test_the_ledger_is_deployed_when_replicas_share_limits(
    args: dict[str, object], needed: bool
) -> None:
    assert parse(**args).uses_ledger is needed


def with_adapters(scheme: str = "stacked", folder: str = "/adapters/plan", **args: object) -> Any:
    agents = {"scheme": scheme, "adapters": {"plan": folder}}
    return parse(memshare={"mode": "off", "agents": agents}, **args)


@pytest.mark.parametrize(
    ("args", "symptom"),
    [
        ({"folder": "adapters/plan"}, r"memshare.agents.adapters.plan = 'adapters/plan': .*absol"),
        ({"served_model_name": "plan"}, r"adapters.plan = .*'plan' is the base model's name"),
        ({"engine": {"enable_prefix_caching": False}}, "engine.enable_prefix_caching = False"),
        ({"engine": {"extra": {"max-loras": 9}}}, "engine.extra.max-loras = 9: follows from"),
        ({"engine": {"extra": {"lora_modules": "a=b"}}}, "engine.extra.lora_modules = 'a=b'"),
        ({"engine": {"extra": {"kv-cache-dtype": "fp8"}}}, "engine.extra.kv-cache-dtype = 'fp8'"),
    ],
)
def test_adapters_that_the_cluster_cannot_serve_so(args: dict[str, Any], symptom: str) -> None:
    with pytest.raises(ConfigError, match=symptom + r"[^\n]*\n    fix: "):
        with_adapters(**args)


def test_adapters_bring_memshare_into_a_plain_vllm() -> None:
    """If they share: else vLLM serves them alone."""
    assert with_adapters().uses_memshare
    assert not with_adapters().uses_pool
    assert not with_adapters("nonshared").uses_memshare
    assert not with_adapters("nonshared", engine={"enable_prefix_caching": False}).uses_memshare
    assert not with_adapters("nonshared", engine={"extra": {"kv_cache_dtype": "fp8"}}).uses_memshare


@pytest.mark.parametrize("policy", ["compaction", "twins", "paper", "oldest"])
def test_adapters_that_share_leave_nothing_to_reclaim(policy: str) -> None:
    agents = {"scheme": "stacked", "adapters": {"plan": "/adapters/plan"}}
    with pytest.raises(
        ConfigError, match=rf"(?s)memshare.*mode = 'share'.*policy '{policy}' would"
    ):
        parse(memshare={"mode": "share", "policy": {"name": policy}, "agents": agents})
    parse(
        memshare={
            "mode": "share",
            "policy": {"name": policy},
            "agents": agents | {"scheme": "nonshared"},
        }
    )
