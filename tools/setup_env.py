"""Create ``.venv`` and install MemShare into it. Needs nothing but a Python >= 3.11 with ``venv``.

Run it as often as you like: a stamp inside the environment holds a hash of everything the result
depends on, so a second run returns at once. A change to ``pyproject.toml``, to ``constraints.txt``,
which holds the version of every package, or to this file updates the environment in place; a run
that was interrupted is simply run again, and of two at once the second waits for the first.

Only the standard library is used. The file also parses on older Pythons, so that those print a
clear message and not a syntax error.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINIMUM = (3, 11)
# Tried in this order when the running Python is too old: the tested one first.
OTHER_PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14")

# The only build of torch that the CPU build of vLLM accepts on Linux, and where PyTorch keeps it.
CPU_TORCH = "torch==2.13.0+cpu"
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"

# The CPU build of vLLM asks for these. Where they come as CUDA builds they break `import vllm`
# and `import transformers` beside a CPU torch ("operator torchvision::nms does not exist"). Text
# models need none of them, so they always go, whichever build came.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")

# The version of every package (tools/make_constraints.py), and the packages that are ours.
CONSTRAINTS = ROOT / "constraints.txt"
LAB_DATA = ROOT / "tools" / "lab_data"
EXTRAS = "serve,model,eval,plots,docs,dev"

# What must import in a fresh interpreter before the environment counts as ready. Each class is
# reached through a lazy import that fails if one of the packages above is left and broken.
CHECK_IMPORTS = """
import numba, pydantic, grpc, prometheus_client
import ray, ray.serve
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
import vllm
from vllm.v1.engine.async_llm import AsyncLLM
import memshare, memshare_lab_data
print(f"Python {platform.python_version()}, torch {torch.__version__}, vLLM {vllm.__version__}, "
      f"Ray {ray.__version__}, memshare {memshare.__version__}")
"""


class SetupError(Exception):
    """The environment cannot be made. The text says why and what to do."""


def log(message: str) -> None:
    """Print one line of progress at once, even into a pipe."""
    print("[setup] " + message, flush=True)


def ensure_python() -> None:
    """Return if this Python will do; otherwise start again under one that will.

    Raises:
        SetupError: no Python >= 3.11 on PATH, or this one cannot make virtual environments.
    """
    wanted = ".".join(map(str, MINIMUM))
    if sys.version_info < MINIMUM:
        # A version manager's launcher may exist without its version: ask it, do not trust it.
        test = "import sys; sys.exit(sys.version_info < (%d, %d))" % MINIMUM  # noqa: UP031
        for name in OTHER_PYTHONS:
            path = shutil.which(name)
            if path and not subprocess.call(
                [path, "-c", test], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ):
                log(f"{sys.executable} is Python {platform.python_version()}; using {path}")
                os.execv(path, [path, *sys.argv])
        raise SetupError(
            f"Python >= {wanted} is needed; {sys.executable} is {platform.python_version()} and "
            f"none of {', '.join(OTHER_PYTHONS)} on PATH is newer.\n"
            f"Install one (Debian, Ubuntu: sudo apt-get install python{wanted} "
            f"python{wanted}-venv), or name one: make PYTHON=/path/to/python3 venv"
        )
    try:
        # Debian ships `venv` without `ensurepip` unless python3-venv is installed.
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        version = "python%d.%d" % sys.version_info[:2]  # noqa: UP031
        raise SetupError(
            f"{sys.executable} cannot make virtual environments ({error}).\n"
            f"Install its venv module (Debian, Ubuntu: sudo apt-get install {version}-venv), or "
            "use another Python: make PYTHON=/path/to/python3 venv"
        ) from error


def foundation(venv: Path, accelerator: str) -> str:
    """Return what an environment cannot change later: if this differs, it is made anew.

    The path is part of it because scripts inside have it written into their first line; the
    accelerator because both builds of vLLM own the same files.
    """
    return f"{venv} {ROOT} python{sys.version_info[0]}.{sys.version_info[1]} {accelerator}"


def fingerprint(made_from: str, extras: str) -> str:
    """Return a hash of all that the environment depends on."""
    digest = hashlib.sha256()
    ours = (ROOT / "pyproject.toml", LAB_DATA / "pyproject.toml", Path(__file__).resolve())
    for path in (*ours, CONSTRAINTS):
        digest.update(path.read_bytes())
    for text in (made_from, extras):
        digest.update(b"\0" + text.encode())
    return digest.hexdigest()


def holds(path: Path, text: str) -> bool:
    """Return whether ``path`` is a file with exactly this text."""
    return path.is_file() and path.read_text() == text


@contextlib.contextmanager
def locked(venv: Path) -> Iterator[None]:
    """Hold the right to change ``venv``; wait for another process that holds it.

    The lock is a file beside the environment, which may be made anew. The kernel releases it even
    if the process is killed.
    """
    venv.parent.mkdir(parents=True, exist_ok=True)
    with venv.with_name(venv.name + ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"another process is setting up {venv}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(command: list[str], what: str) -> None:
    """Run ``command`` with its output on the terminal.

    Raises:
        SetupError: it failed.
    """
    status = subprocess.call(command, cwd=str(ROOT))
    if status:
        raise SetupError(f"{what} failed (exit {status}): {' '.join(command)}")


def needs_cpu_torch() -> bool:
    """Return whether the CPU build of vLLM asks for ``+cpu`` on this machine."""
    return platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64", "s390x")


def finds_cpu_torch(python: Path) -> bool:
    """Return whether pip, as configured on this machine, finds the CPU build of torch.

    Nothing is installed. No retries and a short timeout: a "no" must come quickly.
    """
    probe = subprocess.run(
        [
            *[str(python), "-m", "pip", "--retries", "0", "--timeout", "15"],
            *["install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"],
            *["--only-binary", ":all:", CPU_TORCH],
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    return probe.returncode == 0


def torch_sources(python: Path) -> list[str]:
    """Return pip's options for where the CPU build of torch is; none if it finds that by itself."""
    if not needs_cpu_torch():
        return []
    if finds_cpu_torch(python):
        log(f"pip finds {CPU_TORCH} with this machine's configuration")
        return []
    log(f"pip does not find {CPU_TORCH}; adding {CPU_TORCH_INDEX}")
    return ["--extra-index-url", CPU_TORCH_INDEX]


