"""Every overlay builds and passes every check; every planted mistake is found by its name."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.kubernetes import schemas, serve_config
from tools.kubernetes.build import BuildError, Manifests, build, selects
from tools.kubernetes.checks import CHECKS, run
from tools.kubernetes.checks.serving import GPU
from tools.kubernetes.layout import K8S, KEY_TABLE, OVERLAYS, ROOT, SERVED
from tools.make_k8s import files

Overlays = Callable[[str], Manifests]

NAMES = [folder.name for folder in OVERLAYS]


def engine(manifests: Manifests) -> dict[str, Any]:
    """The container of an engine."""
    container: dict[str, Any] = manifests.pod("engines").spec["containers"][0]
    return container


def test_all_overlays_of_the_documentation_are_there() -> None:
    assert set(NAMES) >= {
        *("cpu-demo", "single-gpu", "multi-gpu-tp", "multi-node-tp"),
        *("observability", "ha", "gateway", "tenants", "production"),
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
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: python tools/make_k8s.py"


@pytest.mark.parametrize("folder", SERVED, ids=lambda folder: folder.name)
def test_serve_configurations_are_the_files_of_configs(folder: Path) -> None:
    """What a pod serves differs from the file in the four values that it must, and in no other."""
    patch = yaml.safe_load((folder / "serve-config.yaml").read_text(encoding="utf-8"))
    served = yaml.safe_load(patch["spec"]["serveConfigV2"])
    file = serve_config.load(SERVED[folder])
    assert served["http_options"].pop("host") == "0.0.0.0"
    assert served.pop("proxy_location") == "EveryNode"
    file["http_options"].pop("host")
    file.pop("proxy_location")
    for mine, theirs in zip(served["applications"], file["applications"], strict=True):
        assert mine["args"].pop("model").endswith(theirs["args"].pop("model"))
        assert mine["args"].pop("auth") == {"file": KEY_TABLE}
        theirs["args"].pop("auth", None)
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


# --------------------------------------------------------------------------- planted mistakes


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


MISTAKES: list[tuple[Callable[[Manifests], None], str, str, str]] = [
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
    (missing_claim, "single-gpu", "references", "there is no claim 'memshare-models'"),
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


@pytest.mark.parametrize(
    ("mistake", "overlay", "check", "words"), MISTAKES, ids=[m[0].__name__ for m in MISTAKES]
)
def test_a_planted_mistake_is_found_by_name(
    overlays: Overlays,
    mistake: Callable[[Manifests], None],
    overlay: str,
    check: str,
    words: str,
) -> None:
    manifests = overlays(overlay)
    mistake(manifests)
    found = [f"{where}: {message}" for where, message in CHECKS[check](manifests)]
    assert any(words in text for text in found), found


def test_every_check_has_a_planted_mistake() -> None:
    assert {check for _, _, check, _ in MISTAKES} == set(CHECKS)


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


def test_the_page_lists_what_there_is() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    for kind in ("overlays", "components"):
        for folder in (K8S / kind).iterdir():
            assert f"`{folder.name}`" in page, folder.name
    for secret in ("memshare-keys", "memshare-redis", "memshare-tls", "memshare-hub"):
        assert f"| `{secret}` |" in page
