"""The engine's options as vLLM's own parser sees them. No engine, but vLLM's slow import."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cluster.config import ClusterArgs, parse_cluster_args
from cluster.engine.options import check_engine_options, parse_engine_options
from memshare.config import ConfigError
from tests.memshare.agents.tiny import write_adapter

pytestmark = pytest.mark.engine

CONFIGS = Path(__file__).resolve().parents[4] / "configs"


def parse(**args: object) -> ClusterArgs:
    return parse_cluster_args({"model": "some/model", **args}, environ={})


@pytest.mark.parametrize(
    ("name", "value", "what", "fix"),
    [
        ("max_nun_seqs", 3, "no such option", "did you mean 'max_num_seqs'?"),
        ("no_such_thing", 3, "no such option", "vllm serve --help"),
        ("max-logprobs", "many", "invalid int value: 'many'", "a value that vLLM accepts"),
        ("max_num_seqs", 3, "a field of its own", "set 'engine.max_num_seqs'"),
        ("port", 3, "not an engine option", "http_options.port"),
        ("worker_cls", "a.B", "not an engine option", "MemShare's worker class"),
        ("kv_transfer_config", "{}", "not an engine option", "MemShare's connector"),
        ("reasoning_parser", False, "--no-reasoning-parser", "a value that vLLM accepts"),
    ],
)
def test_a_wrong_extra_option_is_named_with_its_fix(
    name: str, value: object, what: str, fix: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_engine_options(parse(engine={"extra": {name: value}}))
    message = str(caught.value)
    assert message.startswith(f"engine.extra.{name} = {value!r}: ")
    assert what in message
    assert fix in message.partition("fix: ")[2]


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="enable-auto-tool-choice requires --tool-call-parser"):
        check_engine_options(parse(engine={"extra": {"enable_auto_tool_choice": True}}))


@pytest.mark.parametrize("file", ["cluster.yaml", "gpu.yaml", "multi-node.yaml", "single-gpu.yaml"])
def test_vllm_accepts_our_files(file: str) -> None:
    (application,) = yaml.safe_load((CONFIGS / file).read_text())["applications"]
    check_engine_options(parse_cluster_args(application["args"], environ={}))


def test_what_vllm_gets() -> None:
    args = parse(
        served_model_name="name",
        engine={
            "max_model_len": 4096,
            "enable_prefix_caching": False,
            "extra": {"max-logprobs": 7, "async_scheduling": False, "reasoning_parser": "qwen3"},
        },
        memshare={"mode": "observe", "evaluator": {"address": "somewhere:6379"}},
    )
    options = parse_engine_options(args, "/folder", args.memshare)
    assert (options.model, options.served_model_name) == ("/folder", ["name"])
    assert (options.max_model_len, options.enable_prefix_caching) == (4096, False)
    assert (options.max_logprobs, options.async_scheduling) == (7, False)
    assert options.worker_cls == "memshare.engine.worker.MemShareWorker"
    connector = options.kv_transfer_config
    assert connector.kv_connector == "MemShareConnector"
    assert connector.kv_connector_module_path == "memshare.engine.connector"
    extra = connector.kv_connector_extra_config
    assert extra == json.loads(args.memshare.model_dump_json()), "every field, resolved"
    assert (extra["mode"], extra["evaluator"]["address"]) == ("observe", "somewhere:6379")


def test_prompts_in_host_memory_are_another_connector() -> None:
    args = parse(engine={"extra": {"kv_offloading_size": 2}})
    options = parse_engine_options(args, "/folder", args.memshare)
    connector = options.kv_transfer_config
    assert connector.kv_connector == "MultiConnector"
    ours, theirs = connector.kv_connector_extra_config["connectors"]
    assert ours["kv_connector"] == "MemShareConnector"
    assert theirs["kv_connector"] == "OffloadingConnector"
    assert theirs["kv_connector_extra_config"] == {"cpu_bytes_to_use": 2 << 30}
    assert options.kv_offloading_size is None, "vLLM would put its connector in ours' place"
    assert options.async_scheduling is False
    off = parse(memshare={"mode": "off"}, engine={"extra": {"kv_offloading_size": 2}})
    assert parse_engine_options(off, "/folder", off.memshare).kv_offloading_size == 2


def test_off_is_plain_vllm() -> None:
    args = parse(memshare={"mode": "off"})
    options = parse_engine_options(args, "/folder", args.memshare)
    plain = parse_engine_options(parse(memshare={"mode": "off"}), "/folder", args.memshare)
    assert vars(options) == vars(plain)
    assert options.kv_transfer_config is None
    assert options.worker_cls == "auto"


def test_adapters_are_models_of_the_api(tmp_path: Path) -> None:
    folders = {
        name: str(write_adapter(tmp_path / name, seed=seed, rank=4 + 5 * seed))
        for seed, name in enumerate(("plan", "act"))
    }
    for scheme in ("stacked", "nonshared"):
        agents = {"scheme": scheme, "adapters": folders}
        args = parse(memshare={"mode": "off", "agents": agents})
        check_engine_options(args)
        options = parse_engine_options(args, "/folder", args.memshare)
        assert (options.enable_lora, options.max_loras, options.max_lora_rank) == (True, 3, 16)
        assert {module.name: module.path for module in options.lora_modules} == folders
        assert (options.kv_transfer_config is not None) == (scheme == "stacked")
    nowhere = {"act": str(tmp_path / "nowhere")}
    for scheme, adapters, symptom in (
        ("base_lr_shared", folders, "its A matrix on v_proj differs"),
        ("stacked", nowhere, r"adapters.act = .*no such folder"),
    ):
        agents = {"scheme": scheme, "adapters": adapters}
        args = parse(memshare={"mode": "off", "agents": agents})
        with pytest.raises(ConfigError, match=rf"(?s){symptom}.*fix: "):
            check_engine_options(args)
