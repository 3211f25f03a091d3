"""What it reads, prints and does with signals (tools/serving/setup.py, tools/serve_local.py)."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.documents import ROOT, Block, commands, option
from tools.serving.setup import ServeError, greeting, read_setup

SECRET = "msk_do-not-show"


def cluster(tmp_path: Path, **changes: Any) -> Path:
    document = yaml.safe_load((ROOT / "configs" / "cluster.yaml").read_text())
    document["applications"][0]["args"] |= changes
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


def calls(text: str) -> dict[str, list[str]]:
    """The first command of each program in what is printed, as a shell would read it."""
    found: dict[str, list[str]] = {}
    for words in commands(Block("greeting", 1, "sh", text)):
        found.setdefault(Path(words[0]).name, words)
    return found


def test_without_keys_the_calls_need_none() -> None:
    setup = read_setup(ROOT / "configs" / "cluster.yaml")
    assert (setup.http, setup.grpc, setup.model, setup.keys) == (8000, 9000, "smollm2", None)
    text = greeting(setup, 3.0, Path("log"))
    assert "Authorization" not in text
    assert "KEY" not in text
    assert 'api_key="none"' in text


def test_with_a_key_table_the_calls_show_where_a_key_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("MEMSHARE_KEY", SECRET)
    setup = read_setup(cluster(tmp_path, auth={"file": "/etc/memshare/keys.yaml"}))
    text = greeting(setup, 3.0, Path("log"))
    assert "/etc/memshare/keys.yaml" in text
    assert option(calls(text)["curl"][3:], "-H") == "Authorization: Bearer $OPENAI_API_KEY"
    assert "api_key" not in text, "OpenAI's client takes the variable"
    assert 'MEMSHARE_KEY="$OPENAI_API_KEY" .venv/bin/memshare chat' in text
    assert SECRET not in text


def test_a_table_in_a_variable_is_one_too(tmp_path: Path) -> None:
    setup = read_setup(cluster(tmp_path, auth={"variable": "TABLE"}))
    assert setup.keys == "TABLE"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a: [", "cannot read"),
        ("mode: share", "no `applications`"),
        ("", "no `applications`"),
    ],
)
def test_a_file_that_is_no_cluster_is_refused(tmp_path: Path, content: str, told: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(content)
    with pytest.raises(ServeError, match=told):
        read_setup(file)


def test_wrong_arguments_are_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="replicsa: there is no such field"):
        read_setup(cluster(tmp_path, replicsa=2))


def test_the_grace_is_that_of_the_replicas(tmp_path: Path) -> None:
    file = cluster(tmp_path, replica={"graceful_shutdown_timeout_s": 7})
    assert read_setup(file).grace == 7


_PATIENT = """
import signal, time
heard = []
signal.signal(signal.SIGINT, lambda *_: heard.append(1))
print("ready", flush=True)
while len(heard) < 2: time.sleep(0.01)
"""
_STOPPING = f"""
import subprocess, sys
from serve_local import stop
child = subprocess.Popen([sys.executable, "-c", {_PATIENT!r}], stdout=subprocess.PIPE)
child.stdout.readline()
stop(child, 60.0)
sys.exit(child.returncode)
"""


def test_a_second_signal_is_passed_on_and_ends_the_wait() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _STOPPING], cwd=ROOT / "tools", stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while "shutting down" not in process.stdout.readline():
        pass
    time.sleep(0.5)
    assert process.poll() is None, "the first one leaves time"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0


def test_only_a_small_cache_is_put_under_pressure() -> None:
    demo = greeting(read_setup(ROOT / "configs" / "demo.yaml"), 3.0, Path("log"))
    assert ".venv/bin/memshare demo --address 127.0.0.1:9000" in demo
    assert "memshare demo" not in greeting(read_setup(ROOT / "configs" / "cluster.yaml"), 3, Path())
