"""Whether the installed packages are those that MemShare was tested with."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cluster.check.report import CheckFinding
from memshare.engine.versions import TESTED_VLLM, UnsupportedVersion, check_vllm_version

SECTION = "versions"
_VLLM = "pip install 'memshare[gpu]', or 'memshare[cpu]' for vLLM's CPU build"
_TOLD = ("ray", "torch")  # the others are named only if something is wrong with them


def check_installed() -> Iterator[CheckFinding]:
    """vLLM against the tested versions, everything else against MemShare's own requirements."""
    try:
        check_vllm_version()
    except UnsupportedVersion as error:
        yield CheckFinding(SECTION, "fail", str(error), _VLLM)
    else:
        yield CheckFinding(SECTION, "ok", f"vLLM {TESTED_VLLM[-1]}")
    wanted = metadata.metadata("memshare")["Requires-Python"]
    if not SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        yield CheckFinding(
            SECTION, "fail", f"Python {platform.python_version()}", f"use Python {wanted}"
        )
    for requirement in _requirements():
        yield from check_package(requirement)


def _requirements() -> Iterator[Requirement]:
    """What MemShare always needs, and what is installed of all that an engine and a cluster need.

    vLLM's own line says where no engine is, and a Ray Serve file where Ray is not.
    """
    optional: dict[str, Requirement] = {}
    for text in metadata.requires("memshare") or ():
        requirement = Requirement(text)
        marker, requirement.marker = requirement.marker, None
        if marker is None or marker.evaluate({"extra": ""}):
            yield requirement
        elif any(marker.evaluate({"extra": extra}) for extra in ("engine", "serve")):
            optional[requirement.name] = requirement
    for requirement in optional.values():
        with suppress(metadata.PackageNotFoundError):
            metadata.version(requirement.name)
            yield requirement


def check_package(requirement: Requirement) -> Iterator[CheckFinding]:
    """Look one requirement up among the installed packages."""
    fix = f"pip install '{requirement}'"
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        yield CheckFinding(SECTION, "fail", f"{requirement.name} is not installed", fix)
        return
    if not requirement.specifier.contains(found, prereleases=True):
        text = f"{requirement.name} {found}; tested with {requirement.specifier}"
        yield CheckFinding(SECTION, "fail", text, fix)
    elif requirement.name in _TOLD:
        yield CheckFinding(SECTION, "ok", f"{requirement.name} {found}")
