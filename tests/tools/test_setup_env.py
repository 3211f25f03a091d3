"""What ``make venv`` decides and says (tools/setup_env.py). No environment is made: commands that
would make one are written down by stand-ins."""

from __future__ import annotations

import ast
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tools import setup_env
from tools.setup_env import SetupError


class Commands(list[list[str]]):
    """In place of subprocesses: what would have run, and the status that it ends with."""

    status = 0

    def call(self, command: list[str], **options: object) -> int:
        self.append([str(word) for word in command])
        return self.status

    def named(self, word: str) -> list[list[str]]:
        return [command for command in self if word in command]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Commands:
    """Files of a project in a folder of its own, and a pip that finds everything."""
    commands = Commands()
    for name in ("pyproject.toml", "lab_data/pyproject.toml", "constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    monkeypatch.setattr(setup_env, "LAB_DATA", tmp_path / "lab_data")
    monkeypatch.setattr(setup_env, "CONSTRAINTS", tmp_path / "constraints.txt")
    monkeypatch.setattr(setup_env.subprocess, "call", commands.call)
    monkeypatch.setattr(setup_env.subprocess, "check_output", lambda *_, **__: "/packages\n")
    monkeypatch.setattr(setup_env, "needs_cpu_torch", lambda: True)
    monkeypatch.setattr(setup_env, "finds_cpu_torch", lambda python: True)
    return commands


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    return tmp_path / "venv"


def make(monkeypatch: pytest.MonkeyPatch, venv: Path, *words: str) -> int:
    """Run it, as far as an interpreter appears where the environment is to be."""
    (venv / "bin").mkdir(parents=True, exist_ok=True)
    (venv / "bin" / "python").touch()
    monkeypatch.setattr(sys, "argv", ["setup_env.py", "--venv", str(venv), *words])
    return setup_env.main()


def test_an_old_python_can_read_what_is_wrong() -> None:
    source = Path(setup_env.__file__).read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 7))


