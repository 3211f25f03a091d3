"""Which rank of the checked set-up holds what (:mod:`memshare.moe.placement`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from cluster.check.report import CheckFinding
from memshare.config import ConfigError
from memshare.moe.placement.model_config import shape_of
from memshare.moe.placement.parallelism import Parallelism, refusals
from memshare.moe.placement.ranks import Placement, place

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_PACKED = ("int4", "int8", "nvfp4", "turboquant", "ultraquant")
"""Beginnings of vLLM's names of KV dtypes whose numbers share bytes, or have scales beside them."""


def look_at_placement(config: VllmConfig) -> tuple[list[CheckFinding], Placement | None]:
    """Place the model, where there is something to say: experts, or several ranks.

    Args:
        config: vLLM's, of the set-up.

    Returns:
        What is wrong, and the placement. None of a family that is not known there, and where the
        layers are divided among stages, or a KV dtype packs its numbers.
    """
    from vllm.utils.torch_utils import get_kv_cache_torch_dtype

    parallel, cache_dtype = config.parallel_config, str(config.cache_config.cache_dtype)
    packed = cache_dtype.startswith(_PACKED) or cache_dtype.endswith("_per_token_head")
    if parallel.pipeline_parallel_size > 1 or packed:
        return [], None
    return place_checked(
        config.model_config.hf_text_config.to_dict(),
        Parallelism(
            tensor_parallel_size=parallel.tensor_parallel_size,
            data_parallel_size=parallel.data_parallel_size,
            enable_expert_parallel=parallel.enable_expert_parallel,
            decode_context_parallel_size=parallel.decode_context_parallel_size,
        ),
        get_kv_cache_torch_dtype(cache_dtype, config.model_config.dtype).itemsize,
    )


def place_checked(
    fields: Mapping[str, object], parallelism: Parallelism, kv_number_bytes: int
) -> tuple[list[CheckFinding], Placement | None]:
    """The same, from a model's configuration and the sizes of the groups."""
    try:
        shape = shape_of(fields)
    except ConfigError:
        return [], None  # the rest of the check knows more models
    if shape.experts is None:
        # vLLM runs data-parallel replicas of a dense model each for itself.
        parallelism = parallelism.model_copy(update={"data_parallel_size": 1})
    if shape.experts is None and parallelism.ranks == 1:
        return [], None
    if found := list(_findings(refusals(shape, parallelism))):
        return found, None
    return [], place(shape, parallelism, kv_number_bytes)


def _findings(faults: Iterator[str]) -> Iterator[CheckFinding]:
    return (CheckFinding("model", "fail", fault) for fault in faults)
