"""The model against what MemShare refuses, and the memory that it leaves for KV blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import psutil
from pydantic import ValidationError

from cluster.check.progress import Say
from cluster.check.report import GIB, CheckFinding, Memory
from cluster.check.setup import CheckedSetup
from memshare.config import ConfigError, MemShareConfig

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from memshare.agents.memory import HeadLayout
    from memshare.core.footprint import SideGroup
    from memshare.engine.adapter import ModelMemory

SECTION = "model"
GPU_BLOCK = 16  # tokens: vLLM's block size on GPUs, where nothing else is asked for
PROGRAM_BYTES = 1 * GIB  # of a worker on a CPU, measured with SmolLM2 and rounded up


@dataclass(frozen=True, slots=True)
class Place:
    """Where workers keep weights and KV cache.

    Attributes:
        gpu_bytes: memory of one GPU; None on CPUs.
        reserve_bytes: of a GPU, for activations and CUDA graphs: what vLLM only knows after it has
            tried.
        elsewhere: whether this machine is not the one.
    """

    gpu_bytes: int | None
    reserve_bytes: int
    elsewhere: bool


@dataclass(slots=True)
class ModelCheck:
    """Looks at one set-up. ``findings`` first; then the rest is known, as far as it went.

    Attributes:
        setup: what is looked at.
        place: where it is to run.
        say: takes what is looked at.
        memory: None if it could not be found out.
        config: vLLM's configuration; None if vLLM refused it.
        memshare: MemShare's, with the policy that will run once ``config`` is known.
    """

    setup: CheckedSetup
    place: Place
    say: Say
    memory: Memory | None = None
    config: VllmConfig | None = None
    memshare: MemShareConfig = field(init=False)

    def __post_init__(self) -> None:
        self.memshare = self.setup.memshare

    def findings(self) -> Iterator[CheckFinding]:
        """Everything there is to say, from the options to the number of blocks."""
        if self.setup.hub is not None:
            yield self.setup.hub
            if self.setup.hub.level == "fail":
                return
        self.say("the model's configuration (loads vLLM)")
        from memshare.engine.adapter import UNBOUNDED, vllm_adapter
        from memshare.engine.compatibility import (
            cache_faults,
            config_of,
            faults_before_load,
            hybrid_note,
            policy_choice,
        )

        try:
            config = self.config = vllm_config(self.setup, self.place)
        except Exception as error:
            yield CheckFinding(SECTION, "fail", f"vLLM refuses this: {_first_lines(error)}")
            return
        if config.kv_transfer_config is not None:
            self.memshare = config_of(config)
        memshare = self.memshare
        faults = list(faults_before_load(config, memshare))
        yield from (CheckFinding(SECTION, "fail", fault) for fault in faults)
        if config.model_config.is_encoder_decoder or config.model_config.runner_type != "generate":
            return  # named above: has no KV cache of the kind that is counted below
        self.say("the model's layers, without weights")
        try:
            heads = None if faults else _heads(config, memshare, self.place)
            model_memory = vllm_adapter().read_model_memory(config, heads)
            cache = vllm_adapter().plan_cache(config, model_memory, UNBOUNDED)
        except Exception as error:
            yield CheckFinding(
                SECTION, "fail", f"vLLM cannot build this model: {_first_lines(error)}"
            )
            return
        if not self.place.elsewhere:
            unknown = list(_kv_dtype_faults(config))
            faults += unknown
            yield from (CheckFinding(SECTION, "fail", fault) for fault in unknown)
        if memshare.mode != "off":
            refused = list(cache_faults(cache, config, memshare))
            faults += refused
            yield from (CheckFinding(SECTION, "fail", fault) for fault in refused)
            yield from _delimiters(config, memshare)
        if not faults:
            name = config.model_config.architectures[0]
            note = hybrid_note(cache) if memshare.mode != "off" else None
            layers = f"{name}, {len(model_memory.layers)} layers, {note or 'one KV cache'}"
            yield CheckFinding(SECTION, "ok", layers)
            if memshare.mode != "off" and (reason := policy_choice(config).reason):
                policy = memshare.policy.name
                yield CheckFinding(SECTION, "ok", f"policy {policy} (auto): {reason}")
        yield from self._memory(memshare, model_memory)

    def _memory(
        self, memshare: MemShareConfig, model_memory: ModelMemory
    ) -> Iterator[CheckFinding]:
        from memshare.engine.adapter import vllm_adapter

        assert self.config is not None
        fixed = model_memory.weight_bytes + model_memory.lora_bytes
        size, source = kv_memory(self.config, fixed, self.place)
        if size <= 0:
            text = f"weights leave no room for a KV cache ({source})"
            fix = "raise tensor_parallel_size, or take a smaller model or larger GPUs"
            yield CheckFinding(SECTION, "fail", text, fix)
            return
        try:
            cache = vllm_adapter().plan_cache(self.config, model_memory, size)
        except ValueError as error:
            yield CheckFinding(SECTION, "fail", _first_lines(error))
            return
        self.memory = _memory_of(self.config, memshare, model_memory, cache, size, source)


def vllm_config(setup: CheckedSetup, place: Place) -> VllmConfig:
    """vLLM's configuration of a set-up, MemShare's connector included.

    Raises:
        ConfigError: vLLM's parser refuses an option.
        UserError: a connector cannot stand beside MemShare's.
        Exception: whatever vLLM raises for a model or an option that it does not accept.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    from cluster.engine.options import parse_words
    from memshare.engine.beside.options import take_beside
    from memshare.plug_in import CONNECTOR, plug_in

    options = parse_words(setup.engine)
    memshare = setup.memshare
    wanted = memshare.mode != "off" or memshare.agents.adapters or memshare.experts.counts
    given = options.kv_transfer_config
    if wanted and (given is None or given.kv_connector != CONNECTOR):
        beside = take_beside(options)
        for name, value in plug_in(memshare.model_dump(mode="json"), beside).items():
            setattr(options, name, value)
    if place.elsewhere and options.block_size is None:
        options.block_size = GPU_BLOCK
    engine_args: AsyncEngineArgs = AsyncEngineArgs.from_cli_args(options)
    config = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    if place.elsewhere:  # what the environment here says about a CPU's cache is not for GPUs
        config.cache_config.kv_cache_memory_bytes = options.kv_cache_memory_bytes
    return config


