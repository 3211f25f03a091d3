"""The page about Kubernetes says what there is, and what an operator has to do by hand."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import yaml

from tests.documents import Block, blocks
from tools.kubernetes.build import Manifests
from tools.kubernetes.checks.egress import NODE_LOCAL_DNS, OTLP_PORTS
from tools.kubernetes.checks.operator import IMAGE_VOLUMES
from tools.kubernetes.checks.serving import DRAINED
from tools.kubernetes.layout import K8S, OVERLAYS, ROOT
from tools.kubernetes.schemas import KUBERNETES

Overlays = Callable[[str], Manifests]

PAGE = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
APPLIED = [block for block in blocks("sh") if "kubectl apply -k" in block.text]


def test_the_page_lists_what_there_is() -> None:
    for kind in ("overlays", "components"):
        for folder in (K8S / kind).iterdir():
            assert f"`{folder.name}`" in PAGE, folder.name
    for secret in ("memshare-keys", "memshare-redis", "memshare-tls", "memshare-hub"):
        assert f"| `{secret}` |" in PAGE


def test_the_demo_is_applied_in_three_places() -> None:
    assert {block.page for block in APPLIED} == {
        *("README.md", "docs/kubernetes.md", "docs/quick-start.md"),
    }


@pytest.mark.parametrize("block", APPLIED, ids=lambda block: block.place)
def test_where_manifests_are_applied_their_image_is_built_and_loaded(
    overlays: Overlays, block: Block
) -> None:
    """Word by word, with kind: the image of the overlay, before it is wanted."""
    (folder,) = re.findall(r"kubectl apply -k k8s/overlays/(\S+)", block.text)
    image = overlays(folder).pod("engines").spec["containers"][0]["image"]
    build = f"docker build --file k8s/images/cpu.Dockerfile --tag {image} ."
    steps = [build, f"kind load docker-image {image}", f"kubectl apply -k k8s/overlays/{folder}"]
    places = [block.text.find(step) for step in steps]
    assert -1 not in places, steps
    assert places == sorted(places)


def test_the_feature_gates_that_overlays_need_are_switched_on(overlays: Overlays) -> None:
    noted = set().union(*(overlays(f.name).notes("memshare/gate-") for f in OVERLAYS))
    gates = yaml.safe_load((K8S / "kuberay-values.yaml").read_text(encoding="utf-8"))
    assert noted
    assert noted <= {gate["name"] for gate in gates["featureGates"] if gate["enabled"]}
    assert all(f"`{gate}`" in PAGE for gate in noted)


def test_what_is_done_by_hand_is_described(overlays: Overlays) -> None:
    alone = [
        folder.name
        for folder in OVERLAYS
        for budget in overlays(folder.name).of("PodDisruptionBudget")
        if budget["metadata"].get("annotations", {}).get(DRAINED) == "by-hand"
    ]
    assert "single-gpu" in alone
    assert "production" not in alone
    section = PAGE.partition("### Draining a node")[2].partition("\n## ")[0]
    role = overlays("single-gpu").pod("engines").labels["memshare/role"]
    assert f"delete pod --selector memshare/role={role} " in section


def test_versions_addresses_and_ports_are_those_that_are_checked() -> None:
    for said in (
        *(f"Kubernetes {KUBERNETES} or newer", f"Kubernetes {IMAGE_VOLUMES} or newer"),
        *(NODE_LOCAL_DNS.partition("/")[0], *map(str, OTLP_PORTS.values())),
        *("evaluators-worker", "`NewClusterWithIncrementalUpgrade`", "`tlsOptions`"),
    ):
        assert said in PAGE, said
