"""``memshare check`` against vLLM: what is refused, and blocks counted as an engine counts them."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cluster.check.machine import Needs
from cluster.check.model import ModelCheck, Place
from cluster.check.placement import look_at_placement
from cluster.check.report import GIB, CheckFinding, Memory
from cluster.check.setup import CheckedSetup
from memshare.cli.main import main
from memshare.config import load_config
from memshare.moe.placement.model_config import shape_of
from memshare.moe.placement.parallelism import Parallelism
from memshare.moe.placement.ranks import place
from tests.memshare.engine.agents.served import write_roles
from tests.memshare.engine.harness import StartEngine, inspect_models_here, write_tiny_model
from tests.memshare.engine.hybrids.tiny_hybrids import write_tiny_hybrid

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[4]
BLOCKS = ("--block-size=32",)
HERE = Place(gpu_bytes=None, reserve_bytes=0, elsewhere=False)
COMMON = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 258, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Configurations as the families publish them, but small.
FAMILIES: dict[str, tuple[dict[str, Any], str | None]] = {
    "Qwen3ForCausalLM": ({"model_type": "qwen3"}, None),
    "Qwen3MoeForCausalLM": ({"model_type": "qwen3_moe", **EXPERTS}, None),
    "MistralForCausalLM": (
        {"model_type": "mistral", "sliding_window": 512}, "no layer of the model has full attention"
    ),
    "Gemma3ForCausalLM": (
        {
            "model_type": "gemma3_text", "sliding_window": 512, "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
        None,
    ),
    "Qwen3NextForCausalLM": (
        {
            "model_type": "qwen3_next", "decoder_sparse_step": 1, "mlp_only_layers": [],
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "full_attention_interval": 4,
            "shared_expert_intermediate_size": 32, "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, **EXPERTS,
        },
        None,
    ),
    "DeepseekV2ForCausalLM": (
        {
            "model_type": "deepseek_v2", "kv_lora_rank": 512, "q_lora_rank": None,
            "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "n_shared_experts": 1, "first_k_dense_replace": 1,
        },
        "latent attention",
    ),
    "Mamba2ForCausalLM": (
        {
            "model_type": "mamba2", "num_heads": 4, "state_size": 16, "n_groups": 1,
            "conv_kernel": 4, "expand": 2,
        },
        "keep a MambaSpec (MAMBA2)",
    ),
}  # fmt: skip
NGRAM = '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}'
PLACED = ("qwen3", "qwen3_moe", "mistral", "deepseek_v2")

Look = tuple[list[CheckFinding], Memory | None]


def look(
    folder: str, words: tuple[str, ...] = (), place: Place = HERE, mode: str = "share"
) -> Look:
    """Runs in the other process."""
    engine = ("--model", folder, "--max-model-len=1024", "--enforce-eager", *words)
    setup = CheckedSetup("test", engine, load_config({"mode": mode}, {}), Needs())
    checking = ModelCheck(setup, place, print)
    return list(checking.findings()), checking.memory


def look_at_agents(
    folder: str, agents: dict[str, Any], place: Place, more: tuple[str, ...] = ()
) -> Look:
    """Runs in the other process: adapters that share, in an engine of float32."""
    config = load_config({"mode": "off", "agents": agents}, {})
    words = ("--model", folder, "--max-model-len=1024", "--dtype=float32", *BLOCKS, *more)
    checking = ModelCheck(CheckedSetup("test", words, config, Needs()), place, print)
    return list(checking.findings()), checking.memory


def command(words: list[str]) -> tuple[int, str]:
    """Runs in the other process: the command line, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = main(words)
    return status, output.getvalue()


@pytest.fixture(scope="module")
def other_process() -> Iterator[ProcessPoolExecutor]:
    """Models without weights leave traces in vLLM's global state: not beside engines."""
    spawn = multiprocessing.get_context("spawn")
    inspects_itself = partial(inspect_models_here, pytest.MonkeyPatch())
    with ProcessPoolExecutor(1, spawn, initializer=inspects_itself) as pool:
        yield pool


@pytest.fixture(scope="module")
def check(other_process: ProcessPoolExecutor) -> Callable[..., Look]:
    """``look`` over there."""
    return lambda *args, **options: other_process.submit(look, *args, **options).result()


