"""The ``memshare`` command (memshare/cli/main.py)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from memshare import __version__
from memshare.cli import serve
from memshare.cli.main import COMMANDS, load, main
from memshare.process_env import engine_env
from memshare.small_model.folders import MANIFEST


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from memshare.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'vllm', 'ray', 'transformers', 'numba'} & sys.modules.keys()\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30
    )

    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(load(name).run)
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"memshare {name}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["modle"], ["model", "--no-such-option"]])
def test_a_wrong_command_line_ends_with_status_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2


def test_a_user_error_is_one_message_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("not a folder")

    assert main(["model", "--output", str(tmp_path / "mine")]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("memshare model: error:")
    assert "was not made by memshare" in captured.err
    assert MANIFEST not in captured.out


def test_serve_prepares_the_process_and_leaves_all_words_to_vllm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before vLLM is loaded, which reads some of the environment once."""
    for name in engine_env({}):  # so that all of it is as it was afterwards
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    seen: dict[str, str] = {}

    def parse(words: Sequence[str]) -> None:
        assert words == ["--dtype", "bfloat16", "MODEL", "--help=all", "--memshare.mode", "off"]
        seen.update(os.environ)
        sys.exit(0)

    monkeypatch.setattr(serve, "parse", parse)
    with pytest.raises(SystemExit):
        main(["serve", "--dtype", "bfloat16", "MODEL", "--help=all", "--memshare.mode", "off"])
    wanted = engine_env({}) | {"TOKENIZERS_PARALLELISM": "true"}
    assert wanted.items() <= seen.items()


@pytest.mark.parametrize(
    ("words", "start"),
    [(["chat", "Hello"], "'make serve'"), (["demo"], "'make serve CONFIG=configs/demo.yaml'")],
)
def test_without_a_server_the_error_says_how_to_start_one(
    capsys: pytest.CaptureFixture[str], words: list[str], start: str
) -> None:
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        assert main([*words, "--address", address]) == 1
    error = capsys.readouterr().err
    assert "UNAVAILABLE" in error
    assert f"fix: start a server with {start}, or name one with --address" in error
