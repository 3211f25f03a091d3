"""``serveConfigV2`` of a RayService: a file of ``configs/``, with what is different in a pod."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import yaml

from tools.kubernetes.layout import HTTP_PORT, IMAGE_MODELS, KEY_TABLE, ROOT, Served

Document = dict[str, Any]

PATCH = """\
# Written by tools/make_k8s.py from configs/{config}. Change that, then run it again.
apiVersion: ray.io/v1
kind: RayService
metadata:
  name: memshare
  annotations:
    {annotation}: {model}
spec:
  serveConfigV2: |
{body}"""

# Says beside the configuration, which kustomize can't look into, what is served.
MODEL = "memshare/model"


def load(config: str) -> Document:
    """A file of ``configs/``."""
    document: Document = yaml.safe_load((ROOT / "configs" / config).read_text(encoding="utf-8"))
    return document


def for_pods(served: Served) -> Document:
    """The file's application in a pod; nothing but these values changes.

    - Proxies listen on the pod's address and run wherever a replica does.
    - The key table is where the pods mount the secret.
    - A model that is made on first use is in the image, whose file system can't be written.
    - As many replicas as the folder wants, if it says so.
    """
    pods = deepcopy(load(served.config))
    pods["proxy_location"] = "EveryNode"
    pods["http_options"] = {**pods.get("http_options", {}), "host": "0.0.0.0", "port": HTTP_PORT}
    for application in pods["applications"]:
        application["args"]["auth"] = {"file": KEY_TABLE}
        model = application["args"]["model"]
        if model.startswith("smollm2-"):
            application["args"]["model"] = f"{IMAGE_MODELS}/{model}"
        if served.replicas is not None:
            application["args"]["replicas"] = served.replicas
    return pods


def render(served: Served) -> str:
    """The patch that puts a file of ``configs/`` into the RayService."""
    document = for_pods(served)
    text = yaml.safe_dump(document, sort_keys=False, width=100)
    (application,) = document["applications"]
    return PATCH.format(
        config=served.config,
        annotation=MODEL,
        model=application["args"]["model"],
        body="".join(f"    {line}\n" for line in text.splitlines()),
    )