@pytest.mark.proves("hybrid mamba", how="refused", case="Mamba2")
@pytest.mark.parametrize("architecture", FAMILIES)
def test_families_are_judged_without_weights(
    check: Callable[..., Look], architecture: str, tmp_path: Path
) -> None:
    fields, symptom = FAMILIES[architecture]
    write_tiny_model(tmp_path)
    config = {**COMMON, "architectures": [architecture], **fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, _ = check(str(tmp_path), BLOCKS)
    faults = [finding.text for finding in found if finding.level == "fail"]
    if symptom is None:
        assert faults == []
        assert architecture in found[0].text
    else:
        assert any(symptom in fault for fault in faults), found
    off, memory = check(str(tmp_path), BLOCKS, mode="off")
    assert all(finding.level == "ok" for finding in off), "switched off, it is in nobody's way"
    if fields["model_type"] in PLACED:
        assert memory is not None
        (rank,) = place(shape_of(config), Parallelism()).ranks
        assert rank.all_weight_bytes == memory.weight_bytes, "arithmetic, and the model itself"
        assert rank.kv_bytes + rank.window_bytes == memory.block_bytes / memory.block_size


def test_blocks_are_counted_as_an_engine_counts_them(
    check: Callable[..., Look], start_engine: StartEngine, tiny: str
) -> None:
    """Exactly, where vLLM is told how much memory it may take."""
    found, memory = check(tiny, (*BLOCKS, "--dtype=bfloat16"))
    assert [finding.level for finding in found] == ["ok", "ok"]
    assert found[1].text.startswith("policy twins (auto): compaction: no probe fits; `memshare")
    assert memory is not None
    assert memory.kv_bytes == GIB
    options = {"load_format": "dummy", "dtype": "bfloat16", "max_model_len": 1024}
    with start_engine(tiny, {}, **options) as engine:
        assert list(engine.side.parts) == ["twins"]
        config = engine.core.vllm_config.cache_config
        assert memory.blocks == config.num_gpu_blocks
        assert memory.vllm_concurrency == pytest.approx(config.kv_cache_max_concurrency)


@pytest.mark.parametrize(
    ("kind", "dtype", "full"),
    [
        ("gpt_oss", "float32", "2 of 4 layers"),
        pytest.param("qwen3_next", "bfloat16", "1 of 4 layers", marks=pytest.mark.complete),
    ],
)
def test_hybrid_models_are_judged_as_an_engine_judges_them(
    check: Callable[..., Look], start_engine: StartEngine, tmp_path: Path,
    kind: str, dtype: str, full: str,
) -> None:  # fmt: skip
    folder = write_tiny_hybrid(tmp_path, kind)
    found, memory = check(folder, (*BLOCKS, f"--dtype={dtype}"))
    assert {finding.level for finding in found} == {"ok"}
    assert f"hybrid model: {full} have full attention" in found[0].text
    assert memory is not None
    assert f"{memory.block_size} tokens at a time" in found[0].text
    options = {"load_format": "dummy", "dtype": dtype, "max_model_len": 1024}
    with start_engine(folder, {}, **options) as engine:
        assert engine.side.tables.footprint == memory.footprint
        config = engine.core.vllm_config.cache_config
        assert memory.blocks == config.num_gpu_blocks
        assert memory.vllm_concurrency == pytest.approx(config.kv_cache_max_concurrency)
    for refused in (("--disable-hybrid-kv-cache-manager",), ("--speculative-config", NGRAM)):
        found, _ = check(folder, (*BLOCKS, f"--dtype={dtype}", *refused))
        assert "fail" in {finding.level for finding in found}, refused


def test_heads_of_adapters_that_share_are_counted_with_their_columns(
    other_process: ProcessPoolExecutor, start_engine: StartEngine, tmp_path: Path
) -> None:
    roles = write_roles(tmp_path)
    options = roles.options("stacked")  # 6 + 4 + 8 columns, so 24, behind heads of 32

    def check(agents: dict[str, Any], place: Place = HERE, *more: str) -> Look:
        base = str(roles.base)
        return other_process.submit(look_at_agents, base, agents, place, more).result()

    found, memory = check(options["agents"])
    assert [finding.level for finding in found] == ["ok"]
    assert memory is not None
    assert memory.block_bytes == 2 * 2 * 32 * (64 + 64) * 4, "layers, heads, tokens, widths, bytes"
    engine_options = {"dtype": "float32", "max_model_len": 1024}
    with start_engine(str(roles.base), options, **engine_options) as engine:
        assert memory.blocks == engine.core.vllm_config.cache_config.num_gpu_blocks
        runner = engine.core.model_executor.driver_worker.worker.model_runner
        slots = [
            sum(half.numel() * half.element_size() for half in halves)
            for layer in runner.lora_manager._adapter_manager.modules.values()
            for halves in (layer.lora_a_stacked, layer.lora_b_stacked)
        ]
    assert memory.lora_bytes == sum(slots) > 0
    found, two = check(options["agents"], HERE, "-tp=2")
    assert [finding.level for finding in found] == ["ok"]
    assert two is not None
    assert sum(slots) / 2 < two.lora_bytes < sum(slots), "one half of each pair is whole"
    _, elsewhere = check(options["agents"], Place(10 * GIB, 4 * GIB, elsewhere=True))
    assert elsewhere is not None
    assert elsewhere.block_bytes == 2 * 2 * 32 * (32 + 32 + 24) * 4, "GPUs pad nothing"
    _, plain = check(options["agents"] | {"scheme": "nonshared"})
    assert plain is not None
    assert plain.block_bytes == 2 * 2 * 32 * (32 + 32) * 4
    assert plain.lora_bytes == memory.lora_bytes
    found, _ = check(options["agents"] | {"max_rank": 4})
    assert any(
        finding.level == "fail" and "raise agents.max_rank" in finding.text for finding in found
    )
    found, _ = check(options["agents"], HERE, "--kv-cache-dtype=fp8")
    assert any(
        finding.level == "fail" and "kv_cache_dtype is 'fp8'" in finding.text for finding in found
    )


def test_weights_are_counted_as_transformers_counts_them(
    check: Callable[..., Look], tiny: str
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    _, memory = check(tiny, (*BLOCKS, "--dtype=bfloat16"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny))
    padded = 320 - 258  # vLLM fills the vocabulary up to a multiple of 64
    assert memory is not None
    assert memory.weight_bytes == 2 * (model.num_parameters() + padded * 64)


def test_ranks_share_heads_and_weights(check: Callable[..., Look], tiny: str) -> None:
    (_, one), (found, two) = check(tiny, BLOCKS), check(tiny, (*BLOCKS, "-tp=2"))
    assert {finding.level for finding in found} == {"ok"}
    assert one is not None
    assert two is not None
    assert two.block_bytes * 2 == one.block_bytes
    assert two.weight_bytes * 2 == one.weight_bytes
    assert two.blocks == one.blocks * 2


@pytest.mark.parametrize("dtype", ["int4_per_token_head", "nvfp4", "turboquant_k8v4"])
def test_a_kv_dtype_that_cannot_run_here_is_refused(
    check: Callable[..., Look], tiny: str, dtype: str
) -> None:
    """By MemShare, and on a CPU by its attention, which vLLM does not ask before it has loaded."""
    words = (*BLOCKS, f"--kv-cache-dtype={dtype}")
    found, _ = check(tiny, words, mode="off")
    (fault,) = (finding.text for finding in found if finding.level == "fail")
    assert fault == f"kv_cache_dtype is {dtype!r}; attention here (CPU_ATTN) takes auto, fp8, " + (
        "fp8_e4m3, fp8_e5m2"
    )
    found, _ = check(tiny, words)
    faults = [finding.text for finding in found if finding.level == "fail"]
    assert f"kv_cache_dtype is {dtype!r}; choose 'auto' or a per-tensor fp8 type" in faults
    found, _ = check(tiny, words, Place(10 * GIB, 4 * GIB, elsewhere=True), mode="off")
    assert all(finding.level == "ok" for finding in found), "not this machine's"


def test_an_fp8_cache_has_twice_the_blocks(check: Callable[..., Look], tiny: str) -> None:
    words = (*BLOCKS, "--dtype=bfloat16", "--kv-cache-memory-bytes=67108864")
    (_, plain), (found, narrow) = check(tiny, words), check(tiny, (*words, "--kv-cache-dtype=fp8"))
    assert {finding.level for finding in found} == {"ok"}
    assert plain is not None
    assert narrow is not None
    assert narrow.blocks >= 1.95 * plain.blocks
    assert (plain.kv_gain, narrow.kv_gain, narrow.kv_dtype) == (1.0, 2.0, "fp8")
    assert narrow.block_bytes * 2 == plain.block_bytes


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "size"),
    [
        ("float32", "auto", 4),
        ("bfloat16", "auto", 2),
        ("float32", "bfloat16", 2),
        ("bfloat16", "fp8", 1),
        ("bfloat16", "fp8_e5m2", 1),
        ("bfloat16", "int8_per_token_head", None),  # has scales beside its numbers
        ("bfloat16", "nvfp4", None),  # two numbers share a byte
    ],
)
def test_a_placement_counts_the_bytes_of_the_cache(
    dtype: str, cache_dtype: str, size: int | None
) -> None:
    import torch

    fields = {**COMMON, "model_type": "qwen3_moe", **EXPERTS}
    config: Any = SimpleNamespace(
        parallel_config=SimpleNamespace(
            tensor_parallel_size=2, data_parallel_size=1, pipeline_parallel_size=1,
            enable_expert_parallel=False, decode_context_parallel_size=1,
        ),
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(to_dict=lambda: fields), dtype=getattr(torch, dtype)
        ),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
    )  # fmt: skip
    faults, placement = look_at_placement(config)
    assert faults == []
    assert (None if placement is None else placement.kv_number_bytes) == size


