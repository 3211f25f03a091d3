"""A confined command can do what a pod's can, and no more."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.confine import HOME, USER

ROOT = Path(__file__).resolve().parents[2]
TOOL = [sys.executable, str(ROOT / "tools" / "confine.py")]

LOOK = """
import json, os, sys
from pathlib import Path

def writes(folder):
    try:
        (Path(folder) / "new").write_text("x")
    except OSError as error:
        return type(error).__name__
    return True

status = dict(line.split(":\\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({
    "user": [os.getuid(), os.getgid(), os.getgroups()],
    "home": os.environ["HOME"],
    "privileges": [status["CapEff"], status["CapBnd"], status["NoNewPrivs"]],
    "writes": {f: writes(f) for f in ("/", "/etc", "/opt", *sys.argv[1:])},
    "mounted": Path("/opt/given/file").read_text(),
    "imports": __import__("memshare").__version__,
}))
"""

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "setpriv", "mount"))),
    reason="only root can become another user on a read-only file system",
)


def confine(*words: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*TOOL, *words], env=environ, capture_output=True, text=True, check=False, timeout=60
    )


@needs_root
def test_nothing_but_scratch_can_be_written(tmp_path: Path) -> None:
    given, scratch = tmp_path / "given", tmp_path / "scratch"
    given.mkdir()
    scratch.mkdir()
    (given / "file").write_text("as given")
    before = sorted(Path("/opt").iterdir())
    done = confine(
        *("--scratch", str(scratch), "--mount", f"{given}:/opt/given", "--"),
        *(sys.executable, "-c", LOOK, str(ROOT), "/tmp", str(HOME)),
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["user"] == [USER, USER, [USER]] or seen["user"] == [USER, USER, []]
    assert seen["home"] == str(HOME)
    assert seen["privileges"] == ["0" * 16, "0" * 16, "1"]
    assert seen["writes"] == {
        **dict.fromkeys(("/", "/etc", "/opt", str(ROOT)), "OSError"),
        **dict.fromkeys(("/tmp", str(HOME)), True),
    }
    assert seen["mounted"] == "as given"
    # Outside, nothing has changed but the scratch folder.
    assert (scratch / "tmp" / "new").read_text() == "x"
    assert (scratch / "home" / "new").stat().st_uid == USER
    assert sorted(Path("/opt").iterdir()) == before
    assert not Path("/tmp/new").exists()


@needs_root
def test_the_commands_status_is_passed_on(tmp_path: Path) -> None:
    assert confine("--scratch", str(tmp_path), "--", "sh", "-c", "exit 7").returncode == 7


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "name a command"),
        (("--mount", "/nowhere:/opt/x", "--", "true"), "with a source that exists"),
        (("--mount", "/tmp:relative", "--", "true"), "is not SOURCE:/TARGET"),
    ],
)
def test_wrong_usage_is_explained(words: tuple[str, ...], said: str) -> None:
    done = confine(*words)
    assert done.returncode == 2
    assert said in done.stderr
