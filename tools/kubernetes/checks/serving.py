"""What is served: the Serve configuration, and whether it fits on the pods."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from cluster.config import parse_cluster_args
from memshare.config import ConfigError
from tools.kubernetes import serve_config
from tools.kubernetes.build import Found, Manifests, Pod, selects
from tools.kubernetes.layout import SERVED

GPU = "nvidia.com/gpu"
# On a disruption budget under which a node with an engine is not drained by itself.
DRAINED = "memshare/drained"


def serve(manifests: Manifests) -> Found:
    """The Serve configuration is one of ours, accepted by Ray and by MemShare."""
    config = manifests.serve_config
    if config not in [serve_config.for_pods(served) for served in SERVED.values()]:
        yield "serveConfigV2", "differs from every file of configs/: run python -m tools.make_k8s"
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        yield "serveConfigV2", str(error)
    unknown = set(config) - set(ServeDeploySchema.model_fields)
    for name in sorted(unknown):
        yield "serveConfigV2", f"Ray Serve knows no {name!r}"
    noted = manifests.notes(serve_config.MODEL)
    for application in config["applications"]:
        if {application["args"]["model"]} != noted:
            yield "RayService", f"the annotation {serve_config.MODEL} names another model"
        try:
            parse_cluster_args(application["args"], environ={})
        except ConfigError as error:
            yield "serveConfigV2", str(error)


def resources(manifests: Manifests) -> Found:
    """What Ray has to place fits on the pods: replicas, their workers, evaluators."""
    engines, evaluators = manifests.pod("engines"), manifests.pod("evaluators")
    if manifests.cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        yield "head", "num-cpus is not 0: engines could be placed on it"
    for pod in manifests.ray_pods:
        container = pod.spec["containers"][0]
        requests = container["resources"]["requests"]
        limits = container["resources"].get("limits", {})
        if requests["memory"] != limits.get("memory"):
            yield pod.where, "memory is limited to something else than what is requested"
        if requests.get(GPU) != limits.get(GPU):
            yield pod.where, "GPUs are limited to something else than what is requested"
    for args in manifests.arguments:
        replica, ranks = args.replica, args.engine.tensor_parallel_size
        cpus, gpus = _ray_cpus(engines), _gpus(engines)
        by_ray = args.engine.distributed_executor_backend == "ray"
        if engines.hosts != replica.nodes:
            yield "engines", f"numOfHosts is {engines.hosts}, replica.nodes is {replica.nodes}"
        if replica.cpus > cpus:
            yield "engines", f"a replica reserves {replica.cpus:g} CPUs, a pod has {cpus:g}"
        wanted = ranks / replica.nodes if by_ray and replica.gpus else replica.gpus
        if wanted > gpus:
            yield "engines", f"a replica reserves {wanted:g} GPUs on a node, a pod has {gpus:g}"
        if not replica.gpus and gpus:
            yield "engines", "the pod has a GPU that no replica reserves"
        request = engines.spec["containers"][0]["resources"]["requests"]["cpu"]
        if _cores(request) < cpus:
            yield "engines", f"Ray may use {cpus:g} CPUs, the pod requests {request}"
        groups = {group["groupName"]: group for group in manifests.cluster["workerGroupSpecs"]}
        if groups["engines"]["replicas"] < args.replicas:
            yield "engines", f"{args.replicas} replicas on {groups['engines']['replicas']} pods"
        if groups["engines"]["maxReplicas"] < args.most_replicas:
            most = groups["engines"]["maxReplicas"]
            yield "engines", f"up to {args.most_replicas} replicas on {most} pods at most"
        if not args.uses_pool:
            continue
        pool = args.memshare.evaluator
        spare = cpus - replica.cpus
        if spare >= pool.cpus_per_actor and engines.hosts == 1:
            yield "engines", f"{spare:g} CPUs are left, where evaluators would disturb an engine"
        most = groups["evaluators"]["maxReplicas"] * _ray_cpus(evaluators)
        if pool.actors * pool.cpus_per_actor > most:
            yield "evaluators", f"{pool.actors} actors need more than {most:g} CPUs"


def lifecycle(manifests: Manifests) -> Found:
    """Streams that run have the time to finish."""
    engines = manifests.pod("engines")
    grace = engines.spec.get("terminationGracePeriodSeconds", 30)
    command = engines.spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    deadline = float(command[command.index("--deadline-s") + 1])
    for args in manifests.arguments:
        if args.replica.graceful_shutdown_timeout_s > deadline:
            yield "engines", "replicas may take longer to stop than the drain waits"
    if deadline >= grace:
        yield "engines", f"the pod is killed after {grace} s, while it drains for {deadline:g} s"
    if manifests.rayservice["spec"].get("rayClusterDeletionDelaySeconds", 60) < deadline:
        yield "RayService", "an old cluster is deleted before its streams can finish"
    yield from _budgets(manifests)
    for pod in manifests.ray_pods:
        probe = pod.spec["containers"][0].get("startupProbe", {})
        if probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3) < 600:
            yield pod.where, "is killed before ten minutes have passed for its start"


def _budgets(manifests: Manifests) -> Found:
    """Budgets work, hold up no drain for pods that serve nobody, and don't block without a word."""
    for budget in manifests.of("PodDisruptionBudget"):
        where, spec = f"PodDisruptionBudget/{budget['metadata']['name']}", budget["spec"]
        least = spec.get("minAvailable")
        if not isinstance(least, int):
            yield where, "Ray's pods have no scale: only a number in minAvailable works"
            continue
        if spec.get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            yield where, "a pod that never became ready holds up every drain"
        groups = manifests.cluster["workerGroupSpecs"]
        # Of an engine's pods only the first is ever ready.
        ready = sum(
            group.get("minReplicas", 0)
            for group in groups
            if selects(spec["selector"], group["template"]["metadata"]["labels"])
        )
        by_hand = budget["metadata"].get("annotations", {}).get(DRAINED) == "by-hand"
        if ready <= least and not by_hand:
            yield where, f"blocks every drain: of {ready} ready pods none may go"
        if ready > least and by_hand:
            yield where, f"says that drains need a hand, though one of {ready} pods may go"


def _ray_cpus(pod: Pod) -> float:
    assert pod.ray_params is not None
    return float(pod.ray_params["num-cpus"])


def _gpus(pod: Pod) -> float:
    return float(pod.spec["containers"][0]["resources"].get("limits", {}).get(GPU, 0))


def _cores(quantity: Any) -> float:
    text = str(quantity)
    return float(text.removesuffix("m")) / 1000 if text.endswith("m") else float(text)
