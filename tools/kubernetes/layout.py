"""Where things lie in ``k8s/``, and which configuration each deployable folder serves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.parent for path in (K8S / "overlays").glob("*/kustomization.yaml"))


@dataclass(frozen=True)
class Served:
    """What a folder serves."""

    config: str
    """A file in ``configs/``."""
    replicas: int | None = None
    """Engines, where that is not what the file says."""


# Folders that hold a generated serve-config.yaml.
SERVED = {
    K8S / "base": Served("single-gpu.yaml"),
    K8S / "overlays" / "cpu-demo": Served("cluster.yaml"),
    K8S / "overlays" / "multi-gpu-tp": Served("gpu.yaml"),
    K8S / "overlays" / "multi-node-tp": Served("multi-node.yaml"),
    K8S / "overlays" / "production": Served("gpu.yaml", replicas=2),
}

HTTP_PORT = 8000
GRPC_PORT = 9000
METRICS_PORT = 8080

# Where pods that run replicas mount the secret memshare-keys.
KEY_TABLE = "/etc/memshare/keys.yaml"

# Where the CPU image keeps the small model (k8s/images/cpu.Dockerfile makes it).
IMAGE_MODELS = "/opt/memshare/models"
