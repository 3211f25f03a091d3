"""Set-ups that must be refused at start, each with a reason and a way out (before weights load)."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memshare.config import ConfigError
from tests.memshare.agents.tiny import tiny_config, write_adapter
from tests.memshare.engine.harness import StartEngine, write_tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(write_tiny_model(tmp_path_factory.mktemp("tiny"))),
        block_size=32,
        max_model_len=512,
        load_format="dummy",
        kv_transfer_config={
            "kv_connector": "MemShareConnector",
            "kv_connector_module_path": "memshare.engine.connector",
            "kv_role": "kv_producer",
        },
        worker_cls="memshare.engine.worker.MemShareWorker",
    ).create_engine_config()


def change(path: str, value: object) -> Callable[[Any], None]:
    def apply(config: Any) -> None:
        *owners, name = path.split(".")
        for owner in owners:
            config = getattr(config, owner)
        setattr(config, name, value)

    return apply


CASES = {
    "another connector": (
        change("kv_transfer_config.kv_connector", "X"), "set it to 'MemShareConnector'",
    ),
    "role": (change("kv_transfer_config.kv_role", "kv_both"), '"kv_role": "kv_producer"'),
    "worker class": (
        change("parallel_config.worker_cls", "auto"), "--worker-cls memshare.engine.worker",
    ),
    "drafts": (change("speculative_config", SimpleNamespace(method="medusa")), "use one of ngram"),
    "pipeline": (change("parallel_config.pipeline_parallel_size", 2), "pipeline_parallel_size"),
    "DCP": (
        change("parallel_config.decode_context_parallel_size", 2), "decode_context_parallel_size",
    ),
    "PCP": (
        change("parallel_config.prefill_context_parallel_size", 2), "prefill_context_parallel_size",
    ),
    "tokenizer": (change("model_config.skip_tokenizer_init", True), "skip_tokenizer_init"),
    "cache type": (change("cache_config.cache_dtype", "turboquant"), "kv_cache_dtype"),
}  # fmt: skip


@pytest.mark.proves("other connector", how="refused", case="another connector")
@pytest.mark.proves("other worker", how="refused", case="worker class")
@pytest.mark.proves("other drafts", how="refused", case="drafts")
@pytest.mark.proves("pipeline parallel", how="refused", case="pipeline")
@pytest.mark.proves("context parallel", how="refused", case="DCP")
@pytest.mark.proves("no tokenizer", how="refused", case="tokenizer")
@pytest.mark.proves("cache others", how="refused", case="cache type")
@pytest.mark.parametrize("case", CASES)
def test_refused_before_the_model_loads(vllm_config: Any, case: str) -> None:
    from memshare.engine.compatibility import UnsupportedSetup, check_before_load

    check_before_load(vllm_config)  # the set-up itself is fine
    spoil, symptom = CASES[case]
    broken = copy.deepcopy(vllm_config)
    spoil(broken)
    with pytest.raises(UnsupportedSetup, match=symptom):
        check_before_load(broken)
    off = copy.deepcopy(broken)
    off.kv_transfer_config.kv_connector_extra_config = {"mode": "off"}
    check_before_load(off)  # switched off, MemShare is in nobody's way


def test_a_wrong_field_stops_the_worker_before_it_loads(vllm_config: Any) -> None:
    from memshare.engine.worker import MemShareWorker

    broken = copy.deepcopy(vllm_config)
    broken.kv_transfer_config.kv_connector_extra_config = {"trigger": {"low_watermark": 7}}
    with pytest.raises(ConfigError, match=r"trigger\.low_watermark = 7"):
        MemShareWorker(broken, 0, 0, "")


@pytest.mark.proves("hybrid others", "sliding window", "mla", how="refused")
def test_models_whose_cache_cannot_be_shared(vllm_config: Any) -> None:
    import torch
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        MLAAttentionSpec,
        SlidingWindowSpec,
    )

    from memshare.config import load_config
    from memshare.engine.compatibility import UnsupportedSetup, check_cache

    shape = {"block_size": 32, "num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
    full = FullAttentionSpec(**shape)

    def cache(*specs: Any) -> KVCacheConfig:
        return KVCacheConfig(8, [], [KVCacheGroupSpec([str(i)], s) for i, s in enumerate(specs)])

    share, sliding = load_config({}, {}), SlidingWindowSpec(**shape, sliding_window=64)
    for works in ((full,), (sliding, full)):
        check_cache(cache(*works), vllm_config, share)
    for specs, symptom in (
        ((full, full), "2 KV cache groups"),
        ((MLAAttentionSpec(**shape),), "latent attention"),
        ((sliding,), "no layer of the model has full attention"),
        ((FullAttentionSpec(**shape, sliding_window=64),), "hybrid KV cache manager"),
    ):
        with pytest.raises(UnsupportedSetup, match=symptom):
            check_cache(cache(*specs), vllm_config, share)
    drafting = copy.deepcopy(vllm_config)
    drafting.speculative_config = SimpleNamespace(method="ngram", num_speculative_tokens=3)
    for config, options, symptom in (
        (drafting, {}, "leave speculative_config out"),
        (vllm_config, {"selection": {"pages": 4}}, "leave budget and pages out"),
    ):
        check_cache(cache(full), config, load_config(options, {}))
        with pytest.raises(UnsupportedSetup, match=symptom):
            check_cache(cache(sliding, full), config, load_config(options, {}))


@pytest.mark.parametrize("found", ["0.31.0", "0.33.1", "1.0.0"])
def test_other_versions_are_refused(found: str) -> None:
    from memshare.engine.versions import UnsupportedVersion, check_vllm_version

    check_vllm_version("0.32.0+cpu")
    with pytest.raises(UnsupportedVersion, match=rf"{found} is installed.*vllm==0\.32\.0"):
        check_vllm_version(found)


def test_a_missing_worker_hook_is_noticed() -> None:
    from memshare.engine.compatibility import UnsupportedSetup, check_workers
    from memshare.engine.messages import WorkerHandshake

    hooked, bare = WorkerHandshake(True), WorkerHandshake(False)
    check_workers([hooked, hooked], world_size=2)
    with pytest.raises(UnsupportedSetup, match="1 of 2 workers"):
        check_workers([hooked, bare], world_size=2)
    with pytest.raises(UnsupportedSetup, match="1 of 2 workers"):
        check_workers([hooked], world_size=2)


def test_workers_that_settled_on_another_policy_are_noticed(vllm_config: Any) -> None:
    from memshare.engine.compatibility import UnsupportedSetup, check_workers, config_of
    from memshare.engine.messages import WorkerHandshake

    policy = config_of(vllm_config).policy.name
    assert policy == "twins", "no weights, so no probe"
    ours, other = WorkerHandshake(True, policy=policy), WorkerHandshake(True, policy="compaction")
    check_workers([ours, ours], world_size=2, policy=policy)
    with pytest.raises(UnsupportedSetup, match="'twins' in the scheduler, and compaction on work"):
        check_workers([ours, other], world_size=2, policy=policy)


def test_an_engine_does_not_start(start_engine: StartEngine, tiny: str, tmp_path: Path) -> None:
    """The whole way: vLLM itself refuses, with our text, and starts nothing."""
    with (
        pytest.raises(ConfigError, match="did you mean 'mode'"),
        start_engine(tiny, {"mdoe": "share"}, load_format="dummy", num_gpu_blocks_override=80),
    ):
        pass


@pytest.mark.parametrize("mode", ["off", "share"])
def test_experts_of_a_dense_model_cannot_be_counted(vllm_config: Any, mode: str) -> None:
    from memshare.engine.compatibility import UnsupportedSetup, check_before_load

    config = copy.deepcopy(vllm_config)
    options = {"mode": mode, "experts": {"count_every": 16}}
    config.kv_transfer_config.kv_connector_extra_config = options
    with pytest.raises(UnsupportedSetup, match=r"experts\.count_every: .* has no experts") as error:
        check_before_load(config)
    assert "fix: set experts.count_every to 0" in str(error.value)
    config.model_config.model_arch_config.num_experts = 8
    check_before_load(config)
    config.aux_output_config.enable_return_routed_experts = True
    with pytest.raises(UnsupportedSetup, match="enable_return_routed_experts"):
        check_before_load(config)
    options["experts"]["count_every"] = 0
    check_before_load(config)


# ---- adapters that share a cache ----


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM(tiny_config(num_attention_heads=2, head_dim=32, vocab_size=258))
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("plan", "act")):
        write_adapter(folder / name, base, seed=seed, a_seed=9)
    write_adapter(folder / "keys", base, seed=3, targets=["k_proj"])
    write_adapter(folder / "elsewhere", seed=4)
    return folder


def with_agents(vllm_config: Any, adapters: Path, scheme: str, *names: str) -> Any:
    """An engine that lets these adapters share, as far as its options go."""
    from vllm.config.lora import LoRAConfig

    config = copy.deepcopy(vllm_config)
    config.kv_transfer_config.kv_connector_extra_config = {
        "mode": "off",
        "agents": {"scheme": scheme, "adapters": {name: str(adapters / name) for name in names}},
    }
    config.lora_config = LoRAConfig(max_loras=3, max_lora_rank=8)
    config.cache_config.enable_prefix_caching = True
    return config


AGENT_CASES = {
    "another connector": (change("kv_transfer_config.kv_connector", "X"), "set it to 'MemShare"),
    "worker class": (change("parallel_config.worker_cls", "auto"), "--worker-cls memshare"),
    "no LoRA": (change("lora_config", None), "add --enable-lora"),
    "too few slots": (change("lora_config.max_loras", 2), "set it to 3"),
    "too low a rank": (change("lora_config.max_lora_rank", 1), "an adapter has 4; raise it"),
    "cut matrices": (change("lora_config.fully_sharded_loras", True), "fully_sharded_loras"),
    "some modules": (change("lora_config.target_modules", ["o_proj"]), "target_modules"),
    "prefix caching": (change("cache_config.enable_prefix_caching", False), "leave it on"),
    "fp8": (change("cache_config.cache_dtype", "fp8"), "kv_cache_dtype is 'fp8'"),
    "architecture": (change("model_config._architecture", "PhiForCausalLM"), "PhiForCausalLM"),
    "device": (change("device_config.device_type", "xpu"), "the device is xpu"),
    "speculation": (change("speculative_config", object()), "speculative decoding"),
}


@pytest.mark.parametrize("case", AGENT_CASES)
def test_adapters_cannot_share_in_such_an_engine(
    vllm_config: Any, adapters: Path, case: str
) -> None:
    from memshare.engine.compatibility import UnsupportedSetup, check_before_load

    config = with_agents(vllm_config, adapters, "base_lr_shared", "plan", "act")
    check_before_load(config)  # the set-up itself is fine
    spoil, symptom = AGENT_CASES[case]
    spoil(config)
    with pytest.raises(UnsupportedSetup, match=symptom):
        check_before_load(config)
    config.kv_transfer_config.kv_connector_extra_config = {"mode": "off"}
    check_before_load(config)


@pytest.mark.parametrize(
    ("name", "symptom"),
    [
        ("keys", "it changes k_proj"), ("elsewhere", "belongs to another base model"),
        ("nowhere", "there is no such folder"),
    ],
)  # fmt: skip
def test_adapters_that_cannot_share_are_refused_before_the_model_loads(
    vllm_config: Any, adapters: Path, name: str, symptom: str
) -> None:
    from memshare.engine.compatibility import UnsupportedSetup
    from memshare.engine.worker import MemShareWorker

    config = with_agents(vllm_config, adapters, "stacked", "plan", name)
    with pytest.raises(UnsupportedSetup, match=symptom):
        MemShareWorker(config, 0, 0, "")


def test_adapters_that_changed_while_the_engine_started_are_noticed() -> None:
    from memshare.engine.compatibility import UnsupportedSetup, check_workers
    from memshare.engine.messages import WorkerHandshake

    check_workers([WorkerHandshake(True, "key")], 1, "key")
    for theirs, ours in (("other", "key"), (None, "key"), ("key", None)):
        with pytest.raises(UnsupportedSetup, match="adapters were changed"):
            check_workers([WorkerHandshake(True, theirs)], 1, ours)
    with pytest.raises(UnsupportedSetup, match="0 of 1 workers"):
        check_workers([], 1, "key")


def asked(name: str, folder: Path, number: int = 1) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=str(folder))


def test_a_request_for_an_adapter_that_was_not_checked(adapters: Path, tmp_path: Path) -> None:
    from memshare.agents.adapter import read_adapter
    from memshare.agents.family import Family
    from memshare.engine.agents import FamilyRequests, RefusedAdapter

    plan = adapters / "plan"
    copied = Path(shutil.copytree(plan, tmp_path / "copied"))
    requests = FamilyRequests(Family("stacked", (read_adapter("plan", plan),), ""))
    for wanted, symptom in (
        (asked("stranger", plan), r"'stranger' is none of .* \(plan\)"),
        (asked("plan", tmp_path / "nowhere"), "is not what .*plan was"),
        (asked("plan", adapters / "act"), "is not what .*plan was"),
    ):
        with pytest.raises(RefusedAdapter, match=symptom):
            requests.admit(wanted)
    requests.admit(asked("plan", plan))
    requests.admit(asked("plan", copied))
    requests.admit(asked("plan", plan, 2))
    weights = copied / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    requests.admit(asked("plan", copied))  # what is loaded goes on
    with pytest.raises(RefusedAdapter, match="if it has changed, restart"):
        requests.admit(asked("plan", Path(shutil.copytree(copied, tmp_path / "changed"))))