def test_gpus_of_another_machine(check: Callable[..., Look], tiny: str) -> None:
    found, memory = check(tiny, (), Place(10 * GIB, 4 * GIB, elsewhere=True))
    assert [finding.level for finding in found] == ["ok", "ok"]
    assert memory is not None
    assert memory.block_size == 16
    assert "estimated: 4 GiB kept" in memory.kv_source
    assert memory.blocks == memory.kv_bytes // memory.block_bytes
    assert 4.9 * GIB < memory.kv_bytes < 5.3 * GIB, "vLLM takes 0.9 or a little more of a GPU"
    small, _ = check(tiny, (), Place(4 * GIB, 4 * GIB, elsewhere=True))
    assert "leave no room" in small[-1].text


def test_what_vllm_refuses_is_told(check: Callable[..., Look], tiny: str) -> None:
    other = '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}'
    for words, symptom in (
        (["-tp=3"], "must be divisible by tensor parallel size"),
        (["--kv-transfer-config", other], "NixlConnector: kv_role is 'kv_both'; set it to"),
        (["--kv-offloading-size=1", "--kv-offloading-backend=lmcache"], "set it to 'native'"),
        (["--pipeline-parallel-size=2"], "pipeline_parallel_size is 2"),
        (["--no-such-option"], "--no-such-option"),
        (["--num-gpu-blocks-override=8"], "KV cache"),
    ):
        found, _ = check(tiny, (*BLOCKS, *words))
        assert any(f.level == "fail" and symptom in f.text for f in found), (words, found)