def test_an_old_python_gives_way_to_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[list[str]] = []
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    monkeypatch.setattr(sys, "argv", ["setup_env.py", "--force"])
    monkeypatch.setattr(setup_env.os, "execv", lambda path, words: became.append(words))
    # A launcher of a version manager whose version is not there: it exists, and fails.
    monkeypatch.setattr(setup_env.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(
        setup_env.subprocess, "call", lambda words, **_: int(words[0] != "/bin/python3.12")
    )
    with pytest.raises(SetupError):  # execv does not return, but a stand-in does
        setup_env.ensure_python()
    assert became == [["/bin/python3.12", "setup_env.py", "--force"]]


def test_without_a_newer_python_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    monkeypatch.setattr(setup_env.shutil, "which", lambda name: None)
    with pytest.raises(SetupError, match=r"Python >= 3\.11 is needed.*\n.*install python3\.11"):
        setup_env.ensure_python()


def test_without_the_venv_module_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    setup_env.ensure_python()
    monkeypatch.setitem(sys.modules, "ensurepip", None)  # as on Debian
    version = "python{}.{}".format(*sys.version_info)
    with pytest.raises(SetupError, match=rf"install {version}-venv"):
        setup_env.ensure_python()


def test_it_is_made_once(
    monkeypatch: pytest.MonkeyPatch, commands: Commands, venv: Path, tmp_path: Path
) -> None:
    assert make(monkeypatch, venv) == 0
    (created,) = commands.named("venv")
    assert created[1:] == ["-m", "venv", "--clear", str(venv)]
    (installed,) = commands.named("install")
    at = installed.index("--constraint")
    assert installed[at + 1] == str(tmp_path / "constraints.txt")
    assert ".[cpu,serve,model,eval,plots,docs,dev]" in installed
    (removed,) = commands.named("uninstall")
    assert removed[-3:] == ["torchvision", "torchaudio", "torchcodec"]
    assert commands.index(installed) < commands.index(removed)
    commands.clear()
    assert make(monkeypatch, venv) == 0
    assert commands == [], "it is up to date"


@pytest.mark.parametrize("file", ["constraints.txt", "pyproject.toml", "lab_data/pyproject.toml"])
def test_a_change_updates_it_in_place(
    monkeypatch: pytest.MonkeyPatch, commands: Commands, venv: Path, tmp_path: Path, file: str
) -> None:
    make(monkeypatch, venv)
    commands.clear()
    (tmp_path / file).write_text("changed")
    assert make(monkeypatch, venv) == 0
    assert commands.named("venv") == []
    assert len(commands.named("install")) == 1


def test_another_accelerator_or_force_makes_it_anew(
    monkeypatch: pytest.MonkeyPatch, commands: Commands, venv: Path
) -> None:
    make(monkeypatch, venv)
    for words in (("--accelerator", "gpu"), ("--accelerator", "gpu", "--force")):
        commands.clear()
        assert make(monkeypatch, venv, *words) == 0
        assert len(commands.named("venv")) == 1
        assert commands.named("uninstall") == [], "CUDA builds stay with a CUDA torch"


def test_what_failed_is_told_and_tried_again(
    monkeypatch: pytest.MonkeyPatch,
    commands: Commands,
    venv: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(monkeypatch, venv)
    commands.status = 3
    assert make(monkeypatch, venv, "--force") == 1
    assert "ERROR: Creating the environment failed (exit 3): " in capsys.readouterr().err
    commands.status = 0
    commands.clear()
    assert make(monkeypatch, venv) == 0


def test_an_interrupted_run_is_run_again(
    monkeypatch: pytest.MonkeyPatch, commands: Commands, venv: Path, tmp_path: Path
) -> None:
    make(monkeypatch, venv)
    (tmp_path / "constraints.txt").write_text("changed")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(setup_env, "install", interrupt)
        assert make(patch, venv) == 130
    (tmp_path / "constraints.txt").write_text("constraints.txt")  # as it was when it was whole
    commands.clear()
    assert make(monkeypatch, venv) == 0
    assert len(commands.named("install")) == 1, "who knows what was installed meanwhile"


def test_of_two_at_once_the_second_waits_and_has_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch,
    commands: Commands,
    venv: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    installing, may_go_on = threading.Event(), threading.Event()

    def call(command: list[str], **options: object) -> int:
        if "install" in command:
            installing.set()
            assert may_go_on.wait(30)
        return commands.call(command)

    def say(message: str) -> None:
        print(message)
        if "another process" in message:
            may_go_on.set()  # the first goes on when the second waits

    monkeypatch.setattr(setup_env.subprocess, "call", call)
    monkeypatch.setattr(setup_env, "log", say)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(make, monkeypatch, venv)
        assert installing.wait(30)
        second = pool.submit(setup_env.main)
        second.add_done_callback(lambda _: may_go_on.set())
        assert (first.result(60), second.result(60)) == (0, 0)
    assert len(commands.named("install")) == 1
    assert f"another process is setting up {venv}; waiting for it" in capsys.readouterr().out


def test_an_environment_that_does_not_import_is_not_ready(
    monkeypatch: pytest.MonkeyPatch,
    commands: Commands,
    venv: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def call(command: list[str], **options: object) -> int:
        commands.append([str(word) for word in command])
        return int("import vllm" in command[-1])

    monkeypatch.setattr(setup_env.subprocess, "call", call)
    assert make(monkeypatch, venv) == 1
    assert "does not import" in capsys.readouterr().err
    commands.clear()
    make(monkeypatch, venv)
    assert len(commands.named("install")) == 1, "it is not taken for up to date"


@pytest.mark.parametrize(
    ("needed", "found", "options"),
    [
        (False, False, []),
        (True, True, []),
        (True, False, ["--extra-index-url", setup_env.CPU_TORCH_INDEX]),
    ],
)
def test_where_the_cpu_build_of_torch_is(
    monkeypatch: pytest.MonkeyPatch, needed: bool, found: bool, options: list[str]
) -> None:
    monkeypatch.setattr(setup_env, "needs_cpu_torch", lambda: needed)
    monkeypatch.setattr(setup_env, "finds_cpu_torch", lambda python: found)
    assert setup_env.torch_sources(Path("python")) == options
