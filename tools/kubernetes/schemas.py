"""Strict schemas: a field that nobody knows is an error.

Three sources. Kubernetes' own kinds come with the package ``kubernetes-validate``. A RayService is
checked against ``data/rayservice.json``, which is KubeRay 1.7's own CRD (Apache-2.0), cut down to
what is outside pod templates and service templates; those are Kubernetes' kinds again. For the
kinds of other projects (Prometheus operator, Gateway API, Envoy Gateway) ``data/others.json`` holds
the fields in use here.

    python -m tools.kubernetes.schemas CRD.yaml     # cuts the CRD down anew
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from referencing import Registry, Resource

from tools.kubernetes.build import Found, Manifest, Manifests, Pod

FOLDER = Path(__file__).resolve().parent / "data"
KUBERNETES = "1.34"
OTHERS = (
    "PodMonitor", "PrometheusRule", "Gateway", "HTTPRoute", "GRPCRoute", "BackendTrafficPolicy",
)  # fmt: skip

# Inside these, other schemas hold, or fields that are not used here.
_CUT = ("template", "serveService", "headService", "historyServerOptions", "networkPolicy")


def strict(schema: Any) -> Any:
    """An OpenAPI v3 schema of a CRD as a JSON schema that knows its fields and no others.

    Args:
        schema: is changed in place.
    """
    if isinstance(schema, dict):
        schema.pop("description", None)
        if schema.pop("x-kubernetes-int-or-string", False):
            schema.pop("type", None)
            schema["anyOf"] = [{"type": "integer"}, {"type": "string"}]
        known = isinstance(schema.get("properties"), dict)
        if known and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        # The API server fills defaults in before it looks for required fields.
        properties = schema.get("properties")
        if isinstance(properties, dict) and isinstance(schema.get("required"), list):
            schema["required"] = [
                name for name in schema["required"] if "default" not in properties.get(name, {})
            ]
        for value in schema.values():
            strict(value)
    elif isinstance(schema, list):
        for value in schema:
            strict(value)
    return schema


def from_crd(path: Path) -> Manifest:
    """The strict schema of version v1 of a CRD, whole."""
    crd = yaml.safe_load(path.read_text(encoding="utf-8"))
    (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1")
    schema: Manifest = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def cut_down(schema: Manifest) -> Manifest:
    """The same without what other schemas check, and without status."""

    def cut(node: Any) -> Any:
        if isinstance(node, dict):
            properties = node.get("properties")
            if isinstance(properties, dict):
                for name in _CUT:
                    if name in properties:
                        properties[name] = {"type": "object"}
            for value in node.values():
                cut(value)
        elif isinstance(node, list):
            for value in node:
                cut(value)
        return node

    schema["properties"].pop("status", None)
    cut(schema)
    return schema


@cache
def rayservice_schema() -> Manifest:
    """The schema of a RayService that comes with this project."""
    schema: Manifest = json.loads((FOLDER / "rayservice.json").read_text(encoding="utf-8"))
    return schema


@cache
def other_schemas() -> Manifest:
    """Schemas by kind, of the kinds of other projects."""
    schemas: Manifest = json.loads((FOLDER / "others.json").read_text(encoding="utf-8"))
    return schemas


def errors(schema: Manifest, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(path, message) of everything that a schema refuses."""
    for error in jsonschema.Draft202012Validator(schema).iter_errors(manifest):
        yield ".".join(map(str, error.absolute_path)), error.message[:300]


@cache
def _core_validator(api_version: str, kind: str) -> jsonschema.Draft202012Validator | None:
    """Kubernetes' own schema of a kind; None if it has none."""
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema"
    version = folder / f"v{KUBERNETES}.0-local-strict"
    # As the files are named: rbac.authorization.k8s.io/v1 is rbac-v1.
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    file = version / f"{kind.lower()}-{group}.json"
    if not file.is_file():
        return None
    schema = json.loads(file.read_text(encoding="utf-8"))
    return jsonschema.Draft202012Validator(schema, registry=_definitions())


@cache
def _definitions() -> Registry:
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema"
    file = folder / f"v{KUBERNETES}.0-local-strict" / "_definitions.json"
    contents = json.loads(file.read_text(encoding="utf-8"))
    return Resource.from_contents(contents) @ Registry()


def core_errors(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(path, message) of everything that Kubernetes' own schema refuses."""
    validator = _core_validator(manifest["apiVersion"], manifest["kind"])
    if validator is None:
        yield "kind", f"Kubernetes {KUBERNETES} knows no such kind, and no schema here does"
        return
    for error in validator.iter_errors(manifest):
        yield ".".join(map(str, error.absolute_path)), error.message[:300]


def as_pod(pod: Pod) -> Manifest:
    """A pod template as the Pod that it makes."""
    metadata = {"name": "pod", **pod.template.get("metadata", {})}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod.spec}


def schema(manifests: Manifests) -> Found:
    """Fields exist and have the right types; nothing is misspelt."""
    for manifest in manifests.all:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        if kind == "RayService":
            found = errors(rayservice_schema(), manifest)
        elif kind in OTHERS:
            found = errors(other_schemas()[kind], manifest)
        else:
            found = core_errors(manifest)
        for path, message in found:
            yield f"{kind}/{name}.{path}", message
    for pod in manifests.ray_pods:
        for path, message in core_errors(as_pod(pod)):
            yield f"{pod.where}.template.{path}", message
    service = {"apiVersion": "v1", "kind": "Service", **manifests.serve_service}
    for path, message in core_errors(service):
        yield f"serveService.{path}", message


def main() -> int:
    """Write ``data/rayservice.json`` from a CRD; return the exit status."""
    text = json.dumps(cut_down(from_crd(Path(sys.argv[1]))), indent=1, sort_keys=True) + "\n"
    (FOLDER / "rayservice.json").write_text(text, encoding="utf-8")
    print(f"wrote {FOLDER / 'rayservice.json'} ({len(text)} characters)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
