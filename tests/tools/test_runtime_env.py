"""The launcher for local runs (tools/runtime_env.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT
from tools import runtime_env
from tools.runtime_env import DEFAULTS


def launch(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "runtime_env.py", *command],
        cwd="/", env={"PATH": os.defpath, **env}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_what_the_caller_has_set_stays() -> None:
    env = runtime_env.runtime_env({"RAY_ADDRESS": "ray://there", "OMP_NUM_THREADS": "", "X": "1"})
    assert (env["RAY_ADDRESS"], env["OMP_NUM_THREADS"], env["X"]) == ("ray://there", "", "1")
    others = DEFAULTS.keys() - {"RAY_ADDRESS", "OMP_NUM_THREADS"}
    assert {name: env[name] for name in others} == {name: DEFAULTS[name] for name in others}


@pytest.mark.parametrize("given", [{}, {"PATH": "/there"}])
def test_programs_of_this_environment_come_first(given: dict[str, str]) -> None:
    first, *others = runtime_env.runtime_env(given)["PATH"].split(os.pathsep)
    assert first == str(Path(sys.executable).parent)
    assert others == given.get("PATH", os.defpath).split(os.pathsep)


def test_the_command_gets_environment_and_arguments_and_its_status_is_ours() -> None:
    program = "import os, sys; print(os.environ['RAY_ADDRESS'], sys.argv[1:]); sys.exit(7)"
    done = launch("python", "-c", program, "a b", "--help")
    assert done.stdout == "local ['a b', '--help']\n"
    assert done.returncode == 7


def test_without_a_command_it_says_how_it_is_used() -> None:
    done = launch()
    assert done.returncode == 1
    assert done.stderr == "usage: runtime_env.py COMMAND [ARGUMENT ...]\n"
