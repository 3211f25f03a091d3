"""Mistakes that show in operation: when nodes are drained, names looked up, streams long."""

from __future__ import annotations

from typing import Any

import yaml

from tests.k8s.mistakes import Mistake
from tools.kubernetes.build import Manifests


def named(m: Manifests, kind: str, name: str) -> Any:
    """The one manifest of that kind and name."""
    (found,) = (x for x in m.of(kind) if x["metadata"]["name"] == name)
    return found


def group(m: Manifests, name: str) -> Any:
    """A group of workers."""
    (found,) = (x for x in m.cluster["workerGroupSpecs"] if x["groupName"] == name)
    return found


# ------------------------------------------------------------------------------- gateways


def no_policy_of_envoy(m: Manifests) -> None:
    m.all = [x for x in m.all if x["kind"] != "BackendTrafficPolicy"]


def policy_for_http_only(m: Manifests) -> None:
    next(m.of("BackendTrafficPolicy"))["spec"]["targetRefs"].pop()


def fifteen_seconds(m: Manifests) -> None:
    next(m.of("BackendTrafficPolicy"))["spec"]["timeout"]["http"]["requestTimeout"] = "15s"


def policy_of_nobody(m: Manifests) -> None:
    next(m.of("BackendTrafficPolicy"))["spec"]["targetRefs"][0]["name"] = "memshere"


def misspelt_timeout(m: Manifests) -> None:
    next(m.of("BackendTrafficPolicy"))["spec"]["timeout"]["http"]["requestTimeOut"] = "0s"


def timeout_without_a_unit(m: Manifests) -> None:
    next(m.of("BackendTrafficPolicy"))["spec"]["timeout"]["http"]["requestTimeout"] = "0"


def short_http(m: Manifests) -> None:
    next(m.of("HTTPRoute"))["spec"]["rules"][0]["timeouts"]["request"] = "60s"


# ------------------------------------------------------------------------------- drains


def unready_pods_are_guarded(m: Manifests) -> None:
    next(m.of("PodDisruptionBudget"))["spec"].pop("unhealthyPodEvictionPolicy")


def one_engine_in_production(m: Manifests) -> None:
    group(m, "engines")["minReplicas"] = 1


def blocked_without_a_word(m: Manifests) -> None:
    next(m.of("PodDisruptionBudget"))["metadata"].pop("annotations")


def a_hand_for_nothing(m: Manifests) -> None:
    budget = next(m.of("PodDisruptionBudget"))
    budget["metadata"]["annotations"] = {"memshare/drained": "by-hand"}


# ------------------------------------------------------------------------------- images


def redis_with_a_hole(m: Manifests) -> None:
    m.pod("StatefulSet/memshare-redis").containers[0]["image"] = "redis:7.4.1-alpine"


def redis_that_moves(m: Manifests) -> None:
    m.pod("StatefulSet/memshare-redis").containers[0]["image"] = "redis:7-alpine"


# ------------------------------------------------------------------------------- placement


def any_gpu(m: Manifests) -> None:
    m.pod("engines").spec.pop("affinity")


def labels_of_gpus_required(m: Manifests) -> None:
    node = m.pod("engines").spec["affinity"]["nodeAffinity"]
    node["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"].pop()


def evaluators_beside_gpus(m: Manifests) -> None:
    m.pod("evaluators").spec.pop("affinity")


def one_node_for_all(m: Manifests) -> None:
    m.pod("engines").spec["topologySpreadConstraints"].pop(0)


def one_zone_for_all(m: Manifests) -> None:
    m.pod("engines").spec["topologySpreadConstraints"].pop()


def one_engine_in_two_zones(m: Manifests) -> None:
    constraints = m.pod("engines").spec["topologySpreadConstraints"]
    constraints.append({**constraints[0], "topologyKey": "topology.kubernetes.io/zone"})


def strict_spread(m: Manifests) -> None:
    m.pod("engines").spec["topologySpreadConstraints"][0]["whenUnsatisfiable"] = "DoNotSchedule"


# ------------------------------------------------------------------------------- storage


def shared_without_a_class(m: Manifests) -> None:
    next(m.of("PersistentVolumeClaim"))["spec"].pop("storageClassName")


