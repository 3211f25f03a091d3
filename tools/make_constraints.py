"""Write ``constraints.txt``: a version of every package that any extra needs, on CPUs and GPUs.

    make lock              # keep versions where the requirements still allow them
    make lock UPGRADE=1    # take the newest that go together

``make venv`` and both images install these versions, so that the tests have run with what is
deployed. pip resolves everything at once, vLLM's builds for CPUs and for GPUs together, and
installs nothing. ``--check`` needs no network: it compares the file with ``pyproject.toml`` and
with what is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tools.setup_env import torch_sources

ROOT = Path(__file__).resolve().parent.parent

TARGET = ROOT / "constraints.txt"
# Ours, and what a CPU environment takes out again (tools/setup_env.py): vLLM's GPU build names the
# versions of those itself. pip is the installer's own matter.
LEFT_OUT = {"memshare", "memshare-lab-data", "pip", "torchvision", "torchaudio", "torchcodec"}

HEAD = """\
# Written by `make lock`: the versions that `make venv` and the images install.
# Resolved on Linux, x86-64, by Python {python}.
# Requirements: {digest}
"""


class LockError(Exception):
    """The file cannot be written, or is stale. The text says why and what to do."""


def extras() -> dict[str, list[str]]:
    """The extras of ``pyproject.toml`` and what they require; "" names what is always required."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {"": project["dependencies"], **project["optional-dependencies"]}


def head() -> str:
    """What the file begins with. It changes with every requirement, and with Python's version."""
    digest = hashlib.sha256(json.dumps(extras(), sort_keys=True).encode()).hexdigest()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return HEAD.format(python=version, digest=digest[:16])


def pins(text: str) -> dict[str, str]:
    """The versions in a constraints file, by canonical name."""
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return dict(line.split("==") for line in lines)


def closure(
    name: str, chosen: Iterable[str] = (), seen: dict[str, str] | None = None
) -> dict[str, str]:
    """Versions of an installed package and of all that it needs and that is installed.

    Args:
        name: of a distribution.
        chosen: its extras.
        seen: what was found before; is added to.

    Returns:
        Versions by canonical name with extras, ``name[extra,...]``.
    """
    versions = {} if seen is None else seen
    wanted = sorted(chosen)
    key = f"{canonicalize_name(name)}[{','.join(wanted)}]"
    if key in versions:
        return versions
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return versions  # an optional one, or one for another system
    versions[key] = found.version
    for text in found.requires or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": e}) for e in (*wanted, "")):
            closure(requirement.name, requirement.extras, versions)
    return versions


def installed(chosen: Iterable[str]) -> dict[str, str]:
    """Public versions of what is installed of MemShare's requirements, by canonical name."""
    found = {key.partition("[")[0]: v for key, v in closure("memshare", chosen).items()}
    return {name: Version(found[name]).public for name in found.keys() - LEFT_OUT}


def resolve(requirements: list[str], constraints: str) -> list[dict[str, Any]]:
    """Ask pip what it would install; nothing is.

    Args:
        requirements: as on pip's command line, with options.
        constraints: text of a constraints file.

    Returns:
        The metadata of every distribution.

    Raises:
        LockError: pip failed; its output is on the terminal.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, limits = Path(folder) / "report.json", Path(folder) / "limits.txt"
        limits.write_text(constraints, encoding="utf-8")
        command = [
            *[sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"],
            *["--dry-run", "--ignore-installed", "--report", str(report)],
            *["--constraint", str(limits), *requirements],
        ]
        if subprocess.call(command, cwd=ROOT):
            raise LockError("pip finds no set of versions (see above); try: make lock UPGRADE=1")
        return [item["metadata"] for item in json.loads(report.read_text())["install"]]


def for_cuda(constraints: str) -> list[str]:
    """What torch's build for CUDA requires, and its build for CPUs does not."""
    (torch,) = (r for r in map(Requirement, extras()["engine"]) if r.name == "torch")
    (version,) = (s.version for s in torch.specifier)
    # Three equals signs: without them a build for CPUs, torch==2.13.0+cpu, would be as good.
    (metadata,) = resolve(["--no-deps", f"torch==={version}"], constraints)
    needed = [Requirement(text) for text in metadata.get("requires_dist", ())]
    return [str(r) for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]


def write(upgrade: bool) -> None:
    """Resolve everything and write the file.

    Raises:
        LockError: no set of versions meets all requirements.
    """
    constraints = "" if upgrade or not TARGET.exists() else TARGET.read_text(encoding="utf-8")
    ours = f".[{','.join(extra for extra in extras() if extra)}]"
    sources = torch_sources(Path(sys.executable))
    found = resolve([*sources, ours, *for_cuda(constraints)], constraints)
    versions = {canonicalize_name(m["name"]): Version(m["version"]).public for m in found}
    lines = [f"{name}=={versions[name]}\n" for name in sorted(versions.keys() - LEFT_OUT)]
    TARGET.write_text(head() + "".join(lines), encoding="utf-8")
    print(f"wrote {TARGET.name}: {len(lines)} packages. Next: make test")


def stale() -> Iterator[str]:
    """What is wrong with the file, one line each."""
    text = TARGET.read_text(encoding="utf-8")
    here, there = head().splitlines(), text.splitlines()
    if here[2] != there[2]:
        yield "the requirements in pyproject.toml have changed"
    if here[1] != there[1]:
        return  # on another Python other packages may be needed
    pinned = pins(text)
    for name, version in sorted(installed(extra for extra in extras() if extra).items()):
        if pinned.get(name) != version:
            yield f"{name} {version} is installed; pinned: {pinned.get(name, 'none')}"


def main() -> int:
    """Write or check the file; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it is stale")
    args = parser.parse_args()
    try:
        if not args.check:
            write(args.upgrade)
        elif faults := list(stale()):
            raise LockError("\n".join(["constraints.txt is stale:", *faults, "run: make lock"]))
    except LockError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
