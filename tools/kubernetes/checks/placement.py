"""Where pods and their volumes land."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tools.kubernetes import serve_config
from tools.kubernetes.build import Found, Manifests, Pod
from tools.kubernetes.checks.serving import GPU

GPU_MEMORY = "nvidia.com/gpu.memory"
GPU_PRESENT = "nvidia.com/gpu.present"
HOST, ZONE = "kubernetes.io/hostname", "topology.kubernetes.io/zone"


def placement(manifests: Manifests) -> Found:
    """Engines get GPUs that are large enough, on nodes of their own; others stay off these."""
    for pod in manifests.ray_pods:
        affinity = pod.spec.get("affinity") or {}
        if GPU in pod.spec["containers"][0]["resources"].get("limits", {}):
            yield from ((pod.where, message) for message in _gpu_faults(affinity))
        elif pod.role != "engine" and not _prefers_no_gpu(affinity):
            yield pod.where, "may take the CPUs of a node with GPUs, though others are free"
    yield from _spread(manifests.pod("engines"))


def storage(manifests: Manifests) -> Found:
    """Claims are bound by what a cluster usually has, and can be mounted where their pods are."""
    claims = {
        claim["metadata"]["name"]: claim["spec"] for claim in manifests.of("PersistentVolumeClaim")
    }
    for name, spec in claims.items():
        if spec["accessModes"] != ["ReadWriteOnce"] and not spec.get("storageClassName"):
            where = f"PersistentVolumeClaim/{name}"
            yield where, "stays Pending where the default storage class serves one node only"
    for pod in manifests.ray_pods:
        for name in _claims(pod):
            if claims.get(name, {}).get("accessModes") == ["ReadWriteOnce"]:
                yield pod.where, f"pods on several nodes can't mount {name}"
        for volume in pod.spec.get("volumes", []):
            template = volume.get("ephemeral", {}).get("volumeClaimTemplate", {}).get("spec")
            if template and template["accessModes"] != ["ReadWriteOnce"]:
                yield (
                    pod.where,
                    f"the volume {volume['name']} is for one pod: ReadWriteOnce will do",
                )
    yield from _downloads(manifests)


def _downloads(manifests: Manifests) -> Found:
    """A claim for weights is filled by a job, with the model and the image that serve."""
    engines = manifests.pod("engines")
    wanted = set(_claims(engines))
    jobs = [
        pod for pod in manifests.pods if pod.where.startswith("Job/") and wanted & {*_claims(pod)}
    ]
    for name in sorted(wanted - {claim for job in jobs for claim in _claims(job)}):
        yield f"PersistentVolumeClaim/{name}", "no job downloads weights to it"
    models = manifests.notes(serve_config.MODEL)
    for job in jobs:
        container = job.spec["containers"][0]
        if not models <= set(container.get("args", [])):
            yield job.where, f"downloads something else than {', '.join(models)}"
        if container["image"] != engines.spec["containers"][0]["image"]:
            yield job.where, "has another image than the engines"


def _claims(pod: Pod) -> Iterator[str]:
    """Names of the claims that a pod mounts."""
    for volume in pod.spec.get("volumes", []):
        if "persistentVolumeClaim" in volume:
            yield volume["persistentVolumeClaim"]["claimName"]


def _gpu_faults(affinity: dict[str, Any]) -> list[str]:
    """What is wrong with the choice of nodes for GPUs."""
    required = affinity.get("nodeAffinity", {}).get(
        "requiredDuringSchedulingIgnoredDuringExecution"
    )
    terms = [
        expression
        for term in (required or {}).get("nodeSelectorTerms", [])
        for expression in term["matchExpressions"]
        if expression["key"] == GPU_MEMORY
    ]
    faults = []
    if not any(term["operator"] == "Gt" for term in terms):
        faults.append("lands on any GPU, however small")
    if not any(term["operator"] == "DoesNotExist" for term in terms):
        faults.append("stays Pending where nodes don't say which GPUs they have")
    return faults


def _prefers_no_gpu(affinity: dict[str, Any]) -> bool:
    preferred = affinity.get("nodeAffinity", {}).get(
        "preferredDuringSchedulingIgnoredDuringExecution", []
    )
    return any(
        (expression["key"], expression["operator"]) == (GPU_PRESENT, "NotIn")
        for term in preferred
        for expression in term["preference"]["matchExpressions"]
    )


def _spread(engines: Pod) -> Found:
    """One node that fails, or one zone, takes no more engines than it must."""
    over = {
        constraint["topologyKey"]: constraint
        for constraint in engines.spec.get("topologySpreadConstraints", [])
    }
    if HOST not in over:
        yield engines.where, "all may land on one node"
    if engines.hosts == 1 and ZONE not in over:
        yield engines.where, "all may land in one zone"
    if engines.hosts > 1 and ZONE in over:
        yield engines.where, "the pods of one engine are spread over zones"
    for constraint in over.values():
        if constraint["whenUnsatisfiable"] != "ScheduleAnyway":
            yield engines.where, "stays Pending where there are too few nodes to spread over"
