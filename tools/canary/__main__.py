"""Which touch points has another vLLM moved?

    python -m tools.canary                        # downloads the newest wheel
    python -m tools.canary --version 0.33.0
    python -m tools.canary --wheel FILE
    python -m tools.canary --installed

Prints what is gone, and where a name of the same kind is written now. Nothing is installed and
nothing of vLLM is imported. The exit status is 1 if anything has moved. What it cannot see: a
function that takes or means something else. That is for the conformance tests (docs/porting.md).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from tools.canary.sources import Sources
from tools.canary.touch_points import ROOT, imports, members

WHEELS = ROOT / "build" / "canary"


def moved(sources: Sources) -> Iterator[str]:
    """What a version no longer has where we look for it, in a line each."""
    gone: dict[tuple[str, str], list[str]] = {}
    for module, name, file, line in imports():
        found = sources.defines(module, name) if name else sources.has(module)
        if not found:
            gone.setdefault((module, name), []).append(f"{file}:{line}")
    for (module, name), places in gone.items():
        yield f"{module}: no {name or 'such module'}{_now(sources, name)}; {', '.join(places)}"
    for module, owner, member in members():
        known = sources.members(module, owner)
        if known is None:
            yield f"{module}: no {owner}{_now(sources, owner)}; its {member} is used"
        elif member not in known:
            yield f"{module}: {owner} has no {member}"


def _now(sources: Sources, name: str) -> str:
    homes = sources.homes(name) if name else []
    return f" (now in {', '.join(homes)})" if homes else ""


def download(version: str | None, folder: Path) -> Path:
    """The wheel of a version of vLLM, the newest if None; some hundred MB.

    Raises:
        CalledProcessError: pip finds none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = "vllm" if version is None else f"vllm=={version}"
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
         "--only-binary=:all:", "--dest", str(folder), wanted],
        check=True,
    )  # fmt: skip
    return max(folder.glob("vllm-*.whl"), key=lambda file: file.stat().st_mtime)


def installed() -> Sources:
    """The vLLM of this environment, without importing it."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("vLLM is not installed: give --wheel or --version")
    return Sources.of_folder(Path(spec.submodule_search_locations[0]))


def main() -> int:
    """Look and print; returns the exit status."""
    description = (__doc__ or "").split("\n", 1)[0]
    parser = argparse.ArgumentParser(prog="python -m tools.canary", description=description)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--wheel", type=Path, help="of vLLM")
    which.add_argument("--version", help="to download; the newest by default")
    which.add_argument("--installed", action="store_true", help="the one of this environment")
    options = parser.parse_args()
    if options.installed:
        sources = installed()
    else:
        sources = Sources.of_wheel(options.wheel or download(options.version, WHEELS))
    found = list(moved(sources))
    touched = len({(i.module, i.name) for i in imports()}) + len(list(members()))
    print(f"vLLM {sources.version}: {touched} touch points, {len(found)} moved")
    print("\n".join(f"  {line}" for line in found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