def one_node_for_a_claim(m: Manifests) -> None:
    next(m.of("PersistentVolumeClaim"))["spec"]["accessModes"] = ["ReadWriteOnce"]


def shared_where_one_is_enough(m: Manifests) -> None:
    (models,) = (v for v in m.pod("engines").spec["volumes"] if v["name"] == "models")
    models["ephemeral"]["volumeClaimTemplate"]["spec"]["accessModes"] = ["ReadWriteMany"]


def nobody_downloads(m: Manifests) -> None:
    m.all = [x for x in m.all if x["kind"] != "Job"]


def another_download(m: Manifests) -> None:
    m.pod("Job/memshare-download").containers[0]["args"][1] = "Qwen/QwQ-32B"


def another_image_downloads(m: Manifests) -> None:
    m.pod("Job/memshare-download").containers[0]["image"] = "ghcr.io/example/memshare-cpu:0.1.0"


def no_such_downloader(m: Manifests) -> None:
    m.pod("Job/memshare-download").containers[0]["command"] = ["wget"]


def root_downloads(m: Manifests) -> None:
    m.pod("Job/memshare-download").containers[0].pop("securityContext")


def another_model_noted(m: Manifests) -> None:
    m.rayservice["metadata"]["annotations"]["memshare/model"] = "Qwen/QwQ-32B"


# ------------------------------------------------------------------------------- egress


def _without_egress(m: Manifests, port: int, cidr: str | None = None) -> None:
    rules = named(m, "NetworkPolicy", "memshare")["spec"]["egress"]
    for rule in rules:
        if any(p["port"] == port for p in rule.get("ports", [])):
            rule["to"] = [
                peer
                for peer in rule["to"]
                if peer.get("ipBlock", {}).get("cidr") != cidr and cidr is not None
            ]


def no_node_local_dns(m: Manifests) -> None:
    _without_egress(m, 53, "169.254.20.10/32")


def no_dns(m: Manifests) -> None:
    _without_egress(m, 53)


def dns_by_udp_only(m: Manifests) -> None:
    for rule in named(m, "NetworkPolicy", "memshare")["spec"]["egress"]:
        if {"port": 53, "protocol": "TCP"} in rule.get("ports", []):
            rule["ports"].remove({"port": 53, "protocol": "TCP"})


def ipv4_only(m: Manifests) -> None:
    _without_egress(m, 443, "::/0")


def no_collector(m: Manifests) -> None:
    _without_egress(m, 4317)


def collector_at_another_port(m: Manifests) -> None:
    config = m.serve_config
    engine_options = config["applications"][0]["args"]["engine"]
    engine_options["extra"]["otlp_traces_endpoint"] = "http://collector:4319"
    m.rayservice["spec"]["serveConfigV2"] = yaml.safe_dump(config)


# ------------------------------------------------------------------------------- operator


def image_volumes_too_early(m: Manifests) -> None:
    m.rayservice["metadata"]["annotations"].pop("memshare/kubernetes")


def rocksdb_without_its_gate(m: Manifests) -> None:
    m.rayservice["metadata"]["annotations"].pop("memshare/gate-rocksdb")


def rocksdb_beside_redis(m: Manifests) -> None:
    m.cluster["gcsFaultToleranceOptions"]["redisAddress"] = "memshare-redis:6379"


def rocksdb_of_no_size(m: Manifests) -> None:
    m.cluster["gcsFaultToleranceOptions"].pop("storage")


def tls_without_its_gate(m: Manifests) -> None:
    m.rayservice["metadata"]["annotations"].pop("memshare/gate-mtls")


def a_gate_for_nothing(m: Manifests) -> None:
    m.rayservice["metadata"]["annotations"]["memshare/gate-x"] = "RayClusterMTLS"


def incremental_upgrade(m: Manifests) -> None:
    m.rayservice["spec"]["upgradeStrategy"]["type"] = "NewClusterWithIncrementalUpgrade"


# ------------------------------------------------------------------------------- alerts


def alert_without_a_url(m: Manifests) -> None:
    rule = next(m.of("PrometheusRule"))["spec"]["groups"][0]["rules"][0]
    rule["annotations"].pop("runbook_url")


def alert_with_a_url_elsewhere(m: Manifests) -> None:
    rule = next(m.of("PrometheusRule"))["spec"]["groups"][0]["rules"][0]
    rule["annotations"]["runbook_url"] = "docs/faults.md#memsharepreemptionthrash"


