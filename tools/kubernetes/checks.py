"""Every check of the manifests that needs no cluster.

Each check has a name, by which a finding can be told from others: a wrong port is found by
``ports``, a secret that nobody makes by ``references``. A check looks at what kustomize has built.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from cluster.config import ClusterArgs, parse_cluster_args
from cluster.keys import parse_table
from memshare import __version__
from memshare.config import ENV_PREFIX, ConfigError, load_config
from tools.kubernetes import alerts, images, promql, schemas, serve_config
from tools.kubernetes.build import WORKLOADS, Manifest, Manifests, Pod, selects
from tools.kubernetes.layout import GRPC_PORT, METRICS_PORT, ROOT, SERVED

AGENT_PORT = 52365  # of Ray's agent on every node, with the health of the node
GPU = "nvidia.com/gpu"

# Set by pods, read by libraries that keep no list of their names.
PLAIN_VARIABLES = {
    "HOME", "HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "REDIS_PASSWORD",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """Something that is wrong."""

    check: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"[{self.check}] {self.where}: {self.message}"


# What a check yields: (where, message).
Found = Iterator[tuple[str, str]]
Check = Callable[[Manifests], Found]


def schema(manifests: Manifests) -> Found:
    """Fields exist and have the right types; nothing is misspelt."""
    yield from schemas.all_errors(manifests)


def serve(manifests: Manifests) -> Found:
    """The Serve configuration is one of ours, accepted by Ray and by MemShare."""
    config = manifests.serve_config
    if config not in [serve_config.for_pods(serve_config.load(name)) for name in SERVED.values()]:
        yield "serveConfigV2", "differs from every file of configs/: run python tools/make_k8s.py"
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        yield "serveConfigV2", str(error)
    unknown = set(config) - set(ServeDeploySchema.model_fields)
    for name in sorted(unknown):
        yield "serveConfigV2", f"Ray Serve knows no {name!r}"
    for application in config["applications"]:
        try:
            parse_cluster_args(application["args"], environ={})
        except ConfigError as error:
            yield "serveConfigV2", str(error)


def ports(manifests: Manifests) -> Found:
    """Every port that is named somewhere is the one that something listens on."""
    config = manifests.serve_config
    if config["http_options"]["host"] != "0.0.0.0":
        yield "serveConfigV2", "the proxies listen on an address that other pods can't reach"
    listens = {"serve": config["http_options"]["port"], "metrics": METRICS_PORT}
    listens["serve-grpc"] = config.get("grpc_options", {}).get("port", GRPC_PORT)
    for pod in manifests.ray_pods:
        assert pod.ray_params is not None
        for name, number in listens.items():
            if pod.ports.get(name) != number:
                yield pod.where, f"port {name!r} is {pod.ports.get(name)}, Ray uses {number}"
        if pod.ray_params.get("metrics-export-port") != str(METRICS_PORT):
            yield pod.where, f"metrics-export-port is not {METRICS_PORT}, where they are scraped"
    for pod in manifests.pods:
        known = {*pod.ports, *pod.ports.values()}
        for container in pod.containers:
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                action = container.get(probe, {})
                port = (action.get("httpGet") or action.get("tcpSocket") or {}).get("port")
                if port is not None and port not in known and port != AGENT_PORT:
                    yield pod.where, f"{probe} asks port {port!r}, where nothing listens"
    offered = {port["name"]: port["port"] for port in _serve_service(manifests)["spec"]["ports"]}
    if offered != {name: listens[name] for name in ("serve", "serve-grpc")}:
        yield "serveService", f"offers {offered}, the proxies listen on {listens}"
    backends = {_serve_service(manifests)["metadata"]["name"]: set(offered.values())}
    for service in manifests.of("Service"):
        name, numbers = service["metadata"]["name"], set()
        for port in service["spec"]["ports"]:
            numbers.add(port["port"])
            target = port.get("targetPort", port["port"])
            for pod in _selected(manifests, {"matchLabels": service["spec"]["selector"]}):
                if target not in {*pod.ports, *pod.ports.values()}:
                    yield f"Service/{name}", f"port {target!r} is none of {pod.where}"
        backends[name] = numbers
    for route in manifests.of("HTTPRoute", "GRPCRoute"):
        for rule in route["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                if backend["port"] not in backends.get(backend["name"], set()):
                    where = f"{route['kind']}/{route['metadata']['name']}"
                    yield where, f"{backend['name']}:{backend['port']} is no port of a service"
    for monitor in manifests.of("PodMonitor"):
        for pod in _selected(manifests, monitor["spec"]["selector"]):
            for endpoint in monitor["spec"]["podMetricsEndpoints"]:
                if endpoint["port"] not in pod.ports:
                    name = monitor["metadata"]["name"]
                    yield f"PodMonitor/{name}", f"{pod.where} has no port {endpoint['port']!r}"


def labels(manifests: Manifests) -> Found:
    """Every selector selects a pod."""
    for manifest in manifests.all:
        where = f"{manifest['kind']}/{manifest['metadata']['name']}"
        spec = manifest.get("spec", {})
        selector = _selector(manifest["kind"], spec)
        if selector is not None and not list(_selected(manifests, selector)):
            yield where, "its selector selects no pod"
    for route in manifests.of("HTTPRoute", "GRPCRoute"):
        for parent in route["spec"]["parentRefs"]:
            listeners = {
                listener["name"]: listener.get("hostname")
                for gateway in manifests.of("Gateway")
                if gateway["metadata"]["name"] == parent["name"]
                for listener in gateway["spec"]["listeners"]
            }
            where = f"{route['kind']}/{route['metadata']['name']}"
            if parent.get("sectionName") not in listeners:
                yield (
                    where,
                    f"no gateway {parent['name']!r} listens as {parent.get('sectionName')!r}",
                )
            elif listeners[parent["sectionName"]] not in route["spec"]["hostnames"]:
                yield where, "has another host name than its listener"


def resources(manifests: Manifests) -> Found:
    """What Ray has to place fits on the pods: replicas, their workers, evaluators."""
    engines, evaluators = manifests.pod("engines"), manifests.pod("evaluators")
    if manifests.cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        yield "head", "num-cpus is not 0: engines could be placed on it"
    for pod in manifests.ray_pods:
        container = pod.spec["containers"][0]
        requests = container["resources"]["requests"]
        limits = container["resources"].get("limits", {})
        if requests["memory"] != limits.get("memory"):
            yield pod.where, "memory is limited to something else than what is requested"
        if requests.get(GPU) != limits.get(GPU):
            yield pod.where, "GPUs are limited to something else than what is requested"
    for args in _arguments(manifests):
        replica, ranks = args.replica, args.engine.tensor_parallel_size
        cpus, gpus = _ray_cpus(engines), _gpus(engines)
        by_ray = args.engine.distributed_executor_backend == "ray"
        if engines.hosts != replica.nodes:
            yield "engines", f"numOfHosts is {engines.hosts}, replica.nodes is {replica.nodes}"
        if replica.cpus > cpus:
            yield "engines", f"a replica reserves {replica.cpus:g} CPUs, a pod has {cpus:g}"
        wanted = ranks / replica.nodes if by_ray and replica.gpus else replica.gpus
        if wanted > gpus:
            yield "engines", f"a replica reserves {wanted:g} GPUs on a node, a pod has {gpus:g}"
        if not replica.gpus and gpus:
            yield "engines", "the pod has a GPU that no replica reserves"
        request = engines.spec["containers"][0]["resources"]["requests"]["cpu"]
        if _cores(request) < cpus:
            yield "engines", f"Ray may use {cpus:g} CPUs, the pod requests {request}"
        replicas = manifests.cluster["workerGroupSpecs"][0]["replicas"]
        if replicas < args.replicas:
            yield "engines", f"{args.replicas} replicas on {replicas} pods"
        if not args.uses_pool:
            continue
        pool = args.memshare.evaluator
        spare = cpus - replica.cpus
        if spare >= pool.cpus_per_actor and engines.hosts == 1:
            yield "engines", f"{spare:g} CPUs are left, where evaluators would disturb an engine"
        groups = {group["groupName"]: group for group in manifests.cluster["workerGroupSpecs"]}
        most = groups["evaluators"]["maxReplicas"] * _ray_cpus(evaluators)
        if pool.actors * pool.cpus_per_actor > most:
            yield "evaluators", f"{pool.actors} actors need more than {most:g} CPUs"


def references(manifests: Manifests) -> Found:
    """What is referred to by name exists, or is said to be made by the operator."""
    known = {
        "secret": manifests.names("Secret") | manifests.needed_secrets,
        "config map": manifests.names("ConfigMap"),
        "claim": manifests.names("PersistentVolumeClaim"),
    }
    for pod in manifests.pods:
        account = pod.spec.get("serviceAccountName")
        if account not in manifests.names("ServiceAccount"):
            yield pod.where, f"there is no service account {account!r}"
        for kind, name in _references(pod):
            if name not in known[kind]:
                yield pod.where, f"there is no {kind} {name!r}"
        volumes = {volume["name"] for volume in pod.spec.get("volumes", [])}
        volumes |= _claims(manifests, pod)
        mounted = {
            mount["name"]
            for container in pod.containers
            for mount in container.get("volumeMounts", [])
        }
        if mounted - volumes:
            yield pod.where, f"mounts what is no volume: {', '.join(sorted(mounted - volumes))}"
        if volumes - mounted:
            yield pod.where, f"has a volume for nothing: {', '.join(sorted(volumes - mounted))}"
    head = {volume["name"] for volume in manifests.pod("head").spec["volumes"]}
    for mount in manifests.cluster["autoscalerOptions"]["volumeMounts"]:
        if mount["name"] not in head:
            yield "autoscalerOptions", f"mounts what is no volume of the head: {mount['name']}"
    fault_tolerance = manifests.cluster.get("gcsFaultToleranceOptions")
    if fault_tolerance:
        host = fault_tolerance["redisAddress"].rpartition(":")[0]
        if host not in manifests.names("Service"):
            yield "gcsFaultToleranceOptions", f"there is no service {host!r}"
        secret = fault_tolerance["redisPassword"]["valueFrom"]["secretKeyRef"]["name"]
        if secret not in known["secret"]:
            yield "gcsFaultToleranceOptions", f"there is no secret {secret!r}"
    for gateway in manifests.of("Gateway"):
        for listener in gateway["spec"]["listeners"]:
            for certificate in listener["tls"]["certificateRefs"]:
                if certificate["name"] not in known["secret"]:
                    where = f"Gateway/{gateway['metadata']['name']}"
                    yield where, f"there is no secret {certificate['name']!r}"


def network(manifests: Manifests) -> Found:
    """Traffic that must flow is let through, by port name; nobody else gets in."""
    policies = list(manifests.of("NetworkPolicy"))
    for pod in manifests.pods:
        mine = [p["spec"] for p in policies if selects(p["spec"]["podSelector"], pod.labels)]
        if not any("Ingress" in spec["policyTypes"] for spec in mine):
            yield pod.where, "no policy guards it"
            continue
        rules = [rule for spec in mine for rule in spec.get("ingress", [])]
        if any("from" not in rule for rule in rules):
            yield pod.where, "a rule lets everybody in"
        named = {port["port"] for rule in rules for port in rule.get("ports", []) if "from" in rule}
        wanted = {"head": {"dashboard"}, "engine": {"serve", "serve-grpc"}}.get(pod.role, set())
        if manifests.names("PodMonitor") and pod.ray_params is not None:
            wanted = {*wanted, "metrics"}
        for port in sorted(wanted - named):
            yield pod.where, f"no policy lets clients through to port {port!r}"
        peers = [peer for rule in rules if "ports" not in rule for peer in rule["from"]]
        for other in manifests.pods:
            if not any(selects(peer.get("podSelector", {}), other.labels) for peer in peers):
                yield pod.where, f"no policy lets {other.where} through to Ray's ports"
    for policy in policies:
        for rule in policy["spec"].get("ingress", []):
            for port in rule.get("ports", []):
                if isinstance(port["port"], str) and not any(
                    port["port"] in pod.ports for pod in manifests.pods
                ):
                    where = f"NetworkPolicy/{policy['metadata']['name']}"
                    yield where, f"there is no port {port['port']!r}"


def security(manifests: Manifests) -> Found:
    """Pods fit Kubernetes' restricted standard, and can't write to their image."""
    contexts = [
        (pod.where, pod.spec.get("securityContext", {}), container.get("securityContext", {}))
        for pod in manifests.pods
        for container in pod.containers
    ]
    autoscaler = manifests.cluster["autoscalerOptions"].get("securityContext", {})
    for where, of_pod, of_container in [*contexts, ("autoscaler", {}, autoscaler)]:
        context = {**of_pod, **of_container}
        wanted = {
            "runAsNonRoot": True,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        for name, value in wanted.items():
            if context.get(name) != value:
                yield where, f"securityContext.{name} is not {value}"
        if not context.get("runAsUser"):
            yield where, "runs as root, or as whoever the image says"
    for pod in manifests.pods:
        if any(pod.spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
            yield pod.where, "shares a namespace of its node"
        if pod.role != "head" and pod.spec.get("automountServiceAccountToken") is not False:
            yield pod.where, "has a token for the API server and needs none"
        for container in pod.containers:
            writable = {m["mountPath"] for m in container.get("volumeMounts", [])}
            if pod.ray_params is not None and not {"/tmp", _home(container)} <= writable:
                yield pod.where, "Ray can't write to /tmp and its home folder"
    for secret in manifests.of("Secret"):
        for name, text in secret.get("data", {}).items():
            if not _is_key_table(b64decode(text).decode()):
                where = f"Secret/{secret['metadata']['name']}"
                yield where, f"{name} is no table of hashed keys, and secrets don't belong in files"
    if manifests.cluster.get("authOptions", {}).get("mode") != "token":
        yield "authOptions", "Ray takes orders from whoever reaches its ports"


def environment(manifests: Manifests) -> Found:
    """Variables have names that somebody reads."""
    variables = [
        (pod.where, variable["name"])
        for pod in manifests.pods
        for container in pod.containers
        for variable in container.get("env", [])
    ]
    for args in _arguments(manifests):
        variables += [("serveConfigV2", name) for name in args.replica.env]
    for where, name in variables:
        if not _is_read(name):
            yield where, f"nobody reads the variable {name}"
    given = {
        variable["name"]: variable.get("value", "")
        for pod in manifests.ray_pods
        for variable in pod.spec["containers"][0].get("env", [])
        if variable["name"].startswith(ENV_PREFIX)
    }
    try:
        load_config(environ=given)
    except ConfigError as error:
        yield "environment", str(error)


def commands(manifests: Manifests) -> Found:
    """What is run, imported or loaded in a pod is in its image."""
    for pod in manifests.ray_pods:
        container = pod.spec["containers"][0]
        recipe = images.recipe_of(container["image"])
        if recipe is None:
            yield pod.where, f"no recipe in k8s/images makes {container['image']}"
            continue
        if container["image"].rpartition(":")[2] != __version__:
            yield pod.where, f"{container['image']} is not version {__version__}"
        if container["securityContext"].get("runAsUser") != recipe.user:
            yield pod.where, f"the image is made for user {recipe.user}"
        if _home(container) != recipe.home:
            yield pod.where, f"the image's home folder is {recipe.home}"
        for hook in container.get("lifecycle", {}).values():
            yield from ((pod.where, message) for message in recipe.misses(hook["exec"]["command"]))
        for application in manifests.serve_config["applications"]:
            module = application["import_path"].partition(":")[0]
            if not recipe.has_module(module):
                yield "serveConfigV2", f"{module} is not in the image"
            model = application["args"]["model"]
            if model.startswith("/") and not recipe.has_path(model):
                yield "serveConfigV2", f"the model {model} is not in the image"
        for function in manifests.serve_config.get("grpc_options", {}).get(
            "grpc_servicer_functions", []
        ):
            module = function.rpartition(".")[0]
            if not recipe.has_module(module) and find_spec(module.partition(".")[0]) is None:
                yield "serveConfigV2", f"{module} is not in the image"


def lifecycle(manifests: Manifests) -> Found:
    """Streams that run have the time to finish."""
    engines = manifests.pod("engines")
    grace = engines.spec.get("terminationGracePeriodSeconds", 30)
    command = engines.spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    deadline = float(command[command.index("--deadline-s") + 1])
    for args in _arguments(manifests):
        if args.replica.graceful_shutdown_timeout_s > deadline:
            yield "engines", "replicas may take longer to stop than the drain waits"
    if deadline >= grace:
        yield "engines", f"the pod is killed after {grace} s, while it drains for {deadline:g} s"
    if manifests.rayservice["spec"].get("rayClusterDeletionDelaySeconds", 60) < deadline:
        yield "RayService", "an old cluster is deleted before its streams can finish"
    for budget in manifests.of("PodDisruptionBudget"):
        if not isinstance(budget["spec"].get("minAvailable"), int):
            where = f"PodDisruptionBudget/{budget['metadata']['name']}"
            yield where, "Ray's pods have no scale: only a number in minAvailable works"
    for pod in manifests.ray_pods:
        probe = pod.spec["containers"][0].get("startupProbe", {})
        if probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3) < 600:
            yield pod.where, "is killed before ten minutes have passed for its start"


def queries(manifests: Manifests) -> Found:
    """Dashboards and alerts ask for series that exist, and every alert says what to do."""
    for rule in manifests.of("PrometheusRule"):
        pages = (ROOT / alerts.RUNBOOKS).read_text(encoding="utf-8")
        for group in rule["spec"]["groups"]:
            for alert in group["rules"]:
                for fault in promql.faults(alert["expr"]):
                    yield alert["alert"], fault
                if f"\n## {alert['alert']}\n" not in pages:
                    yield alert["alert"], f"{alerts.RUNBOOKS} has no section for it"
    for config in manifests.of("ConfigMap"):
        if "grafana_dashboard" not in config["metadata"].get("labels", {}):
            continue
        for file, text in config["data"].items():
            for panel in json.loads(text)["panels"]:
                for target in panel.get("targets", []):
                    for fault in promql.faults(target["expr"]):
                        yield f"{file}: {panel['title']}", fault


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        schema, serve, ports, labels, resources, references, network, security, environment,
        commands, lifecycle, queries,
    )
}  # fmt: skip


def run(manifests: Manifests) -> list[Finding]:
    """All findings of all checks."""
    return [
        Finding(name, where, message)
        for name, check in CHECKS.items()
        for where, message in check(manifests)
    ]


def _selector(kind: str, spec: Manifest) -> Manifest | None:
    """The label selector by which a manifest of this kind chooses pods, if it does."""
    if kind == "NetworkPolicy":
        return dict(spec["podSelector"])
    if kind == "Service":
        return {"matchLabels": spec["selector"]}
    if kind in ("PodDisruptionBudget", "PodMonitor", *WORKLOADS):
        return dict(spec["selector"])
    return None


def _serve_service(manifests: Manifests) -> Manifest:
    service: Manifest = manifests.rayservice["spec"]["serveService"]
    return service


def _selected(manifests: Manifests, selector: Manifest) -> Iterator[Pod]:
    return (pod for pod in manifests.pods if selects(selector, pod.labels))


def _arguments(manifests: Manifests) -> Iterator[ClusterArgs]:
    for application in manifests.serve_config["applications"]:
        try:
            yield parse_cluster_args(application["args"], environ={})
        except ConfigError:
            continue  # reported by `serve`


def _references(pod: Pod) -> Iterator[tuple[str, str]]:
    for volume in pod.spec.get("volumes", []):
        if "secret" in volume and not volume["secret"].get("optional"):
            yield "secret", volume["secret"]["secretName"]
        if "configMap" in volume and not volume["configMap"].get("optional"):
            yield "config map", volume["configMap"]["name"]
        if "persistentVolumeClaim" in volume:
            yield "claim", volume["persistentVolumeClaim"]["claimName"]
    for container in pod.containers:
        for variable in container.get("env", []):
            source = variable.get("valueFrom", {})
            for key, kind in (("secretKeyRef", "secret"), ("configMapKeyRef", "config map")):
                if key in source and not source[key].get("optional"):
                    yield kind, source[key]["name"]


def _is_key_table(text: str) -> bool:
    try:
        parse_table(text, "secret")
    except ConfigError:
        return False
    return True


def _claims(manifests: Manifests, pod: Pod) -> set[str]:
    return {
        claim["metadata"]["name"]
        for workload in manifests.of("StatefulSet")
        if workload["spec"]["template"] is pod.template
        for claim in workload["spec"].get("volumeClaimTemplates", [])
    }


def _ray_cpus(pod: Pod) -> float:
    assert pod.ray_params is not None
    return float(pod.ray_params["num-cpus"])


def _gpus(pod: Pod) -> float:
    return float(pod.spec["containers"][0]["resources"].get("limits", {}).get(GPU, 0))


def _cores(quantity: Any) -> float:
    text = str(quantity)
    return float(text.removesuffix("m")) / 1000 if text.endswith("m") else float(text)


def _home(container: Manifest) -> str:
    return str({v["name"]: v.get("value") for v in container.get("env", [])}.get("HOME"))


@cache
def _is_read(name: str) -> bool:
    if name in PLAIN_VARIABLES:
        return True
    if name.startswith(ENV_PREFIX):
        return True  # `environment` reads them with MemShare's own loader
    if name.startswith("VLLM_"):
        return name in _vllm_variables()
    return name.startswith("RAY_") and _ray_knows(name)


@cache
def _vllm_variables() -> frozenset[str]:
    # Read, not imported: `import vllm` takes many seconds.
    source = _package("vllm") / "envs.py"
    return frozenset(re.findall(r'"(VLLM_\w+)"\s*:', source.read_text(encoding="utf-8")))


@cache
def _ray_knows(name: str) -> bool:
    """Whether Ray's Python names the variable, or its C++ core has an option of that name."""
    folder = _package("ray")
    word = re.compile(rb"\b" + name.encode() + rb"\b")
    for file in [*(folder / "_private").glob("*.py"), *(folder / "_common").rglob("*.py")]:
        if word.search(file.read_bytes()):
            return True
    core = (folder / "core" / "src" / "ray" / "raylet" / "raylet").read_bytes()
    return name.encode() + b"\0" in core or name.removeprefix("RAY_").encode() + b"\0" in core


def _package(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
