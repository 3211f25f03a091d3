"""An interpreter that has been started early is a spawned process like any other."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
import setproctitle

from cluster.processes.engine_prewarm import EnginePrewarm

spawn = get_context("spawn")


def tell(path: Path, names: tuple[str, ...]) -> None:
    """What the child sees of itself."""
    setproctitle.setproctitle("told")
    loaded = [name for name in names if name in sys.modules]
    shown = psutil.Process().cmdline()[0]
    seen = [str(os.getpid()), os.environ.get("LATE", ""), os.environ.get("GONE", ""), shown]
    path.write_text("\n".join([*seen, *loaded]))


def answer(end: Connection) -> None:
    end.send(os.getpid())


@pytest.fixture
def early() -> Iterator[EnginePrewarm]:
    start = EnginePrewarm(("colorsys",))
    yield start
    with start.taken():
        pass  # ends it, if a test has not


def test_it_becomes_the_process_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GONE", "before")
    early = EnginePrewarm(("colorsys",))
    monkeypatch.setenv("LATE", "x" * 100_000)  # more than a pipe holds
    monkeypatch.delenv("GONE")
    told = tmp_path / "told"
    with early.taken():
        process = spawn.Process(target=tell, args=(told, ("colorsys",)), name="asked")
        process.start()
        other = spawn.Process(target=tell, args=(tmp_path / "other", ("colorsys",)))
        other.start()
    process.join(120)
    assert (process.exitcode, process.pid, process.name) == (0, early.pid, "asked")
    assert told.read_text().split("\n") == [str(early.pid), "x" * 100_000, "", "told", "colorsys"]
    other.join(120)  # the second is an ordinary one
    assert other.exitcode == 0
    assert (tmp_path / "other").read_text().split("\n")[0] == str(other.pid) != str(early.pid)
    assert "colorsys" not in (tmp_path / "other").read_text()


def test_its_end_is_seen(early: EnginePrewarm) -> None:
    with early.taken():
        process = spawn.Process(target=signal.pause, daemon=True)  # no test waits for it
        process.start()
    assert process.pid == early.pid
    assert process.is_alive()
    process.kill()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def test_a_process_that_inherits_open_files_is_spawned_as_always(early: EnginePrewarm) -> None:
    ours, theirs = spawn.Pipe()
    with early.taken():
        process = spawn.Process(target=answer, args=(theirs,))
        process.start()
    assert ours.poll(120)
    assert ours.recv() == process.pid != early.pid
    assert not psutil.pid_exists(early.pid)


def test_another_interpreter_is_spawned_as_always(early: EnginePrewarm, tmp_path: Path) -> None:
    """vLLM binds processes to NUMA nodes by another executable."""
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)
    with early.taken():
        spawn.set_executable(str(other))
        try:
            process = spawn.Process(target=tell, args=(tmp_path / "told", ()))
            process.start()
        finally:
            spawn.set_executable(sys.executable)
    process.join(120)
    assert process.exitcode == 0
    assert process.pid != early.pid


@pytest.mark.parametrize("unseen", [0, os.WNOWAIT], ids=["others were told", "nobody was told"])
def test_one_that_failed_is_replaced(unseen: int, tmp_path: Path) -> None:
    early = EnginePrewarm(("no_such_module",))
    os.waitid(os.P_PID, early.pid, os.WEXITED | unseen)
    with early.taken():
        process = spawn.Process(target=tell, args=(tmp_path / "told", ()))
        process.start()
    process.join(120)
    assert process.exitcode == 0
    assert not psutil.pid_exists(early.pid)


def test_one_that_nobody_needs_is_ended() -> None:
    early = EnginePrewarm(("colorsys",))
    gc.collect()  # else files that earlier tests have left may be closed between the two counts
    files = psutil.Process().num_fds()
    with early.taken():
        pass
    assert not psutil.pid_exists(early.pid)
    assert psutil.Process().num_fds() == files - 2


def test_spawning_is_as_before_afterwards(early: EnginePrewarm) -> None:
    before = spawn.Process._Popen  # type: ignore[attr-defined]
    with early.taken():
        assert spawn.Process._Popen is not before  # type: ignore[attr-defined]
    assert spawn.Process._Popen is before  # type: ignore[attr-defined]


def test_it_ends_with_a_parent_that_is_killed() -> None:
    program = (
        "from cluster.processes.engine_prewarm import EnginePrewarm;"
        "print(EnginePrewarm(('colorsys',)).pid, flush=True);"
        "import time; time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        waiting = psutil.Process(int(parent.stdout.readline()))
        assert waiting.is_running()
        parent.kill()
    psutil.wait_procs([waiting], timeout=60)
    assert not waiting.is_running()