MISTAKES: list[Mistake] = [
    (no_policy_of_envoy, "gateway", "gateways", "Envoy cuts its streams after 15 s"),
    (policy_for_http_only, "production", "gateways", "Envoy cuts its streams after 15 s"),
    (fifteen_seconds, "gateway", "gateways", "requestTimeout is not 0s"),
    (policy_of_nobody, "gateway", "gateways", "there is no HTTPRoute/memshere"),
    (misspelt_timeout, "gateway", "schema", "requestTimeOut"),
    (timeout_without_a_unit, "gateway", "schema", "does not match"),
    (short_http, "gateway", "gateways", "timeouts.request is not 0s"),
    (unready_pods_are_guarded, "single-gpu", "lifecycle", "holds up every drain"),
    (one_engine_in_production, "production", "lifecycle", "blocks every drain"),
    (blocked_without_a_word, "single-gpu", "lifecycle", "blocks every drain"),
    (a_hand_for_nothing, "production", "lifecycle", "drains need a hand"),
    (redis_with_a_hole, "ha", "security", "has CVE-2026-23479"),
    (redis_that_moves, "ha", "security", "can change under the same name"),
    (any_gpu, "single-gpu", "placement", "lands on any GPU, however small"),
    (labels_of_gpus_required, "multi-gpu-tp", "placement", "stays Pending where nodes don't say"),
    (evaluators_beside_gpus, "single-gpu", "placement", "CPUs of a node with GPUs"),
    (one_node_for_all, "single-gpu", "placement", "all may land on one node"),
    (one_zone_for_all, "production", "placement", "all may land in one zone"),
    (one_engine_in_two_zones, "multi-node-tp", "placement", "one engine are spread over zones"),
    (strict_spread, "single-gpu", "placement", "too few nodes to spread over"),
    (shared_without_a_class, "shared-models", "storage", "stays Pending where the default"),
    (one_node_for_a_claim, "shared-models", "storage", "several nodes can't mount"),
    (shared_where_one_is_enough, "single-gpu", "storage", "ReadWriteOnce will do"),
    (nobody_downloads, "shared-models", "storage", "no job downloads weights"),
    (another_download, "shared-models", "storage", "downloads something else than"),
    (another_image_downloads, "shared-models", "storage", "has another image"),
    (no_such_downloader, "shared-models", "commands", "not known to have 'wget'"),
    (root_downloads, "shared-models", "security", "runAsNonRoot is not True"),
    (another_model_noted, "single-gpu", "serve", "memshare/model names another model"),
    (no_node_local_dns, "single-gpu", "egress", "can't ask NodeLocal DNS by UDP"),
    (no_dns, "single-gpu", "egress", "can't ask the cluster's DNS by UDP"),
    (dns_by_udp_only, "single-gpu", "egress", "can't ask NodeLocal DNS by TCP"),
    (ipv4_only, "single-gpu", "egress", "reaches port 443 on 0.0.0.0/0 only"),
    (no_collector, "single-gpu", "egress", "no OpenTelemetry collector on port 4317"),
    (collector_at_another_port, "single-gpu", "egress", "spans through to http://collector:4319"),
    (image_volumes_too_early, "model-image", "operator", "want Kubernetes 1.35"),
    (rocksdb_without_its_gate, "ha-rocksdb", "operator", "GCSFaultToleranceEmbeddedStorage"),
    (rocksdb_beside_redis, "ha-rocksdb", "operator", "KubeRay refuses redisAddress"),
    (rocksdb_of_no_size, "ha-rocksdb", "operator", "says no size"),
    (tls_without_its_gate, "mtls", "operator", "the feature gate RayClusterMTLS"),
    (a_gate_for_nothing, "single-gpu", "operator", "nothing needs the feature gate"),
    (incremental_upgrade, "single-gpu", "operator", "HTTP without TLS and no gRPC"),
    (incremental_upgrade, "gateway", "operator", "GRPCRoute/memshare: leads nowhere"),
    (alert_without_a_url, "observability", "queries", "doesn't lead to its section"),
    (alert_with_a_url_elsewhere, "observability", "queries", "not on the page that is set"),
]
