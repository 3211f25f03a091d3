"""What GetModelInfo and GetStats answer."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import prometheus_client

from cluster.config import ClusterArgs
from memshare import __version__
from memshare.proto import memshare_pb2 as pb
from memshare.telemetry.metrics import METRICS

if TYPE_CHECKING:
    from cluster.engine.generation import Generation

_OURS = {
    metric.prometheus: metric.name
    for metric in METRICS
    if metric.home == "engine" and metric.kind != "histogram"
}


def model_info(args: ClusterArgs, generation: Generation, model: str) -> pb.GetModelInfoResponse:
    """Describe a model and how it is served.

    Args:
        args: the application's arguments.
        generation: runs requests in the replica's engine.
        model: name that was asked for.
    """
    import vllm

    config = generation.vllm_config
    return pb.GetModelInfoResponse(
        model=model,
        adapters=generation.adapters,
        max_model_len=config.model_config.max_model_len,
        vocab_size=config.model_config.get_vocab_size(),
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        tensor_parallel_size=config.parallel_config.tensor_parallel_size,
        block_size=config.cache_config.block_size,
        kv_blocks=config.cache_config.num_gpu_blocks or 0,
        memshare_mode=args.memshare.mode,
        memshare_policy=generation.memshare_policy,
        memshare_version=__version__,
        vllm_version=vllm.__version__,
    )


def stats(
    replica_id: str,
    registry: prometheus_client.CollectorRegistry = prometheus_client.REGISTRY,
) -> pb.GetStatsResponse:
    """What a replica is doing and has done: the series of its ``/metrics``, labels added up.

    Args:
        replica_id: Ray Serve's.
        registry: the one that ``/metrics`` shows.
    """
    values: defaultdict[str, float] = defaultdict(float)
    for family in registry.collect():
        if family.name.startswith("vllm:") and family.type != "histogram":
            for sample in family.samples:
                values[sample.name] += sample.value
    return pb.GetStatsResponse(
        replica_id=replica_id,
        requests_running=int(values["vllm:num_requests_running"]),
        requests_waiting=int(values["vllm:num_requests_waiting"]),
        kv_cache_usage=values["vllm:kv_cache_usage_perc"],
        prompt_tokens=int(values["vllm:prompt_tokens_total"]),
        generation_tokens=int(values["vllm:generation_tokens_total"]),
        preemptions=int(values["vllm:num_preemptions_total"]),
        memshare={name: values[full] for full, name in _OURS.items() if full in values},
    )
