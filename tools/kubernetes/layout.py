"""Where things lie in ``k8s/``, and which configuration each deployable folder serves."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.parent for path in (K8S / "overlays").glob("*/kustomization.yaml"))

# Folders that hold a generated serve-config.yaml, and the file in configs/ that it comes from.
SERVED = {
    K8S / "base": "single-gpu.yaml",
    K8S / "overlays" / "cpu-demo": "cluster.yaml",
    K8S / "overlays" / "multi-gpu-tp": "gpu.yaml",
    K8S / "overlays" / "multi-node-tp": "multi-node.yaml",
}

HTTP_PORT = 8000
GRPC_PORT = 9000
METRICS_PORT = 8080

# Where pods that run replicas mount the secret memshare-keys.
KEY_TABLE = "/etc/memshare/keys.yaml"

# Where the CPU image keeps the small model (k8s/images/cpu.Dockerfile makes it).
IMAGE_MODELS = "/opt/memshare/models"