def install(python: Path, accelerator: str, extras: str) -> None:
    """Install MemShare and its data, editable, with ``extras``; then take out what breaks it.

    Raises:
        SetupError: pip failed.
    """
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    sources = torch_sources(python) if accelerator == "cpu" else []
    log("installing: about 1 GB to download the first time, 4 GB on disk")
    # --no-compile: all of it is compiled at once, below.
    run(
        [
            *[*pip, "install", "--no-compile", *sources, "--constraint", str(CONSTRAINTS)],
            *["-e", f".[{extras}]", "-e", str(LAB_DATA)],
        ],
        "Installing the packages",
    )
    if accelerator == "cpu":
        run([*pip, "uninstall", "--quiet", "--yes", *UNWANTED], "Removing unused torch packages")
    compile_packages(python)


def compile_packages(python: Path) -> None:
    """Write the bytecode of everything that was installed.

    Every replica, engine and worker is a fresh interpreter that imports vLLM: 20 s of CPU from
    sources, 10 s from bytecode. Where ``PYTHONDONTWRITEBYTECODE`` is set, or the environment is
    read-only later, they would never write it themselves.
    """
    log("compiling")
    folder = subprocess.check_output(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    # Some packages ship templates that are no Python; the status says no more than that.
    subprocess.call(
        [str(python), "-m", "compileall", "-q", "-j", "0", folder],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def check(python: Path) -> None:
    """Import everything that matters in a fresh interpreter.

    Raises:
        SetupError: an import failed; its traceback is on the terminal.
    """
    env = dict(os.environ, VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")
    code = "import platform\n" + CHECK_IMPORTS
    if subprocess.call([str(python), "-c", code], env=env, cwd=str(ROOT)):
        raise SetupError(
            "The environment was installed but does not import (see the traceback above).\n"
            f"Start afresh: rm -rf {python.parent.parent.name} && make venv"
        )


def set_up(venv: Path, accelerator: str, force: bool) -> None:
    """Make or update ``venv``, unless it is up to date.

    Raises:
        SetupError: it cannot be made.
    """
    python = venv / "bin" / "python"
    base_stamp, stamp = venv / ".memshare-base", venv / ".memshare-setup"
    extras = f"{accelerator},{EXTRAS}"
    base = foundation(venv, accelerator)
    wanted = fingerprint(base, extras)

    def sound() -> bool:
        return python.exists() and holds(base_stamp, base)

    if not force and sound() and holds(stamp, wanted):
        return
    with locked(venv):
        if not force and sound() and holds(stamp, wanted):
            return  # another process has done it meanwhile
        started = time.monotonic()
        if sound() and not force:
            log(f"updating {venv}")
            stamp.write_text("incomplete")
        else:
            log(f"creating {venv}")
            run([sys.executable, "-m", "venv", "--clear", str(venv)], "Creating the environment")
            base_stamp.write_text(base)
        install(python, accelerator, extras)
        log("checking that everything imports")
        check(python)
        stamp.write_text(wanted)
        log(f"ready after {time.monotonic() - started:.0f} s")


def main() -> int:
    """Make or update the environment; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: .venv")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--force", action="store_true", help="rebuild even if up to date")
    args = parser.parse_args()
    try:
        ensure_python()
        set_up(args.venv.absolute(), args.accelerator, args.force)
    except SetupError as error:
        print(f"\n[setup] ERROR: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\n[setup] interrupted; run it again to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
