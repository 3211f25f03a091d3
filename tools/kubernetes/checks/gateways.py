"""Streams that last for minutes get through the gateway."""

from __future__ import annotations

from tools.kubernetes.build import Found, Manifest, Manifests

ENVOY = "eg"  # the class under which Envoy Gateway's own guide installs it
UNLIMITED = "0s"


def gateways(manifests: Manifests) -> Found:
    """No route ends a request after the gateway's default of seconds."""
    for route in manifests.of("HTTPRoute"):
        for rule in route["spec"]["rules"]:
            timeouts = rule.get("timeouts", {})
            for name in ("request", "backendRequest"):
                if timeouts.get(name) != UNLIMITED:
                    yield _name(route), f"timeouts.{name} is not {UNLIMITED}: streams are cut"
    by_envoy = {
        gateway["metadata"]["name"]
        for gateway in manifests.of("Gateway")
        if gateway["spec"]["gatewayClassName"] == ENVOY
    }
    policies = list(manifests.of("BackendTrafficPolicy"))
    for route in manifests.of("GRPCRoute"):
        if not by_envoy & {parent["name"] for parent in route["spec"]["parentRefs"]}:
            continue
        mine = [policy for policy in policies if _name(route) in _targets(policy)]
        if not mine:
            yield _name(route), "Envoy cuts its streams after 15 s: no BackendTrafficPolicy"
        for policy in mine:
            if policy["spec"].get("timeout", {}).get("http", {}).get("requestTimeout") != UNLIMITED:
                yield _name(route), "Envoy cuts its streams: requestTimeout is not 0s"
    routes = {_name(route) for route in manifests.of("HTTPRoute", "GRPCRoute")}
    for policy in policies:
        for target in sorted(_targets(policy) - routes):
            yield _name(policy), f"there is no {target}"


def _targets(policy: Manifest) -> set[str]:
    return {f"{target['kind']}/{target['name']}" for target in policy["spec"]["targetRefs"]}


def _name(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"
