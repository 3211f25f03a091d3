"""Whether the installed packages are those that MemShare was tested with."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cluster.check.report import Finding
from memshare.engine.versions import TESTED_VLLM, UnsupportedVersion, check_vllm_version

SECTION = "versions"
_TOLD = ("ray", "torch")  # the others are named only if something is wrong with them


def check_installed() -> Iterator[Finding]:
    """vLLM against the tested versions, everything else against MemShare's own requirements."""
    try:
        check_vllm_version()
    except UnsupportedVersion as error:
        yield Finding(SECTION, "fail", str(error), f"pip install vllm=={TESTED_VLLM[-1]}")
    else:
        yield Finding(SECTION, "ok", f"vLLM {TESTED_VLLM[-1]}")
    wanted = metadata.metadata("memshare")["Requires-Python"]
    if not SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        yield Finding(
            SECTION, "fail", f"Python {platform.python_version()}", f"use Python {wanted}"
        )
    for text in metadata.requires("memshare") or ():
        requirement = Requirement(text)
        # Extras are another matter: whoever wants one finds it missing by name.
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield from check_package(requirement)


def check_package(requirement: Requirement) -> Iterator[Finding]:
    """Look one requirement up among the installed packages."""
    fix = f"pip install '{requirement}'"
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        yield Finding(SECTION, "fail", f"{requirement.name} is not installed", fix)
        return
    if not requirement.specifier.contains(found, prereleases=True):
        text = f"{requirement.name} {found}; tested with {requirement.specifier}"
        yield Finding(SECTION, "fail", text, fix)
    elif requirement.name in _TOLD:
        yield Finding(SECTION, "ok", f"{requirement.name} {found}")
