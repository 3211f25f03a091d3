"""Set-ups that MemShare refuses, with the reason and the way out, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from memshare.config import EngineFacts, MemShareConfig, Setup, load_config, registry
from memshare.core.interfaces import CacheGroup
from memshare.engine.adapter import vllm_adapter
from memshare.engine.agents import agent_faults
from memshare.engine.beside.children import own_transfer
from memshare.engine.beside.rules import beside_faults
from memshare.engine.messages import WorkerHandshake
from memshare.engine.speculation import speculation_faults
from memshare.engine.versions import check_vllm_version
from memshare.plug_in import CONNECTOR, MULTI_CONNECTOR, ROLE, WORKER_CLASS
from memshare.search.steps import DelimiterAutomaton, compile_delimiters
from memshare.search.vocabulary import token_bytes

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


class UnsupportedSetup(ValueError):  # noqa: N818 - reads as a finding in the log
    """This combination of options is not supported. The text names each option and the fix."""


def config_of(vllm_config: VllmConfig) -> MemShareConfig:
    """The configuration that ``kv_connector_extra_config``, environment and file amount to, with
    the policy that runs in this engine.

    Raises:
        ConfigError: a field is unknown or wrong.
    """
    config = _asked_for(vllm_config)
    if config.mode == "off":
        return config
    return config.model_copy(update={"policy": _settle(config, vllm_config).params})


def policy_choice(vllm_config: VllmConfig) -> registry.Choice:
    """Which policy runs in this engine, and why if the configuration leaves that open.

    Raises:
        ConfigError: a field is unknown or wrong.
    """
    return _settle(_asked_for(vllm_config), vllm_config)


def _settle(config: MemShareConfig, vllm_config: VllmConfig) -> registry.Choice:
    return registry.settle(Setup(config, engine_facts(vllm_config)))


def _asked_for(vllm_config: VllmConfig) -> MemShareConfig:
    ours = own_transfer(vllm_config.kv_transfer_config)
    return load_config(ours.kv_connector_extra_config if ours is not None else None)


def engine_facts(vllm_config: VllmConfig) -> EngineFacts:
    """What is known of the engine before it loads its model."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    changed = None
    if vllm_config.lora_config is not None:
        changed = "adapters change keys and values, and no probe knows them"
    elif model.hf_overrides:
        changed = "hf_overrides change the model that probes were trained for"
    return EngineFacts(
        model=model.model,
        has_tokenizer=not model.skip_tokenizer_init,
        layers=model.get_num_layers(parallel),
        heads=model.get_num_kv_heads(parallel),
        channels=model.get_head_size(),
        ranks=parallel.tensor_parallel_size,
        changed=changed,
        view_refusal=next(vllm_adapter().view_refusals(vllm_config), None),
    )


def check_before_load(vllm_config: VllmConfig) -> None:
    """Refuse what can be refused before the model is loaded.

    Raises:
        ConfigError: the configuration is wrong.
        UnsupportedSetup: the set-up is not supported.
        UnsupportedVersion: vLLM was not tested.
    """
    check_vllm_version()
    _raise(faults_before_load(vllm_config, config_of(vllm_config)))


def faults_before_load(vllm_config: VllmConfig, config: MemShareConfig) -> Iterator[str]:
    """What is not supported of what the configuration switches on, each with the way out."""
    if config.mode != "off":
        yield from setup_faults(vllm_config, config)
    elif config.agents.shares or config.experts.counts:
        yield from plug_in_faults(vllm_config, config)
    if config.agents.shares:
        yield from agent_faults(vllm_config, config.agents)
    if config.experts.counts:
        yield from vllm_adapter().expert_refusals(vllm_config)


def check_cache(
    kv_cache_config: KVCacheConfig, vllm_config: VllmConfig, config: MemShareConfig
) -> None:
    """Refuse KV caches that cannot be shared block by block, or not with these options.

    Raises:
        UnsupportedSetup: see there.
    """
    _raise(cache_faults(kv_cache_config, vllm_config, config))


def check_workers(
    handshakes: Sequence[WorkerHandshake],
    world_size: int,
    family: str | None = None,
    policy: str | None = None,
) -> None:
    """Refuse to start unless every rank's table can be edited, and its policy and its adapters are
    the scheduler's.

    Args:
        handshakes: what the ranks report.
        world_size: how many there are.
        family: key of the adapters that share a cache; None if none do.
        policy: that the scheduler runs; None if nothing is reclaimed.

    Raises:
        UnsupportedSetup: a rank did not answer, runs another worker class or policy, or has read
            other adapters.
    """
    hooked = sum(h.hooked for h in handshakes)
    if hooked != world_size:
        _raise(
            [
                f"{hooked} of {world_size} workers run MemShare's class; "
                f"add --worker-cls {WORKER_CLASS}"
            ]
        )
    if any(h.family != family for h in handshakes):
        _raise(["adapters were changed while the engine started; start it again"])
    others = sorted({str(h.policy) for h in handshakes if h.policy != policy})
    if others:
        _raise(
            [
                f"policy.name is {policy!r} in the scheduler, and {', '.join(others)} on workers: "
                "'auto' found a probe in one place and not in another; have the same probes on all "
                "nodes, or name the policy"
            ]
        )


