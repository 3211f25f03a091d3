"""The documentation site: builds without a warning, holds every page, and needs no network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
# What a browser would fetch by itself from elsewhere.
FETCHED = re.compile(
    r'<(?:script|img|iframe|source)[^>]+src="?(?:https?:)?//'
    r'|<link[^>]+rel="?(?:stylesheet|preload|icon|preconnect)[^>]+href="?(?:https?:)?//'
    r"|url\(['\"]?(?:https?:)?//|@import"
)


def make(site: Path, file: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    """What ``make docs`` runs, in a process of its own: mkdocs counts by global loggers."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", file, "-d", site]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.complete
def test_it_builds_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    built = make(tmp_path)
    assert built.returncode == 0, built.stderr
    sources = [p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*.md")]
    pages = [tmp_path / source.with_suffix(".html") for source in sources]
    assert len(pages) > 25
    menu = (tmp_path / "index.html").read_text(encoding="utf-8")
    for source, page in zip(sources, pages, strict=True):
        html = page.read_text(encoding="utf-8")
        assert FETCHED.search(html) is None, source
        assert f'href="{source.with_suffix(".html")}"' in menu, f"{source} is not in the menu"
    python = (tmp_path / "reference" / "python.html").read_text(encoding="utf-8")
    for name in ("Client.generate", "Client.chat_stream", "AsyncClient.chat", "plug_in.plug_in"):
        assert f".{name}" in python, name
    assert "<code>CallError</code>" in python
    assert ":class:" not in python, "a role of Sphinx"


@pytest.mark.complete
@pytest.mark.parametrize("link", ["nowhere.md", "other.md#nowhere"])
def test_a_broken_link_or_anchor_fails_the_build(tmp_path: Path, link: str) -> None:
    docs = tmp_path / "docs"
    shutil.copytree(ROOT / "docs" / "stylesheets", docs / "stylesheets")
    (docs / "index.md").write_text(f"# Title\n\n[there]({link})\n")
    (docs / "other.md").write_text("# Other\n")
    file = tmp_path / "mkdocs.yml"
    ours = {"INHERIT": str(ROOT / "mkdocs.yml"), "docs_dir": str(docs), "hooks": []}
    file.write_text(yaml.safe_dump({**ours, "nav": ["index.md", "other.md"]}))
    broken = make(tmp_path / "broken", file)
    assert broken.returncode == 1
    assert "nowhere" in broken.stderr
    (docs / "index.md").write_text("# Title\n\n[there](other.md#other)\n")
    assert make(tmp_path / "whole", file).returncode == 0


def test_the_pattern_sees_what_a_browser_would_fetch() -> None:
    assert FETCHED.search('<script src="https://cdn.example/x.js">')
    assert FETCHED.search('<link rel="stylesheet" href="//fonts.example/css">')
    assert not FETCHED.search('<a href="https://example.org">elsewhere</a>')
