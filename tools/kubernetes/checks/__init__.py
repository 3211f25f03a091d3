"""Every check of the manifests that needs no cluster.

Each check has a name, by which a finding can be told from others: a wrong port is found by
``ports``, a secret that nobody makes by ``references``. A check looks at what kustomize has built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from tools.kubernetes.build import Manifests
from tools.kubernetes.checks.egress import egress
from tools.kubernetes.checks.gateways import gateways
from tools.kubernetes.checks.operator import operator
from tools.kubernetes.checks.placement import placement, storage
from tools.kubernetes.checks.pods import commands, environment, security
from tools.kubernetes.checks.queries import queries
from tools.kubernetes.checks.serving import lifecycle, resources, serve
from tools.kubernetes.checks.wiring import labels, network, ports, references
from tools.kubernetes.schemas import schema

CHECKS: Mapping[str, Callable[[Manifests], Iterator[tuple[str, str]]]] = {
    check.__name__: check
    for check in (
        schema, serve, ports, labels, resources, placement, storage, references, network, egress,
        gateways, security, environment, commands, lifecycle, operator, queries,
    )
}  # fmt: skip
"""Checks by name. Each yields (where, message) of whatever is wrong."""


@dataclass(frozen=True)
class ManifestFinding:
    """Something that is wrong."""

    check: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"[{self.check}] {self.where}: {self.message}"


def run(manifests: Manifests) -> list[ManifestFinding]:
    """All findings of all checks."""
    return [
        ManifestFinding(name, where, message)
        for name, check in CHECKS.items()
        for where, message in check(manifests)
    ]
