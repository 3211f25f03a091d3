"""What the folders of ``k8s/`` build to, once for all tests."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest

from tools.kubernetes.build import Manifests, build
from tools.kubernetes.layout import K8S


@cache
def _built(folder: Path) -> Manifests:
    return Manifests(build(folder))


class Overlays:
    """Overlays by name. Each call gives a copy, to be changed at will."""

    def __call__(self, name: str) -> Manifests:
        return Manifests(deepcopy(_built(K8S / "overlays" / name).all))


@pytest.fixture(scope="session")
def overlays() -> Overlays:
    return Overlays()
