"""What KubeRay's operator and Kubernetes themselves must be able to do."""

from __future__ import annotations

from collections.abc import Iterator

from packaging.version import Version

from tools.kubernetes import images
from tools.kubernetes.build import Found, Manifests
from tools.kubernetes.checks.pods import is_read
from tools.kubernetes.schemas import KUBERNETES

IMAGE_VOLUMES = "1.35"  # the first Kubernetes that has them without a feature gate
ROCKSDB_OPTIONS = ("RAY_gcs_storage", "RAY_gcs_storage_path")  # KubeRay sets them on the head


def operator(manifests: Manifests) -> Found:
    """What is behind a switch says so, in an annotation that docs/kubernetes.md explains."""
    wanted, noted = set(_gates(manifests)), manifests.notes("memshare/gate-")
    for gate in sorted(wanted - noted):
        yield (
            "RayService",
            f"KubeRay refuses it without the feature gate {gate}, which no note says",
        )
    for gate in sorted(noted - wanted):
        yield "RayService", f"nothing needs the feature gate {gate}"
    version = max(manifests.notes("memshare/kubernetes") or {KUBERNETES}, key=Version)
    for pod in manifests.pods:
        for volume in pod.spec.get("volumes", []):
            if "image" in volume and Version(version) < Version(IMAGE_VOLUMES):
                yield (
                    pod.where,
                    f"image volumes want Kubernetes {IMAGE_VOLUMES}, the note says {version}",
                )
    yield from _upgrade(manifests)
    yield from _rocksdb(manifests)
    if manifests.cluster.get("tlsOptions", {}).get("enabled"):
        for pod in manifests.ray_pods:
            recipe = images.recipe_of(pod.spec["containers"][0]["image"])
            if recipe is not None and not recipe.installs("openssl"):
                yield (
                    pod.where,
                    "KubeRay waits for the pod's certificate with openssl, which is not there",
                )


def _gates(manifests: Manifests) -> Iterator[str]:
    """Feature gates of KubeRay 1.7 that are off by default and needed here."""
    cluster = manifests.cluster
    if cluster.get("gcsFaultToleranceOptions", {}).get("backend") == "rocksdb":
        yield "GCSFaultToleranceEmbeddedStorage"
    if "tlsOptions" in cluster:
        yield "RayClusterMTLS"
    if "networkPolicy" in cluster:
        yield "RayClusterNetworkPolicy"
    if "historyServerOptions" in cluster:
        yield "RayClusterHistoryServer"


def _upgrade(manifests: Manifests) -> Found:
    """KubeRay's incremental upgrade replaces the service and the gateway by its own."""
    kind = manifests.rayservice["spec"].get("upgradeStrategy", {}).get("type")
    if kind != "NewClusterWithIncrementalUpgrade":
        return
    yield (
        "upgradeStrategy",
        "its gateway speaks HTTP without TLS and no gRPC, and offers every path",
    )
    name = manifests.serve_service["metadata"]["name"]
    for route in manifests.of("HTTPRoute", "GRPCRoute"):
        yield (
            f"{route['kind']}/{route['metadata']['name']}",
            f"leads nowhere: with incremental upgrades KubeRay makes no service {name}",
        )


def _rocksdb(manifests: Manifests) -> Found:
    """An embedded store has a volume, no Redis, and a Ray that knows it."""
    options = manifests.cluster.get("gcsFaultToleranceOptions", {})
    if options.get("backend") != "rocksdb":
        return
    where = "gcsFaultToleranceOptions"
    for name in sorted(set(options) & {"redisAddress", "redisUsername", "redisPassword"}):
        yield where, f"KubeRay refuses {name} beside backend: rocksdb"
    if "size" not in options.get("storage", {}):
        yield where, "says no size for the head's volume"
    for name in ROCKSDB_OPTIONS:
        if not is_read(name):
            yield where, f"the installed Ray has no option {name}"
