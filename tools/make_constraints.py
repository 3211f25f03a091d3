"""Write ``k8s/images/constraints.txt``: the versions in this environment that images install.

    python tools/make_constraints.py

The closure of our requirements with the extras that images use, as installed here, where the tests
ran. Run it in a fresh environment after a change of requirements.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TARGET = Path(__file__).resolve().parent.parent / "k8s" / "images" / "constraints.txt"
EXTRAS = ("cpu", "model", "eval")
# Ours, and what the images take out again (see tools/setup_env.py).
LEFT_OUT = {"memshare", "torchvision", "torchaudio", "torchcodec"}

HEAD = """\
# Written by tools/make_constraints.py: versions with which the tests ran (extras {extras}).
"""


def closure(
    name: str, extras: Iterable[str] = (), seen: dict[str, str] | None = None
) -> dict[str, str]:
    """Versions of an installed package and of all that it needs, by name."""
    versions = {} if seen is None else seen
    chosen = tuple(extras)
    key = f"{canonicalize_name(name)}[{','.join(sorted(chosen))}]"
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
        if marker is None or any(marker.evaluate({"extra": e}) for e in (*chosen, "")):
            closure(requirement.name, requirement.extras, versions)
    return versions


def main() -> int:
    """Write the file; return the exit status."""
    versions = {key.partition("[")[0]: v for key, v in closure("memshare", EXTRAS).items()}
    lines = [f"{name}=={versions[name]}\n" for name in sorted(versions.keys() - LEFT_OUT)]
    TARGET.write_text(HEAD.format(extras=", ".join(EXTRAS)) + "".join(lines), encoding="utf-8")
    print(f"wrote {TARGET} ({len(lines)} packages)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
