"""Build what is published, into ``dist/``: the sources and wheels of MemShare and its lab data.

    python tools/make_dist.py --url https://HOST/OWNER/memshare

The URL is that of the repository. A package index shows the README without the files beside it, so
links and pictures are made to lead there; and it is named in the metadata. Without it links stay as
they are, for wheels that are not published.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "memshare", "cluster", "configs")
LAB_DATA = Path("tools", "lab_data")
BUILD = """
import sys
from setuptools import build_meta
output = sys.argv[1]  # setuptools writes arguments of its own there
build_meta.build_sdist(output)
build_meta.build_wheel(output)
"""

_LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
_URLS = "[project.urls]\n"


def absolute(markdown: str, url: str, tag: str) -> str:
    """The text with links and pictures that lead to a repository, as GitHub's addresses are.

    Args:
        markdown: links in it are relative to the repository's top.
        url: of the repository.
        tag: the version that links lead to.
    """

    def lead(link: re.Match[str]) -> str:
        target = link["target"]
        if "://" in target or target.startswith("#"):
            return link[0]
        kind = "raw" if link["picture"] else "blob"
        return f"{link['picture']}[{link['text']}]({url}/{kind}/{tag}/{target})"

    return _LINK.sub(lead, markdown)


def with_urls(project: str, url: str) -> str:
    """The text of ``pyproject.toml`` with the repository's addresses."""
    ours = (
        f'Repository = "{url}"\n'
        f'Issues = "{url}/issues"\n'
        f'Changelog = "{url}/blob/main/CHANGELOG.md"\n'
    )
    head, found, rest = project.partition(_URLS)
    if not found:
        raise ValueError("pyproject.toml has no [project.urls]")
    return head + found + ours + rest


def version_of(top: Path) -> str:
    """MemShare's version, read and not imported."""
    found = re.search(r'__version__ = "(.+)"', (top / "memshare" / "__init__.py").read_text())
    if found is None:
        raise ValueError("memshare/__init__.py has no __version__")
    return found[1]


def copy(top: Path) -> None:
    """Copy what is built from: leftovers of earlier builds would get into a wheel."""
    for name in (*SOURCES, str(LAB_DATA)):
        source, target = ROOT / name, top / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
            shutil.copytree(source, target, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, target)


def build(output: Path, url: str | None) -> None:
    """Build everything into ``output``.

    Args:
        output: a folder, made if it is not there.
        url: of the repository, without a slash at its end.

    Raises:
        subprocess.CalledProcessError: setuptools failed; what it said is on the terminal.
    """
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        copy(top)
        if url is not None:
            readme, project = top / "README.md", top / "pyproject.toml"
            tag = f"v{version_of(top)}"
            readme.write_text(absolute(readme.read_text(encoding="utf-8"), url, tag), "utf-8")
            project.write_text(with_urls(project.read_text(encoding="utf-8"), url), "utf-8")
        for place in (top, top / LAB_DATA):
            command = [sys.executable, "-c", BUILD, str(output.resolve())]
            subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL)


def main() -> int:
    """Build; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--url", help="of the repository; needed for a package index")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="default: dist")
    args = parser.parse_args()
    build(args.output, args.url and args.url.rstrip("/"))
    for file in sorted(args.output.iterdir()):
        print(f"{file.stat().st_size / 1e6:8.2f} MB  {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
