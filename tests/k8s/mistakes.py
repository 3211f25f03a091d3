"""Mistakes in what is served and how it is wired, each with the check that must name it."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from typing import Any

import yaml

from tools.kubernetes.build import Manifests

# What is done, to which overlay, and the check that finds it with these words.
Mistake = tuple[Callable[[Manifests], None], str, str, str]


def engine(manifests: Manifests) -> dict[str, Any]:
    """The container of an engine."""
    container: dict[str, Any] = manifests.pod("engines").spec["containers"][0]
    return container


def misspelt_field(m: Manifests) -> None:
    m.cluster["workerGroupSpecs"][0]["minReplica"] = 1


def misspelt_field_of_a_pod(m: Manifests) -> None:
    engine(m)["redinessProbe"] = engine(m).pop("readinessProbe")


def wrong_type(m: Manifests) -> None:
    m.cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def misspelt_field_of_serve(m: Manifests) -> None:
    text = m.rayservice["spec"]["serveConfigV2"]
    m.rayservice["spec"]["serveConfigV2"] = text.replace("max_num_seqs", "max_seqs")


def wrong_http_port(m: Manifests) -> None:
    next(p for p in engine(m)["ports"] if p["name"] == "serve")["containerPort"] = 8001


def wrong_probe_port(m: Manifests) -> None:
    engine(m)["readinessProbe"]["httpGet"]["port"] = "serv"


def wrong_backend_port(m: Manifests) -> None:
    next(m.of("GRPCRoute"))["spec"]["rules"][0]["backendRefs"][0]["port"] = 50051


def missing_grpc_port(m: Manifests) -> None:
    m.rayservice["spec"]["serveService"]["spec"]["ports"].pop()


def budget_of_nobody(m: Manifests) -> None:
    next(m.of("PodDisruptionBudget"))["spec"]["selector"]["matchLabels"]["memshare/role"] = "gpu"


def route_without_listener(m: Manifests) -> None:
    next(m.of("HTTPRoute"))["spec"]["parentRefs"][0]["sectionName"] = "http"


def too_few_gpus(m: Manifests) -> None:
    for part in ("requests", "limits"):
        engine(m)["resources"][part]["nvidia.com/gpu"] = "1"


def too_few_cpus(m: Manifests) -> None:
    params = m.pod("engines").ray_params
    assert params is not None
    params["num-cpus"] = "2"


def engines_on_the_head(m: Manifests) -> None:
    m.cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] = "4"


def room_for_evaluators(m: Manifests) -> None:
    params = m.pod("engines").ray_params
    assert params is not None
    params["num-cpus"] = "8"


def one_host(m: Manifests) -> None:
    m.cluster["workerGroupSpecs"][0]["numOfHosts"] = 1


def too_few_pods(m: Manifests) -> None:
    config = m.serve_config
    config["applications"][0]["args"]["scaling"] = {"max_replicas": 8}
    m.rayservice["spec"]["serveConfigV2"] = yaml.safe_dump(config)


def missing_secret(m: Manifests) -> None:
    m.rayservice["metadata"]["annotations"].pop("memshare/needs-keys")


def missing_redis_secret(m: Manifests) -> None:
    m.rayservice["metadata"]["annotations"].pop("memshare/needs-redis")


def missing_certificate(m: Manifests) -> None:
    listener = next(m.of("Gateway"))["spec"]["listeners"][0]
    listener["tls"]["certificateRefs"][0]["name"] = "tls"


def missing_claim(m: Manifests) -> None:
    m.all = [x for x in m.all if x["kind"] != "PersistentVolumeClaim"]


def missing_account(m: Manifests) -> None:
    m.pod("engines").spec["serviceAccountName"] = "memshare"


def unknown_volume(m: Manifests) -> None:
    engine(m)["volumeMounts"][0]["name"] = "tmp"


def closed_to_clients(m: Manifests) -> None:
    (policy,) = (p for p in m.of("NetworkPolicy") if p["metadata"]["name"] == "memshare")
    policy["spec"]["ingress"] = [
        rule
        for rule in policy["spec"]["ingress"]
        if {"port": "serve-grpc", "protocol": "TCP"} not in rule.get("ports", [])
    ]


def closed_to_ray(m: Manifests) -> None:
    (policy,) = (p for p in m.of("NetworkPolicy") if p["metadata"]["name"] == "memshare")
    policy["spec"]["ingress"][0]["from"][0]["podSelector"] = {
        "matchLabels": {"memshare/role": "engine"}
    }


def open_to_everybody(m: Manifests) -> None:
    (policy,) = (p for p in m.of("NetworkPolicy") if p["metadata"]["name"] == "memshare")
    policy["spec"]["ingress"].append({"ports": [{"port": "serve"}]})


def root(m: Manifests) -> None:
    engine(m)["securityContext"]["runAsNonRoot"] = False


def writable_image(m: Manifests) -> None:
    m.cluster["autoscalerOptions"]["securityContext"].pop("readOnlyRootFilesystem")


def nowhere_to_write(m: Manifests) -> None:
    engine(m)["volumeMounts"] = [v for v in engine(m)["volumeMounts"] if v["mountPath"] != "/tmp"]


def ray_without_token(m: Manifests) -> None:
    m.cluster["authOptions"]["mode"] = "disabled"


def token_for_the_api_server(m: Manifests) -> None:
    m.pod("engines").spec.pop("automountServiceAccountToken")


def wrong_variable_of_ray(m: Manifests) -> None:
    engine(m)["env"].append({"name": "RAY_memory_monitor_refresh_mss", "value": "0"})


def wrong_variable_of_vllm(m: Manifests) -> None:
    engine(m)["env"].append({"name": "VLLM_NO_USAGE_STAT", "value": "1"})


def wrong_variable_of_memshare(m: Manifests) -> None:
    engine(m)["env"].append({"name": "MEMSHARE_MOD", "value": "share"})


def wrong_module(m: Manifests) -> None:
    engine(m)["lifecycle"]["preStop"]["exec"]["command"][2] = "cluster.drian"


def wrong_image(m: Manifests) -> None:
    engine(m)["image"] = "ghcr.io/example/memshare-tpu:0.1.0"


def other_version(m: Manifests) -> None:
    engine(m)["image"] = engine(m)["image"].replace("0.1.0", "0.0.9")


def other_user(m: Manifests) -> None:
    engine(m)["securityContext"]["runAsUser"] = 1000


def missing_model(m: Manifests) -> None:
    text = m.rayservice["spec"]["serveConfigV2"]
    m.rayservice["spec"]["serveConfigV2"] = text.replace("/opt/memshare/models", "/models")


def plain_secret(m: Manifests) -> None:
    secret = next(m.of("Secret"))
    secret["data"]["keys.yaml"] = b64encode(b"tenants: {a: {keys: {k: msk_1}}}").decode()


def unknown_metric(m: Manifests) -> None:
    rule = next(m.of("PrometheusRule"))["spec"]["groups"][0]["rules"][0]
    rule["expr"] = rule["expr"].replace("num_preemptions_total", "num_preemption_total")


def unknown_label(m: Manifests) -> None:
    rule = next(m.of("PrometheusRule"))["spec"]["groups"][0]["rules"][1]
    rule["expr"] = rule["expr"].replace("policy=", "polcy=")


def unknown_metric_of_a_panel(m: Manifests) -> None:
    (config,) = m.of("ConfigMap")
    text = config["data"]["memshare-ray.json"]
    config["data"]["memshare-ray.json"] = text.replace("memshare_applied", "memshare_aplied")


def broken_query(m: Manifests) -> None:
    next(m.of("PrometheusRule"))["spec"]["groups"][0]["rules"][0]["expr"] = "sum(rate("


def alert_without_runbook(m: Manifests) -> None:
    next(m.of("PrometheusRule"))["spec"]["groups"][0]["rules"][0]["alert"] = "MemShareSad"


def metrics_closed(m: Manifests) -> None:
    m.all = [x for x in m.all if x["metadata"]["name"] != "memshare-metrics"]


def wrong_scrape_port(m: Manifests) -> None:
    next(m.of("PodMonitor"))["spec"]["podMetricsEndpoints"][0]["port"] = "metric"


def killed_while_draining(m: Manifests) -> None:
    m.pod("engines").spec["terminationGracePeriodSeconds"] = 30


def budget_in_percent(m: Manifests) -> None:
    budget = next(m.of("PodDisruptionBudget"))
    budget["spec"].pop("minAvailable")
    budget["spec"]["maxUnavailable"] = 1


def impatient_start(m: Manifests) -> None:
    engine(m)["startupProbe"]["failureThreshold"] = 12


MISTAKES: list[Mistake] = [
    (misspelt_field, "single-gpu", "schema", "minReplica"),
    (misspelt_field_of_a_pod, "single-gpu", "schema", "redinessProbe"),
    (wrong_type, "single-gpu", "schema", "is not of type 'string'"),
    (misspelt_field_of_serve, "single-gpu", "serve", "did you mean 'max_num_seqs'?"),
    (wrong_http_port, "single-gpu", "ports", "port 'serve' is 8001, Ray uses 8000"),
    (wrong_probe_port, "single-gpu", "ports", "readinessProbe asks port 'serv'"),
    (wrong_backend_port, "gateway", "ports", "memshare-serve-svc:50051"),
    (missing_grpc_port, "single-gpu", "ports", "serve-grpc"),
    (budget_of_nobody, "single-gpu", "labels", "selects no pod"),
    (route_without_listener, "gateway", "labels", "listens as 'http'"),
    (too_few_gpus, "multi-gpu-tp", "resources", "reserves 2 GPUs on a node, a pod has 1"),
    (too_few_cpus, "single-gpu", "resources", "reserves 4 CPUs, a pod has 2"),
    (engines_on_the_head, "single-gpu", "resources", "num-cpus is not 0"),
    (room_for_evaluators, "single-gpu", "resources", "evaluators would disturb an engine"),
    (one_host, "multi-node-tp", "resources", "numOfHosts is 1, replica.nodes is 2"),
    (too_few_pods, "single-gpu", "resources", "up to 8 replicas on 4 pods at most"),
    (missing_secret, "single-gpu", "references", "there is no secret 'memshare-keys'"),
    (missing_redis_secret, "ha", "references", "there is no secret 'memshare-redis'"),
    (missing_certificate, "gateway", "references", "there is no secret 'tls'"),
    (missing_claim, "shared-models", "references", "there is no claim 'memshare-models'"),
    (missing_account, "single-gpu", "references", "there is no service account 'memshare'"),
    (unknown_volume, "single-gpu", "references", "mounts what is no volume: tmp"),
    (closed_to_clients, "single-gpu", "network", "clients through to port 'serve-grpc'"),
    (closed_to_ray, "single-gpu", "network", "lets evaluators through to Ray's ports"),
    (open_to_everybody, "single-gpu", "network", "lets everybody in"),
    (root, "single-gpu", "security", "runAsNonRoot is not True"),
    (writable_image, "single-gpu", "security", "readOnlyRootFilesystem is not True"),
    (nowhere_to_write, "single-gpu", "security", "can't write to /tmp"),
    (ray_without_token, "single-gpu", "security", "takes orders from whoever"),
    (token_for_the_api_server, "single-gpu", "security", "has a token for the API server"),
    (wrong_variable_of_ray, "single-gpu", "environment", "RAY_memory_monitor_refresh_mss"),
    (wrong_variable_of_vllm, "single-gpu", "environment", "VLLM_NO_USAGE_STAT"),
    (wrong_variable_of_memshare, "single-gpu", "environment", "mod"),
    (wrong_module, "single-gpu", "commands", "cluster.drian is not in the image"),
    (wrong_image, "single-gpu", "commands", "no recipe in k8s/images makes"),
    (other_version, "single-gpu", "commands", "is not version"),
    (other_user, "single-gpu", "commands", "the image is made for user 10001"),
    (missing_model, "cpu-demo", "commands", "/models/smollm2-135m is not in the image"),
    (plain_secret, "cpu-demo", "security", "no table of hashed keys"),
    (unknown_metric, "observability", "queries", "'ray_vllm_num_preemption_total'"),
    (unknown_label, "observability", "queries", "has no label 'polcy'"),
    (unknown_metric_of_a_panel, "observability", "queries", "memshare_aplied_total"),
    (broken_query, "observability", "queries", "is no PromQL"),
    (alert_without_runbook, "observability", "queries", "has no section for it"),
    (metrics_closed, "observability", "network", "clients through to port 'metrics'"),
    (wrong_scrape_port, "observability", "ports", "has no port 'metric'"),
    (killed_while_draining, "single-gpu", "lifecycle", "killed after 30 s"),
    (budget_in_percent, "single-gpu", "lifecycle", "only a number in minAvailable works"),
    (impatient_start, "single-gpu", "lifecycle", "before ten minutes have passed"),
]
