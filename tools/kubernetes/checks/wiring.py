"""What refers to something else: ports, selectors, names, network policies."""

from __future__ import annotations

from collections.abc import Iterator

from tools.kubernetes.build import WORKLOADS, Found, Manifest, Manifests, Pod, selects
from tools.kubernetes.layout import GRPC_PORT, METRICS_PORT

AGENT_PORT = 52365  # of Ray's agent on every node, with the health of the node


def ports(manifests: Manifests) -> Found:
    """Every port that is named somewhere is the one that something listens on."""
    yield from _listening(manifests)
    yield from _probed(manifests)
    yield from _offered(manifests)
    for monitor in manifests.of("PodMonitor"):
        for pod in manifests.selected(monitor["spec"]["selector"]):
            for endpoint in monitor["spec"]["podMetricsEndpoints"]:
                if endpoint["port"] not in pod.ports:
                    name = monitor["metadata"]["name"]
                    yield f"PodMonitor/{name}", f"{pod.where} has no port {endpoint['port']!r}"


def _proxy_ports(manifests: Manifests) -> dict[str, int]:
    """Names of the ports of Ray Serve's proxies, and where they listen."""
    config = manifests.serve_config
    grpc = config.get("grpc_options", {}).get("port", GRPC_PORT)
    return {"serve": config["http_options"]["port"], "serve-grpc": grpc}


def _listening(manifests: Manifests) -> Found:
    """Pods name the ports that Ray uses."""
    if manifests.serve_config["http_options"]["host"] != "0.0.0.0":
        yield "serveConfigV2", "the proxies listen on an address that other pods can't reach"
    listens = {**_proxy_ports(manifests), "metrics": METRICS_PORT}
    for pod in manifests.ray_pods:
        assert pod.ray_params is not None
        for name, number in listens.items():
            if pod.ports.get(name) != number:
                yield pod.where, f"port {name!r} is {pod.ports.get(name)}, Ray uses {number}"
        if pod.ray_params.get("metrics-export-port") != str(METRICS_PORT):
            yield pod.where, f"metrics-export-port is not {METRICS_PORT}, where they are scraped"


def _probed(manifests: Manifests) -> Found:
    """Probes ask where something listens."""
    for pod in manifests.pods:
        known = {*pod.ports, *pod.ports.values(), AGENT_PORT}
        for container in pod.containers:
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                action = container.get(probe, {})
                port = (action.get("httpGet") or action.get("tcpSocket") or {}).get("port")
                if port is not None and port not in known:
                    yield pod.where, f"{probe} asks port {port!r}, where nothing listens"


def _offered(manifests: Manifests) -> Found:
    """Services offer what pods listen on, and routes lead to what services offer."""
    listens = _proxy_ports(manifests)
    offered = {port["name"]: port["port"] for port in manifests.serve_service["spec"]["ports"]}
    if offered != listens:
        yield "serveService", f"offers {offered}, the proxies listen on {listens}"
    backends = {manifests.serve_service["metadata"]["name"]: set(offered.values())}
    for service in manifests.of("Service"):
        name, spec = service["metadata"]["name"], service["spec"]
        backends[name] = {port["port"] for port in spec["ports"]}
        for port in spec["ports"]:
            target = port.get("targetPort", port["port"])
            for pod in manifests.selected({"matchLabels": spec["selector"]}):
                if target not in {*pod.ports, *pod.ports.values()}:
                    yield f"Service/{name}", f"port {target!r} is none of {pod.where}"
    for route in manifests.of("HTTPRoute", "GRPCRoute"):
        for rule in route["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                if backend["port"] not in backends.get(backend["name"], set()):
                    where = f"{route['kind']}/{route['metadata']['name']}"
                    yield where, f"{backend['name']}:{backend['port']} is no port of a service"


def labels(manifests: Manifests) -> Found:
    """Every selector selects a pod."""
    for manifest in manifests.all:
        where = f"{manifest['kind']}/{manifest['metadata']['name']}"
        spec = manifest.get("spec", {})
        selector = _selector(manifest["kind"], spec)
        if selector is not None and not list(manifests.selected(selector)):
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
            section = parent.get("sectionName")
            if section not in listeners:
                yield where, f"no gateway {parent['name']!r} listens as {section!r}"
            elif listeners[section] not in route["spec"]["hostnames"]:
                yield where, "has another host name than its listener"


def references(manifests: Manifests) -> Found:
    """What is referred to by name exists, or is said to be made by the operator."""
    secrets = manifests.names("Secret") | manifests.needed_secrets
    known = {
        "secret": secrets,
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
    yield from _volumes(manifests)
    for where, name in _named_secrets(manifests):
        if name not in secrets:
            yield where, f"there is no secret {name!r}"
    fault_tolerance = manifests.cluster.get("gcsFaultToleranceOptions", {})
    if "redisAddress" in fault_tolerance:
        host = fault_tolerance["redisAddress"].rpartition(":")[0]
        if host not in manifests.names("Service"):
            yield "gcsFaultToleranceOptions", f"there is no service {host!r}"


def _volumes(manifests: Manifests) -> Found:
    """Mounts are volumes, and volumes are mounted."""
    for pod in manifests.pods:
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


def _named_secrets(manifests: Manifests) -> Found:
    """(where, name) of secrets that others than pods refer to."""
    fault_tolerance = manifests.cluster.get("gcsFaultToleranceOptions", {})
    if "redisPassword" in fault_tolerance:
        source = fault_tolerance["redisPassword"]["valueFrom"]["secretKeyRef"]
        yield "gcsFaultToleranceOptions", source["name"]
    for gateway in manifests.of("Gateway"):
        for listener in gateway["spec"]["listeners"]:
            for certificate in listener["tls"]["certificateRefs"]:
                yield f"Gateway/{gateway['metadata']['name']}", certificate["name"]


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


def _selector(kind: str, spec: Manifest) -> Manifest | None:
    """The label selector by which a manifest of this kind chooses pods, if it does."""
    if kind == "NetworkPolicy":
        return dict(spec["podSelector"])
    if kind == "Service":
        return {"matchLabels": spec["selector"]}
    if kind in ("PodDisruptionBudget", "PodMonitor", *WORKLOADS) and kind != "Job":
        return dict(spec["selector"])
    return None


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


def _claims(manifests: Manifests, pod: Pod) -> set[str]:
    return {
        claim["metadata"]["name"]
        for workload in manifests.of("StatefulSet")
        if workload["spec"]["template"] is pod.template
        for claim in workload["spec"].get("volumeClaimTemplates", [])
    }
