"""Adapters that share one cache, in an engine: what is refused, and whose request is whose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from memshare.agents.adapter import Adapter, adapters_by_name, digest_of
from memshare.agents.base import BaseModelFacts, facts_of, identity_of
from memshare.agents.family import Family, family_of
from memshare.agents.memory import HeadLayout, padded, widened
from memshare.agents.refusals import faults_of
from memshare.config import AgentsConfig, ConfigError
from memshare.core.interfaces import AskedAdapter, EngineRequest
from memshare.engine.adapter import vllm_adapter

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class RefusedAdapter(ValueError):  # noqa: N818 - reads as a finding in the log
    """A request wants an adapter that the engine was not started with. The text says what to do."""


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
    """Requests of a family's adapters find each other's blocks, and others' end with an error.

    vLLM's servers know their adapters and answer 404 themselves; this meets programs that make up a
    LoRA request. A worker would find the same fault in the middle of a step, and end the engine.

    Attributes:
        family: whose requests they are.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self._admitted: set[tuple[str, str]] = set()

    def hash_blocks(self) -> None:
        """Let the engine's core, which is about to be ready, hash blocks under the family's key."""
        vllm_adapter().hash_by_family(self.family.key, self.admit)

    def admit(self, asked: AskedAdapter) -> None:
        """Look at the adapter that a request wants. Reads its files when it is first asked for.

        Raises:
            RefusedAdapter: see there.
        """
        name = asked.lora_name
        if (name, asked.lora_path) in self._admitted:
            return
        member = self.family.member(name)
        if member is None:
            known = ", ".join(adapter.name for adapter in self.family.adapters)
            raise RefusedAdapter(
                f"adapter {name!r} is none of those that share a cache ({known}); ask for one of "
                "them, or add it to agents.adapters and restart the engine"
            )
        if not _holds(Path(asked.lora_path), member):
            raise RefusedAdapter(
                f"adapter {name!r} ({asked.lora_path}) is not what {member.folder} was when the "
                "engine started; ask for that folder, and if it has changed, restart the engine"
            )
        self._admitted.add((name, asked.lora_path))

    def follow(self, request: EngineRequest) -> None:
        """A request is about to wait for its turn: let vLLM know its adapter by the family's
        number.

        Servers count adapters anew with each load, and programs choose numbers as they like. vLLM
        goes by the number alone: two of one adapter would take two slots, and one of two adapters
        would be whichever came first.
        """
        vllm_adapter().number_adapter(request, self.family.number)


def _holds(folder: Path, member: Adapter) -> bool:
    try:
        return digest_of(folder.expanduser()) == member.digest
    except OSError:
        return False


def agent_faults(vllm_config: VllmConfig, config: AgentsConfig) -> Iterator[str]:
    """Why adapters cannot share in a set-up, each with the way out, before the model loads."""
    if not config.shares:
        return
    yield from _option_faults(vllm_config, config)
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


def head_layout(vllm_config: VllmConfig, family: Family, on_gpu: bool) -> HeadLayout | None:
    """How wide a family's heads are in the cache; None if no attention takes such heads.

    Args:
        vllm_config: of an engine, which need not run here.
        family: whose columns it has.
        on_gpu: where it is to run.
    """
    return layout_of(_base(vllm_config), family.width, on_gpu)


def layout_of(base: BaseModelFacts, width: int, on_gpu: bool) -> HeadLayout | None:
    """The same for a model's facts and a number of columns."""
    if on_gpu or not width:
        return widened(base, width)
    return padded(base, width, vllm_adapter().padded_head_sizes())


def _base(vllm_config: VllmConfig) -> BaseModelFacts:
    model = vllm_config.model_config
    return facts_of(model.model, model.hf_text_config)


def _option_faults(vllm_config: VllmConfig, config: AgentsConfig) -> Iterator[str]:
    device, cache = vllm_config.device_config.device_type, vllm_config.cache_config
    if device not in ("cpu", "cuda"):
        yield f"the device is {device}; adapters share caches on CPUs and NVIDIA GPUs alone"
    if not cache.enable_prefix_caching:
        yield "enable_prefix_caching is off, by which adapters find blocks; leave it on"
    if not config.takes_cache_type(cache.cache_dtype):
        yield (
            f"kv_cache_dtype is {cache.cache_dtype!r}: a cache has one scale for values, and with "
            f"agents.scheme {config.scheme!r} low-rank columns, which are another size, beside "
            "them; set it to 'auto', or agents.scheme to 'nonshared'"
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
