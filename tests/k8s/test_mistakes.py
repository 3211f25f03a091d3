"""Every planted mistake is found, by the check that is for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.k8s import mistakes, operations
from tools.kubernetes.build import Manifests
from tools.kubernetes.checks import CHECKS

MISTAKES = [*mistakes.MISTAKES, *operations.MISTAKES]


@pytest.mark.parametrize(
    ("mistake", "overlay", "check", "words"), MISTAKES, ids=[m[0].__name__ for m in MISTAKES]
)
def test_a_planted_mistake_is_found_by_name(
    overlays: Callable[[str], Manifests],
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
