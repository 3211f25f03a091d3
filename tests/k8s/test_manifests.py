"""Every overlay builds and passes every check."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.kubernetes import schemas, serve_config
from tools.kubernetes.build import BuildError, Manifests, build, selects
from tools.kubernetes.checks import CHECKS, run
from tools.kubernetes.checks.serving import GPU
from tools.kubernetes.layout import K8S, KEY_TABLE, OVERLAYS, SERVED
from tools.make_k8s import files

Overlays = Callable[[str], Manifests]

NAMES = [folder.name for folder in OVERLAYS]


def test_all_overlays_of_the_documentation_are_there() -> None:
    assert set(NAMES) >= {
        *("cpu-demo", "single-gpu", "multi-gpu-tp", "multi-node-tp"),
        *("observability", "ha", "ha-rocksdb", "gateway", "mtls", "tenants"),
        *("model-image", "shared-models", "production"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_overlays_build_and_pass_every_check(overlays: Overlays, name: str) -> None:
    assert [str(finding) for finding in run(overlays(name))] == []


@pytest.mark.skipif("KUBERAY_CRD" not in os.environ, reason="KUBERAY_CRD names no file")
def test_rayservices_pass_the_whole_crd(overlays: Overlays) -> None:
    """The CRD is 1 MB and KubeRay's: name its file in KUBERAY_CRD to run this."""
    schema = schemas.from_crd(Path(os.environ["KUBERAY_CRD"]))
    for name in NAMES:
        assert list(schemas.errors(schema, overlays(name).rayservice)) == [], name


def test_generated_files_are_up_to_date() -> None:
    for path, text in files().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: python -m tools.make_k8s"


@pytest.mark.parametrize("folder", SERVED, ids=lambda folder: folder.name)
def test_serve_configurations_are_the_files_of_configs(folder: Path) -> None:
    """What a pod serves differs from the file in the values that it must, and in no other."""
    patch = yaml.safe_load((folder / "serve-config.yaml").read_text(encoding="utf-8"))
    served = yaml.safe_load(patch["spec"]["serveConfigV2"])
    file = serve_config.load(SERVED[folder].config)
    assert served["http_options"].pop("host") == "0.0.0.0"
    assert served.pop("proxy_location") == "EveryNode"
    file["http_options"].pop("host")
    file.pop("proxy_location")
    for mine, theirs in zip(served["applications"], file["applications"], strict=True):
        assert mine["args"].pop("model").endswith(theirs["args"].pop("model"))
        assert mine["args"].pop("auth") == {"file": KEY_TABLE}
        theirs["args"].pop("auth", None)
        theirs["args"]["replicas"] = SERVED[folder].replicas or theirs["args"]["replicas"]
    assert served == file


@pytest.mark.parametrize("name", NAMES)
def test_what_the_application_asks_ray_for_fits_on_the_pods(overlays: Overlays, name: str) -> None:
    """The deployment that is really built, bundle by bundle, on the pods of one engine."""
    from cluster.app import _engine

    manifests = overlays(name)
    (args,) = manifests.arguments
    config = _engine(args)._replica_config
    actor = {"CPU": config.ray_actor_options["num_cpus"]}
    actor["GPU"] = config.ray_actor_options.get("num_gpus", 0.0)
    bundles = config.placement_group_bundles or [actor]
    engines = manifests.pod("engines")
    assert engines.ray_params is not None
    limits = engines.spec["containers"][0]["resources"]["limits"]
    free = [
        {"CPU": float(engines.ray_params["num-cpus"]), "GPU": float(limits.get(GPU, 0))}
        for _ in range(engines.hosts)
    ]
    if config.placement_group_strategy == "STRICT_PACK":
        assert len(free) == 1
    for bundle in bundles:  # first fit
        pod = next(p for p in free if all(p[what] >= count for what, count in bundle.items()))
        for what, count in bundle.items():
            pod[what] -= count
    assert all(pod["GPU"] == 0 for pod in free), "no GPU is paid for and left idle"


def test_kustomize_names_what_it_refuses(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resorces: [a.yaml]\n")
    with pytest.raises(BuildError, match="resorces"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("selector", "labels", "selected"),
    [
        ({}, {}, True),
        ({"matchLabels": {"a": "1"}}, {"a": "1", "b": "2"}, True),
        ({"matchLabels": {"a": "1"}}, {"a": "2"}, False),
        ({"matchExpressions": [{"key": "a", "operator": "Exists"}]}, {"a": ""}, True),
        ({"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}, {"a": ""}, False),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1"]}]}, {"a": "1"}, True),
        (
            {"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]},
            {"a": "1"},
            False,
        ),
    ],
)
def test_selectors(selector: dict[str, Any], labels: dict[str, str], selected: bool) -> None:
    assert selects(selector, labels) is selected


def test_schemas_are_strict_and_fill_defaults_in_first() -> None:
    schema = schemas.strict(
        {
            "type": "object",
            "properties": {
                "size": {"x-kubernetes-int-or-string": True},
                "kind": {"type": "string", "default": "a"},
            },
            "required": ["size", "kind"],
        }
    )
    assert list(schemas.errors(schema, {"size": "1Gi"})) == []
    assert list(schemas.errors(schema, {"size": 1})) == []
    ((_, message),) = schemas.errors(schema, {"size": 1, "sise": 2})
    assert "sise" in message
    assert list(schemas.errors(schema, {"kind": "b"})) != []


def test_kinds_of_the_overlays_are_all_checked(overlays: Overlays) -> None:
    """No kind slips through for want of a schema."""
    odd = {"apiVersion": "example.com/v1", "kind": "Odd", "metadata": {"name": "odd"}, "spec": {}}
    manifests = overlays("single-gpu")
    manifests.all.append(odd)
    assert any("Odd" in where for where, _ in CHECKS["schema"](manifests))


def test_folders_of_components_are_all_used() -> None:
    used = "".join(
        (folder / "kustomization.yaml").read_text(encoding="utf-8") for folder in OVERLAYS
    )
    for component in (K8S / "components").glob("*/kustomization.yaml"):
        assert f"components/{component.parent.name}" in used
