"""What another vLLM has moved is found in its source alone (tools/canary)."""

from __future__ import annotations

import importlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from tools.canary import __main__ as canary
from tools.canary import touch_points
from tools.canary.sources import Sources
from tools.canary.touch_points import Import, imports, members

FILES = {
    "vllm/__init__.py": "",
    "vllm/_version.py": "__version__ = version = '9.9.0'\n",
    "vllm/config/__init__.py": (
        "from vllm.config.parts import Part as Renamed\nfrom .stars import *\n"
    ),
    "vllm/config/parts.py": "class Part:\n    size: int\n",
    "vllm/config/stars.py": "def shining(): ...\nif True:\n    A = B = 1\n",
    "vllm/core.py": (
        "from vllm.base import Base\n"
        "class Manager(Base):\n"
        "    def __init__(self):\n        self.pool, self.queue = 1, 2\n"
        "    def touch(self): ...\n"
    ),
    "vllm/base.py": "class Base:\n    def __init__(self):\n        self.size: int = 1\n",
}


@pytest.mark.parametrize(
    ("module", "name", "there"),
    [
        ("vllm", "config", True),
        ("vllm.config", "Renamed", True),
        ("vllm.config", "Part", False),
        ("vllm.config", "shining", True),
        ("vllm.config", "A", True),
        ("vllm.config", "setting", False),
        ("vllm.nowhere", "A", False),
    ],
)
def test_what_an_import_would_find(module: str, name: str, there: bool) -> None:
    assert Sources(FILES).defines(module, name) is there


def test_members_of_a_class_and_of_those_that_it_extends() -> None:
    sources = Sources(FILES)
    assert sources.members("vllm.core", "Manager") == {"__init__", "pool", "queue", "touch", "size"}
    assert sources.members("vllm.config", "Renamed") == {"size"}
    assert sources.members("vllm.core", "Other") is None
    assert sources.homes("Base") == ["vllm.base"]


def moved(
    monkeypatch: pytest.MonkeyPatch, files: Mapping[str, str], folder: Path
) -> tuple[str, list[str]]:
    wheel = folder / "vllm-9.9.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    ours = [Import("vllm.config", "shining", "a.py", 3), Import("vllm.core", "", "b.py", 4)]
    monkeypatch.setattr(canary, "imports", lambda: ours)
    monkeypatch.setattr(canary, "members", lambda: [("vllm.core", "Manager", "pool")])
    sources = Sources.of_wheel(wheel)
    return sources.version, list(canary.moved(sources))


def test_what_has_moved_is_named_with_its_new_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert moved(monkeypatch, FILES, tmp_path) == ("9.9.0", [])
    files = FILES | {
        "vllm/config/stars.py": "",
        "vllm/planning.py": "def shining(): ...\nclass Manager: ...\n",
        "vllm/core.py": "class Manager:\n    queue = 1\n",
    }
    assert moved(monkeypatch, files, tmp_path)[1] == [
        "vllm.config: no shining (now in vllm.planning); a.py:3",
        "vllm.core: Manager has no pool",
    ]
    del files["vllm/core.py"]
    assert moved(monkeypatch, files, tmp_path)[1] == [
        "vllm.config: no shining (now in vllm.planning); a.py:3",
        "vllm.core: no such module; b.py:4",
        "vllm.core: no Manager (now in vllm.planning); its pool is used",
    ]


def test_nothing_has_moved_in_the_vllm_that_we_are_tested_with() -> None:
    sources = canary.installed()
    assert list(canary.moved(sources)) == []
    assert len(set(imports())) > 150
    assert ("vllm.v1.request", "Request", "num_in_flight_tokens") in set(members())


def test_members_are_those_that_the_adapter_names() -> None:
    """Each stands in the adapter's or the plug-in's source, or nobody needs it."""
    engine = touch_points.ROOT / "memshare" / "engine"
    source = "".join(file.read_text(encoding="utf-8") for file in engine.rglob("*.py"))
    for names in touch_points.MEMBERS.values():
        assert [name for name in names if name not in source] == []
    interfaces = importlib.import_module("memshare.core.interfaces")
    assert all(hasattr(interfaces, name) for name in touch_points.INTERFACES)