def test_the_command(other_process: ProcessPoolExecutor, tmp_path: Path) -> None:
    """A Ray Serve file, as a user would have it checked, without Ray."""
    document = yaml.safe_load((ROOT / "configs" / "cluster.yaml").read_text())
    document["http_options"]["port"] = 18437
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(document))
    status, output = other_process.submit(command, ["check", str(file), "--json"]).result()
    report = json.loads(output)
    assert {f["section"] for f in report["findings"]} >= {"versions", "configuration", "model"}
    (policy,) = [f["text"] for f in report["findings"] if f["text"].startswith("policy")]
    assert policy.startswith("policy compaction (auto): it suits "), "its probe is installed"
    assert report["memory"]["blocks"] == 1456, "a block of 32 tokens has 720 KiB, the cache 1 GiB"
    shared, plain = report["capacity"]["shared"], report["capacity"]["plain"]
    assert shared["at_full_length"] > plain["at_full_length"]
    assert status == (0 if report["works"] else 1)
    too_long = ["check", str(file), "--prompt", "4000", "--output", "97"]
    assert other_process.submit(command, too_long).result()[0] == 1


def test_the_command_for_a_cluster_of_agents(
    other_process: ProcessPoolExecutor, tmp_path: Path
) -> None:
    roles = write_roles(tmp_path)
    document = yaml.safe_load((ROOT / "configs" / "agents.yaml").read_text())
    document["http_options"]["port"] = 18437
    args = document["applications"][0]["args"]
    args["model"], args["engine"]["dtype"] = str(roles.base), "float32"
    agents = args["memshare"]["agents"]
    agents["adapters"] = {name: str(roles.apart[name]) for name in agents["adapters"]}
    file = tmp_path / "agents.yaml"
    file.write_text(yaml.safe_dump(document))
    _, output = other_process.submit(command, ["check", str(file), "--json"]).result()
    report = json.loads(output)
    assert report["memory"]["block_bytes"] == 2 * 2 * 32 * (64 + 64) * 4
    texts = {f["section"]: f["text"] for f in report["findings"] if f["level"] == "ok"}
    assert "act, plan, reflect share one cache, scheme stacked" in texts["configuration"]
    both = args | {"memshare": args["memshare"] | {"mode": "share", "policy": {"name": "twins"}}}
    file.write_text(
        yaml.safe_dump(document | {"applications": [document["applications"][0] | {"args": both}]})
    )
    status, output = other_process.submit(command, ["check", str(file), "--json"]).result()
    assert status == 1
    (failed,) = [f for f in json.loads(output)["findings"] if f["level"] == "fail"]
    assert "mode = 'share': with agents.scheme 'stacked' nothing can be reclaimed" in failed["text"]
    agents["scheme"] = "base_lr_shared"
    file.write_text(yaml.safe_dump(document))
    status, output = other_process.submit(command, ["check", str(file), "--json"]).result()
    assert status == 1
    (failed,) = [f for f in json.loads(output)["findings"] if f["level"] == "fail"]
    assert "its A matrix on v_proj differs from that of 'act'" in failed["text"]
