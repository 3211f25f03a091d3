"""The environment that engine processes get, and that the launcher of local runs builds on it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memshare import process_env
from memshare.process_env import collector_at_rest, cores, engine_env, preload, threads
from tools.runtime_env import DEFAULTS, runtime_env


def test_what_the_user_set_stays() -> None:
    own = dict.fromkeys((*process_env.DEFAULTS, "OMP_NUM_THREADS", "HF_HUB_OFFLINE"), "mine")
    assert engine_env(own | {"LD_PRELOAD": "libtcmalloc.so"}, offline=True).items() >= own.items()
    assert (
        runtime_env(dict.fromkeys(DEFAULTS, "mine")).items()
        >= dict.fromkeys(DEFAULTS, "mine").items()
    )


def test_an_engine_on_a_cpu_gets_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_env, "computes_on_cpu", lambda: True)
    monkeypatch.setattr(process_env, "cores", lambda: 16)
    assert engine_env({})["OMP_NUM_THREADS"] == "15"
    monkeypatch.setattr(process_env, "cores", lambda: 1)
    assert engine_env({})["OMP_NUM_THREADS"] == "1"
    # Several engines share the machine.
    monkeypatch.setattr(process_env, "cores", lambda: 16)
    assert runtime_env({})["OMP_NUM_THREADS"] == "1"
    monkeypatch.setattr(process_env, "computes_on_cpu", lambda: False)
    assert "OMP_NUM_THREADS" not in engine_env({})


def test_the_hub_is_asked_for_models_that_are_there_alone() -> None:
    assert "HF_HUB_OFFLINE" not in engine_env({})
    assert engine_env({}, offline=True)["HF_HUB_OFFLINE"] == "1"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight logical processors on four cores."""
    for processor in range(8):
        folder = tmp_path / f"cpu{processor}" / "topology"
        folder.mkdir(parents=True)
        first = processor % 4
        (folder / "thread_siblings_list").write_text(f"{first},{first + 4}\n")
    monkeypatch.setattr(process_env, "_allowed", lambda: set(range(8)))
    return tmp_path


def test_siblings_are_one_core(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cores(machine, machine) == 4
    monkeypatch.setattr(process_env, "_allowed", lambda: {0, 4, 1})
    assert cores(machine, machine) == 2
    assert cores(machine / "nothing", machine) == 3, "no topology: each is taken for a core"


@pytest.mark.parametrize(
    ("quota", "count"), [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("?", 4)]
)
def test_a_control_group_limits_cores(machine: Path, quota: str, count: int) -> None:
    (machine / "cpu.max").write_text(quota)
    assert cores(machine, machine) == count


def test_this_machine_has_cores() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)
    assert threads() == max(1, cores() - 1)


def test_an_allocator_comes_first_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libtcmalloc_minimal.so.4").touch()
    monkeypatch.setattr(process_env, "_TCMALLOC", (f"{tmp_path}/libtcmalloc*.so*",))
    monkeypatch.setattr(process_env, "_bundled", list)
    library = f"{tmp_path}/libtcmalloc_minimal.so.4"
    assert preload("") == library
    assert preload("libother.so") == f"{library}:libother.so"
    assert preload("/opt/libtcmalloc.so") == "/opt/libtcmalloc.so"
    assert engine_env({})["LD_PRELOAD"] == library
    monkeypatch.setattr(process_env, "_TCMALLOC", ())
    assert "LD_PRELOAD" not in engine_env({})


def test_an_allocator_of_vllm_is_found_without_importing_it() -> None:
    code = "import sys; from memshare import process_env as p; places = p._bundled(); "
    code += "assert places and places[0].endswith('vllm/libs/libtcmalloc*.so*'), places; "
    code += "sys.exit(', '.join({'vllm', 'torch', 'pydantic'} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_launcher_applies_it(tmp_path: Path) -> None:
    launcher = Path(__file__).parents[2] / "tools" / "runtime_env.py"
    show = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['GOMP_SPINCOUNT'])"
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "7"}
    done = subprocess.run(
        [sys.executable, str(launcher), "python", "-c", show],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["7", process_env.DEFAULTS["GOMP_SPINCOUNT"]], done.stderr


def test_no_garbage_is_collected_at_rest() -> None:
    assert gc.isenabled()
    with collector_at_rest():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with collector_at_rest():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
