"""``make test`` and ``make test-complete``: each test runs in exactly one of them."""

from __future__ import annotations

import functools
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT
from tests.selection import MARKS, SHARED, assignments, may_select, selects, work_unit


def expressions(*targets: str) -> list[str]:
    """What the Makefile's recipes give to ``pytest -m``, without running them."""
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *targets],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.replace("\\\n", " ").splitlines()
    calls = [shlex.split(line) for line in lines if " pytest " in line]
    return [words[words.index("-m") + 1] for words in calls if "-m" in words]


def test_every_combination_of_marks_is_selected_once() -> None:
    quick, rest = expressions("test"), expressions("test-complete")
    assert quick
    assert rest
    for marks in assignments(*MARKS):
        selecting = [expression for expression in quick + rest if selects(expression, marks)]
        assert len(selecting) == 1, (marks, selecting)
        assert (selecting[0] in rest) == marks["complete"]


LIST = """
import json, sys, pytest

class Marks:
    def pytest_collection_finish(self, session):
        marks = [[str(item.path), [m.name for m in item.iter_markers()]] for item in session.items]
        print("MARKS" + json.dumps(marks))

sys.exit(pytest.main(["--collect-only", "-qq"], plugins=[Marks()]))
"""


@pytest.mark.complete
@pytest.mark.timeout(900)
def test_no_test_falls_out() -> None:
    """Each is in a file that its command does not leave out."""
    done = subprocess.run(
        [sys.executable, "-c", LIST], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("MARKS"))
    commands = expressions("test", "test-complete")
    items = json.loads(line.removeprefix("MARKS"))
    assert len(items) > 2000
    for file, marks in items:
        (command,) = (c for c in commands if selects(c, dict.fromkeys(marks, True)))
        assert may_select(command, _source(file)), (file, command)


@functools.cache
def _source(file: str) -> str:
    return Path(file).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("source", "expression", "may"),
    [
        ("", "not engine", True),
        ("", "engine", False),
        ("pytestmark = pytest.mark.engine", "not engine", False),
        ("pytestmark = [\n    pytest.mark.engine,\n]", "engine and not cluster", True),
        ("pytestmark = pytest.mark.engine\n@pytest.mark.complete\ndef t(): ...", "complete", True),
        ("pytestmark = pytest.mark.engine", "engine and complete", True),
        ("pytestmark = pytest.mark.engine", "cluster and complete", False),
        ("@pytest.mark.engine\ndef t(): ...", "not engine", True),
        ("@pytest.mark.engine\ndef t(): ...", "engine", True),
    ],
)
def test_a_file_is_left_out_only_if_nothing_of_it_is_selected(
    source: str, expression: str, may: bool
) -> None:
    assert may_select(expression, source) == may


def test_a_file_that_is_left_out_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\npytestmark = pytest.mark.engine\nraise SystemError('imported')\n"
    )
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_ignore_collect\n")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-c", str(ROOT / "pyproject.toml")]

    def collect(expression: str) -> str:
        return subprocess.run(
            [*command, "--rootdir", str(tmp_path), "-m", expression, str(tmp_path)],
            cwd=ROOT, capture_output=True, text=True, check=False,
        ).stdout  # fmt: skip

    assert "SystemError" not in collect("not engine")
    assert "SystemError" in collect("engine")


def test_the_tests_of_a_server_stay_together_and_others_by_their_files() -> None:
    assert all((ROOT / folder / "conftest.py").is_file() for folder in SHARED)
    assert work_unit("tests/cluster/serve/test_http.py::test_a[x::y]") == "tests/cluster/serve"
    assert work_unit("tests/cluster/test_run.py::test_a") == "tests/cluster/test_run.py"
    assert work_unit("tests/k8s/test_page.py::test_a") != work_unit("tests/k8s/test_images.py::t")