def _kv_dtype_faults(config: VllmConfig) -> Iterator[str]:
    """Why attention on this machine cannot read the KV dtype: vLLM does not look at it on CPUs."""
    from vllm.v1.kv_cache_interface import is_quantized_kv_cache

    dtype = config.cache_config.cache_dtype
    if not is_quantized_kv_cache(dtype):
        return
    layers = config.compilation_config.static_forward_context.values()
    backends = {backend for layer in layers if (backend := getattr(layer, "attn_backend", None))}
    for backend in sorted(backends, key=lambda backend: str(backend.get_name())):
        if not backend.supports_kv_cache_dtype(dtype):
            name, known = backend.get_name(), ", ".join(backend.supported_kv_cache_dtypes)
            yield f"kv_cache_dtype is {dtype!r}; attention here ({name}) takes {known}"


def _heads(config: VllmConfig, memshare: MemShareConfig, place: Place) -> HeadLayout | None:
    """Widths of cached heads where adapters share; None where they do not."""
    from memshare.engine.agents import head_layout, load_family

    family = load_family(config, memshare.agents)
    return None if family is None else head_layout(config, family, place.gpu_bytes is not None)


def kv_memory(config: VllmConfig, fixed_bytes: int, place: Place) -> tuple[int, str]:
    """Bytes that a worker has for its KV cache, and where the number comes from.

    Args:
        config: of the engine.
        fixed_bytes: what weights and LoRA slots take of a worker's memory.
        place: where the worker is.
    """
    cache = config.cache_config
    if cache.num_gpu_blocks_override is not None:
        from memshare.engine.adapter import UNBOUNDED

        return UNBOUNDED, "as num_gpu_blocks_override wants"
    if cache.kv_cache_memory_bytes is not None:
        return cache.kv_cache_memory_bytes, "as set"
    share = cache.gpu_memory_utilization
    if place.gpu_bytes is not None:
        left = int(place.gpu_bytes * share) - fixed_bytes - place.reserve_bytes
        how = f"estimated: {place.reserve_bytes / GIB:g} GiB kept for activations and CUDA graphs"
        return left, how
    left = int(psutil.virtual_memory().total * share) - fixed_bytes - PROGRAM_BYTES
    return left, f"estimated: {share:.0%} of this machine's memory, less weights and programs"


