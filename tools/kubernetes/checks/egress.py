"""Where pods may call: names, collectors, hubs; on both protocols."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from tools.kubernetes.build import Found, Manifest, Manifests, Pod, selects

NODE_LOCAL_DNS = "169.254.20.10/32"
EVERYWHERE = ("0.0.0.0/0", "::/0")
OTLP_PORTS = {"grpc": 4317, "http/protobuf": 4318}


def egress(manifests: Manifests) -> Found:
    """Pods reach DNS, wherever the cluster has it, hubs, and the collector of their spans."""
    for pod in manifests.ray_pods:
        rules = list(_rules(manifests, pod))
        for protocol in ("UDP", "TCP"):
            if not any(_in_kube_system(peer) for peer in _peers(rules, 53, protocol)):
                yield pod.where, f"can't ask the cluster's DNS by {protocol}"
            if NODE_LOCAL_DNS not in _blocks(rules, 53, protocol):
                yield pod.where, f"can't ask NodeLocal DNS by {protocol}"
        for port in (443, 6443):
            open_to = set(_blocks(rules, port, "TCP")) & set(EVERYWHERE)
            if open_to and len(open_to) < len(EVERYWHERE):
                yield pod.where, f"reaches port {port} on {open_to.pop()} only"
        for port in OTLP_PORTS.values():
            if not list(_peers(rules, port, "TCP")):
                yield pod.where, f"reaches no OpenTelemetry collector on port {port}"
    engine = list(_rules(manifests, manifests.pod("engines")))
    for args in manifests.arguments:
        endpoint = args.engine.extra.get("otlp_traces_endpoint")
        if isinstance(endpoint, str):
            transport = args.replica.env.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc")
            port = urlsplit(endpoint).port or OTLP_PORTS[transport]
            if not list(_peers(engine, port, "TCP")):
                yield "serveConfigV2", f"no policy lets spans through to {endpoint}"


def _rules(manifests: Manifests, pod: Pod) -> Iterator[Manifest]:
    """Rules for what this pod may call."""
    for policy in manifests.of("NetworkPolicy"):
        if selects(policy["spec"]["podSelector"], pod.labels):
            yield from policy["spec"].get("egress", [])


def _peers(rules: list[Manifest], port: int, protocol: str) -> Iterator[Manifest]:
    """Whom these rules let be called on a port, the cluster's own pods left out."""
    for rule in rules:
        if {"port": port, "protocol": protocol} in rule.get("ports", []):
            yield from rule.get("to", [])


def _blocks(rules: list[Manifest], port: int, protocol: str) -> Iterator[str]:
    return (peer["ipBlock"]["cidr"] for peer in _peers(rules, port, protocol) if "ipBlock" in peer)


def _in_kube_system(peer: Manifest) -> bool:
    labels = {"kubernetes.io/metadata.name": "kube-system"}
    return "namespaceSelector" in peer and selects(peer["namespaceSelector"], labels)