def edits_view(config: MemShareConfig) -> bool:
    """Whether attention must read its tables through a view: only where tokens may be dropped."""
    if config.mode != "share":
        return False
    return any(mechanism.edits_view for mechanism in registry.mechanisms_of(config).values())


def check_layers(vllm_config: VllmConfig, config: MemShareConfig) -> None:
    """Refuse a model whose attention cannot do without tokens in between, or cannot choose pages,
    if it has to; once it is loaded.

    Raises:
        UnsupportedSetup: see there.
    """
    _raise(_attention_faults(vllm_config, config))


def check_builders(runner: object, group: CacheGroup) -> None:
    """Refuse to start unless all attention that reads an edited table does so through the view.

    Raises:
        UnsupportedSetup: see there.
    """
    _raise(vllm_adapter().builder_refusals(runner, group))


def check_selector(
    vllm_config: VllmConfig, runner: object, group: CacheGroup, caches: Mapping[str, Tensor]
) -> None:
    """Refuse to start unless all attention that reads the group can choose pages of its caches.

    Raises:
        UnsupportedSetup: see there.
    """
    _raise(vllm_adapter().selector_refusals(vllm_config, runner, group, caches))


def _attention_faults(vllm_config: VllmConfig, config: MemShareConfig) -> Iterator[str]:
    if edits_view(config):
        yield from vllm_adapter().view_refusals(vllm_config)
    if config.selection.on:
        yield from vllm_adapter().selection_refusals(vllm_config, config.selection)


def compile_steps(vllm_config: VllmConfig, config: MemShareConfig) -> DelimiterAutomaton:
    """Compile the step delimiters against the model's tokenizer.

    Raises:
        ValueError: no tokens can form a delimiter.
    """
    tokenizer = vllm_adapter().tokenizer(vllm_config)
    return compile_delimiters(config.steps.delimiters, token_bytes(tokenizer))


def _raise(faults: Iterator[str] | list[str]) -> None:
    faults = list(faults)
    if faults:
        raise UnsupportedSetup(
            "MemShare cannot run here:\n" + "\n".join(f"  - {f}" for f in faults)
        )


def plug_in_faults(vllm_config: VllmConfig, config: MemShareConfig) -> Iterator[str]:
    """What MemShare needs, whatever it does."""
    transfer = vllm_config.kv_transfer_config
    ours = own_transfer(transfer)
    parallel = vllm_config.parallel_config
    model = vllm_config.model_config
    if ours is None or ours.kv_connector != CONNECTOR:
        yield (
            f"kv_connector is {transfer.kv_connector if transfer else None!r}; set it to "
            f"{CONNECTOR!r} in --kv-transfer-config, or to {MULTI_CONNECTOR!r} with that first "
            "among its connectors"
        )
    elif ours.kv_role != ROLE:
        yield f'kv_role is {ours.kv_role!r}; set "kv_role": "{ROLE}"'
    yield from beside_faults(vllm_config, config)
    if parallel.worker_cls != WORKER_CLASS:
        yield f"worker_cls is {parallel.worker_cls!r}; add --worker-cls {WORKER_CLASS}"
    if parallel.pipeline_parallel_size > 1:
        yield (
            f"pipeline_parallel_size is {parallel.pipeline_parallel_size}; set it to 1 and use "
            "tensor_parallel_size"
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, name)
        if size > 1:
            yield f"{name} is {size}; set it to 1"
    if model.is_encoder_decoder:
        yield f"{model.model} is an encoder-decoder model; choose a decoder-only model"
    if model.runner_type != "generate":
        yield f"{model.model} runs as {model.runner_type!r}; MemShare serves generation only"


def setup_faults(vllm_config: VllmConfig, config: MemShareConfig) -> Iterator[str]:
    """What is not supported in a set-up, and the way out, as far as its options tell."""
    yield from plug_in_faults(vllm_config, config)
    for mechanism in registry.mechanisms_of(config).values():
        yield from mechanism.refusals(Setup(config, engine_facts(vllm_config)))
    yield from _attention_faults(vllm_config, config)
    yield from speculation_faults(vllm_config)
    cache_type = vllm_config.cache_config.cache_dtype
    if cache_type not in ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"):
        yield f"kv_cache_dtype is {cache_type!r}; choose 'auto' or a per-tensor fp8 type"


def cache_faults(
    kv_cache_config: KVCacheConfig, vllm_config: VllmConfig, config: MemShareConfig
) -> Iterator[str]:
    """What is not supported in a model's KV cache, and the way out."""
    faults = list(vllm_adapter().cache_refusals(kv_cache_config))
    yield from faults
    if faults or len(kv_cache_config.kv_cache_groups) == 1:
        return
    if vllm_config.speculative_config is not None:
        yield (
            "speculative decoding has not been run with a hybrid model, whose draft's layers join "
            "another group; leave speculative_config out"
        )
    if config.selection.on:
        yield "selection: pages have not been chosen in a hybrid model; leave budget and pages out"


def hybrid_note(kv_cache_config: KVCacheConfig) -> str | None:
    """What is said at start of a hybrid model that is not refused; None of another model."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) == 1:
        return None
    group = vllm_adapter().editable_group(kv_cache_config)
    layers = sum(len(each.layer_names) for each in groups)
    return (
        f"hybrid model: {len(group.layers)} of {layers} layers have full attention, and only their "
        f"blocks are given up, {group.block_size} tokens at a time"
    )
