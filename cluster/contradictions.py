"""Arguments that are good one by one and do not go together, or would have no effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from memshare.config import ConfigError

if TYPE_CHECKING:
    from cluster.config import ClusterArgs


def refuse_contradictions(cluster: ClusterArgs) -> None:
    """Refuse them.

    Raises:
        ConfigError: names each field, its value and the fix.
    """
    found = [
        *_executor(cluster), *_gpus(cluster), *_nodes(cluster), *_routing(cluster),
        *_agents(cluster), *_guard(cluster),
    ]  # fmt: skip
    if cluster.memshare.event_log is not None and cluster.most_replicas > 1:
        found.append(
            f"memshare.event_log = {str(cluster.memshare.event_log)!r}: {cluster.most_replicas} "
            "replicas would write one file, over each other\n"
            "    fix: leave it out, or have one replica"
        )
    if found:
        raise ConfigError("\n".join(found))


def _executor(cluster: ClusterArgs) -> Iterator[str]:
    """vLLM places workers by Ray on GPUs only."""
    if cluster.engine.distributed_executor_backend == "ray" and not cluster.replica.gpus:
        yield (
            "engine.distributed_executor_backend = 'ray': vLLM has no Ray executor for CPUs\n"
            "    fix: set it to 'mp', or set replica.gpus"
        )


def _gpus(cluster: ClusterArgs) -> Iterator[str]:
    """Workers that are the replica's own processes need their GPUs reserved by the replica; those
    that are Ray's actors reserve one each, whatever the replica would reserve."""
    gpus, ranks = cluster.replica.gpus, cluster.engine.tensor_parallel_size
    if cluster.engine.distributed_executor_backend == "ray":
        if gpus and gpus != ranks:
            yield (
                f"replica.gpus = {gpus:g}: has no effect, as under the executor 'ray' every worker "
                f"reserves one GPU: {ranks} in all (engine.tensor_parallel_size)\n"
                f"    fix: set replica.gpus to {ranks}, or engine.distributed_executor_backend "
                "to 'mp'"
            )
    elif 0 < gpus < ranks:
        yield (
            f"replica.gpus = {gpus:g}: fewer than engine.tensor_parallel_size ({ranks})\n"
            f"    fix: set replica.gpus to {ranks}, or engine.tensor_parallel_size to {gpus:g}"
        )
    if cluster.replica.pin_cpus and gpus:
        yield (
            "replica.pin_cpus = True: has no effect on workers that run on GPUs\n"
            "    fix: leave it out, or leave out replica.gpus"
        )


def _nodes(cluster: ClusterArgs) -> Iterator[str]:
    """Only Ray places the workers of one engine on several nodes."""
    nodes, ranks = cluster.replica.nodes, cluster.engine.tensor_parallel_size
    if nodes == 1:
        return
    if cluster.engine.distributed_executor_backend != "ray":
        yield (
            f"replica.nodes = {nodes}: the workers of one process can't be on several nodes\n"
            "    fix: set engine.distributed_executor_backend to 'ray', or replica.nodes to 1"
        )
    elif nodes > ranks:
        yield (
            f"replica.nodes = {nodes}: more nodes than workers "
            f"(engine.tensor_parallel_size = {ranks})\n"
            f"    fix: set replica.nodes to {ranks} or less"
        )


def _routing(cluster: ClusterArgs) -> Iterator[str]:
    """What was set of the routing must be looked at by the router."""
    routing = cluster.routing
    idle: dict[str, tuple[str, str]] = {}
    if routing.load == "requests":  # no replica is asked for its memory
        cause = ("routing.load = 'requests'", "set routing.load to 'kv'")
        idle |= dict.fromkeys(("spill_demand", "spill_imbalance", "report_period_s"), cause)
    if not routing.sessions:  # no request has a home that it could leave
        cause = ("routing.sessions = False", "set routing.sessions to true")
        idle |= dict.fromkeys(("spill_demand", "fallbacks"), cause)
        if not routing.kinds:  # nor a kind
            idle["spill_imbalance"] = cause
    for name, (setting, change) in idle.items():
        if name in routing.model_fields_set:
            yield (
                f"routing.{name} = {getattr(routing, name)!r}: has no effect with {setting}\n"
                f"    fix: leave it out, or {change}"
            )


# Options of vLLM that follow from the adapters.
_OF_ADAPTERS = {"enable_lora", "lora_modules", "max_loras", "max_lora_rank"}


def _agents(cluster: ClusterArgs) -> Iterator[str]:
    """Adapters are models of the API, and replicas must find them."""
    agents = cluster.memshare.agents
    for name, folder in agents.adapters.items():
        field = f"memshare.agents.adapters.{name} = {str(folder)!r}"
        if not folder.is_absolute():
            yield (
                f"{field}: is not absolute; replicas run in folders of their own\n"
                f"    fix: write {str(folder.absolute())!r}, or where replicas find it"
            )
        if name == cluster.public_name:
            yield (
                f"{field}: {name!r} is the base model's name in the API already\n"
                "    fix: give the adapter another name, or set served_model_name"
            )
    if agents.adapters:
        for option, value in cluster.engine.extra.items():
            name = option.removeprefix("--").replace("-", "_")
            if name in _OF_ADAPTERS:
                yield (
                    f"engine.extra.{option} = {value!r}: follows from memshare.agents.adapters\n"
                    "    fix: leave it out"
                )
            elif name == "kv_cache_dtype" and not agents.takes_cache_type(str(value)):
                yield (
                    f"engine.extra.{option} = {value!r}: a cache has one scale for values, and "
                    "low-rank columns beside them are another size (memshare.agents.scheme = "
                    f"{agents.scheme!r})\n"
                    "    fix: leave it out, or set memshare.agents.scheme to 'nonshared'"
                )
    if agents.shares and not cluster.engine.enable_prefix_caching:
        yield (
            "engine.enable_prefix_caching = False: adapters find each other's blocks by it "
            f"(memshare.agents.scheme = {agents.scheme!r})\n"
            "    fix: leave it out, or set memshare.agents.scheme to 'nonshared'"
        )


def _guard(cluster: ClusterArgs) -> Iterator[str]:
    """It needs something to guard against, log-probabilities that mean the same in a prompt and in
    an answer, and somebody who can end a stop."""
    guard = cluster.guard
    if guard is None:
        return
    if cluster.memshare.mode != "share" and not cluster.memshare.selection.on:
        yield (
            f"guard: has no effect with memshare.mode = {cluster.memshare.mode!r}, which "
            "approximates nothing\n"
            "    fix: leave it out, or set memshare.mode to 'share'"
        )
    for option, value in cluster.engine.extra.items():
        name = option.removeprefix("--").replace("-", "_")
        if name == "logprobs_mode" and value != "raw_logprobs":
            yield (
                f"engine.extra.{option} = {value!r}: the guard compares log-probabilities of the "
                "model itself, which vLLM gives for prompts and answers alike only as "
                "'raw_logprobs'\n"
                "    fix: leave it out, or leave out guard"
            )
    if guard.on_alarm == "stop" and guard.cool_down_s is None and not cluster.page.enabled:
        yield (
            "guard.cool_down_s = None: an operator lets a replica go on by the live page, and "
            "page.enabled is False\n"
            "    fix: set guard.cool_down_s, or page.enabled to true, or guard.on_alarm to 'report'"
        )