def _memory_of(
    config: VllmConfig,
    memshare: MemShareConfig,
    model_memory: ModelMemory,
    cache: KVCacheConfig,
    size: int,
    source: str,
) -> Memory:
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    # A block belongs to one group at a time, and has room for all layers of any.
    block_bytes = max(
        sum(model_memory.layers[name].page_size_bytes for name in group.layer_names)
        for group in cache.kv_cache_groups
    )
    return Memory(
        weight_bytes=model_memory.weight_bytes,
        lora_bytes=model_memory.lora_bytes,
        kv_bytes=min(size, cache.num_blocks * block_bytes),
        kv_source=source,
        block_size=_block_size(cache),
        block_bytes=block_bytes,
        blocks=cache.num_blocks,
        vllm_concurrency=get_max_concurrency_for_kv_cache_config(config, cache),
        bounds_bytes=_bounds_bytes(memshare, cache, block_bytes),
        kv_dtype=str(config.cache_config.cache_dtype),
        kv_gain=_kv_gain(config, model_memory),
        beside=_beside(cache),
    )


def _bounds_bytes(memshare: MemShareConfig, cache: KVCacheConfig, block_bytes: int) -> int:
    """What page selection keeps beside the cache: the bytes of one slot of each page and layer,
    where a page is a block (a backend that splits blocks has more pages), and a copy by request."""
    if not memshare.selection.on:
        return 0
    layers = sum(len(group.layer_names) for group in cache.kv_cache_groups)
    choosing = max(0, layers - memshare.selection.exempt_layers)
    return 2 * cache.num_blocks * block_bytes * choosing // (layers * _block_size(cache))


def _kv_gain(config: VllmConfig, model_memory: ModelMemory) -> float:
    """How many times the bytes the layers' caches would take in the model's own dtype."""
    from vllm.v1.kv_cache_interface import AttentionSpec, KVQuantMode, MLAAttentionSpec

    dtype = cast("torch.dtype", config.model_config.dtype)
    ours = plain = 0
    for spec in model_memory.layers.values():
        own = spec
        # A latent cache says its dtype otherwise, and state caches have none that could be chosen.
        if isinstance(spec, AttentionSpec) and not isinstance(spec, MLAAttentionSpec):
            own = replace(
                spec, dtype=dtype, kv_quant_mode=KVQuantMode.NONE, state_content_bytes=None,
                num_head_slots=None, page_size_padded=None,
            )  # fmt: skip
        ours += spec.page_size_bytes
        plain += own.page_size_bytes
    return plain / ours


def _block_size(cache: KVCacheConfig) -> int:
    """Tokens of a block of the group that mechanisms may edit; without one, the most of any."""
    from memshare.engine.adapter import vllm_adapter

    try:
        return vllm_adapter().editable_group(cache).block_size
    except ValueError:
        return max(group.kv_cache_spec.block_size for group in cache.kv_cache_groups)


def _beside(cache: KVCacheConfig) -> tuple[SideGroup, ...]:
    """The other groups of a cache that mechanisms can edit."""
    from memshare.engine.adapter import vllm_adapter

    try:
        return tuple(vllm_adapter().editable_group(cache).beside)
    except ValueError:
        return ()


def _delimiters(config: VllmConfig, memshare: MemShareConfig) -> Iterator[CheckFinding]:
    from memshare.engine.compatibility import compile_steps

    if not memshare.uses_stages or config.model_config.skip_tokenizer_init:
        return
    try:
        compile_steps(config, memshare)
    except (ValueError, OSError) as error:
        yield CheckFinding(SECTION, "fail", f"steps.delimiters: {_first_lines(error)}")


def _first_lines(error: Exception, lines: int = 6) -> str:
    """What matters of an error: transformers' go on for pages, pydantic's show every value."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, ValidationError):
        return "; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())
    text = [line for line in str(error).splitlines() if line.strip()]
    return "\n".join(text[:lines]) or type(error).__name__
