"""Adapters that share one cache, in an engine: what is refused, and whose request is whose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from memshare.agents.adapter import adapters_by_name
from memshare.agents.base import BaseModelFacts, facts_of, identity_of
from memshare.agents.family import Family, family_of
from memshare.agents.refusals import faults_of
from memshare.config import AgentsConfig, ConfigError
from memshare.engine.adapter import vllm_adapter

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request


class UnknownAdapter(ValueError):  # noqa: N818 - reads as a finding in the log
    """A request wants an adapter that the engine was not started with."""


def load_family(vllm_config: VllmConfig, config: AgentsConfig) -> Family | None:
    """Read the adapters that share; None if none do.

    Raises:
        ConfigError: one cannot be read.
    """
    if not config.shares:
        return None
    adapters = adapters_by_name(config.adapters)
    return family_of(config, adapters, identity_of(vllm_config.model_config.model))


class FamilyRequests:
    """The scheduler's part: requests of a family's adapters find each other's blocks."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self._join = vllm_adapter().join_family

    def follow(self, request: Request) -> None:
        """Take a request that has just arrived. One of the base model stays by itself.

        Raises:
            UnknownAdapter: see there. vLLM's server knows its adapters and answers 404 itself; this
                meets programs that make up a LoRA request.
        """
        lora = request.lora_request
        if lora is None:
            return
        if self.family.member(lora.lora_name) is None:
            known = ", ".join(adapter.name for adapter in self.family.adapters)
            raise UnknownAdapter(
                f"request {request.request_id} wants the adapter {lora.lora_name!r}, which is none "
                f"of those that share a cache ({known}); add it to agents.adapters"
            )
        self._join(request, self.family.key)


def agent_faults(vllm_config: VllmConfig, config: AgentsConfig) -> Iterator[str]:
    """Why adapters cannot share in a set-up, each with the way out, before the model loads."""
    if not config.shares:
        return
    yield from _option_faults(vllm_config)
    try:
        adapters = adapters_by_name(config.adapters)
    except ConfigError as error:
        yield str(error)
        return
    yield from faults_of(adapters, config, _base(vllm_config))
    yield from _slot_faults(vllm_config, len(adapters), max(a.rank for a in adapters))
    family = family_of(config, adapters, "")
    if family is not None and family.width:
        yield from vllm_adapter().value_refusals(vllm_config, family.width)


def _base(vllm_config: VllmConfig) -> BaseModelFacts:
    model = vllm_config.model_config
    return facts_of(model.model, model.hf_text_config)


def _option_faults(vllm_config: VllmConfig) -> Iterator[str]:
    device, cache = vllm_config.device_config.device_type, vllm_config.cache_config
    if device not in ("cpu", "cuda"):
        yield f"the device is {device}; adapters share caches on CPUs and NVIDIA GPUs alone"
    if not cache.enable_prefix_caching:
        yield "enable_prefix_caching is off, by which adapters find blocks; leave it on"
    if cache.cache_dtype not in ("auto", "float16", "bfloat16"):
        yield (
            f"kv_cache_dtype is {cache.cache_dtype!r}: values and low-rank columns would need "
            "scales of their own; set it to 'auto'"
        )
    if vllm_config.speculative_config is not None:
        yield "speculative decoding has not been run with adapters that share; leave it off"


def _slot_faults(vllm_config: VllmConfig, adapters: int, rank: int) -> Iterator[str]:
    lora = vllm_config.lora_config
    if lora is None:
        yield "enable_lora is off; add --enable-lora"
        return
    # On CPUs vLLM computes requests of the base model with the last slot, so that it must be empty.
    on_cpu = vllm_config.device_config.device_type == "cpu"
    wanted = adapters + on_cpu
    if lora.max_loras < wanted:
        why = f"{adapters} adapters" + (" and an empty slot for the base model" if on_cpu else "")
        yield f"max_loras is {lora.max_loras}, too few for {why}; set it to {wanted}"
    if lora.max_lora_rank < rank:
        yield f"max_lora_rank is {lora.max_lora_rank}, and an adapter has {rank}; raise it"
    if lora.fully_sharded_loras:
        yield "fully_sharded_loras cuts the A matrices, which every rank needs whole; leave it off"
    if lora.target_modules is not None:
        yield f"lora target_modules is {lora.target_modules}; leave it out"
    if lora.lora_dtype not in ("auto", vllm_config.model_config.dtype):
        yield f"lora_dtype is {lora.lora_dtype}; leave it out, so that it is the model's"
