"""Engines in their own processes, so that no run affects the next one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from memshare.config import without_fields
from memshare.errors import UserError
from memshare.process_env import engine_env

_RESULT, _PROGRESS = "RESULT ", "PROGRESS "
_ENVIRONMENT = {
    # The scheduler is looked at while it runs: it must be in this process.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

OnProgress = Callable[[dict[str, int]], None]
"""Takes what the child has told by :class:`ProgressTeller`."""


def call_in_process(
    function: str, argument: dict[str, Any], name: str, model: str,
    on_progress: OnProgress = lambda _: None,
) -> Any:  # fmt: skip
    """Call ``module:function`` of one JSON object in a new process; return its JSON result.

    The process is prepared for an engine (:mod:`memshare.process_env`).

    Args:
        function: takes one dict, returns what JSON can hold.
        argument: its argument.
        name: what runs, for the error text.
        model: folder or hub id of the model that it runs.
        on_progress: is told how far the function is, as often as that says so.

    Raises:
        UserError: the process failed; the end of what it said is in the text.
    """
    environment = engine_env(without_fields(os.environ), offline=Path(model).is_dir())
    environment |= _ENVIRONMENT
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
    command = [sys.executable, "-m", __spec__.name, function]
    result = None
    with tempfile.TemporaryFile() as said:
        with subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=said,
        ) as process:  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                _write(process.stdin, json.dumps(argument))
                for line in process.stdout:
                    if line.startswith(_PROGRESS):
                        on_progress(json.loads(line.removeprefix(_PROGRESS)))
                    elif line.startswith(_RESULT):
                        result = line.removeprefix(_RESULT)
            except BaseException:  # Ctrl-C too: the engine must not outlive the command
                process.kill()
                raise
        if result is not None:
            return json.loads(result)
        said.seek(0)
        words = said.read().decode(errors="replace")[-4000:]
    code = process.returncode
    how = f"was ended by signal {-code}" if code < 0 else "failed"
    raise UserError(f"{name} {how}; the end of what it said:\n{words or '(nothing)'}")


def _write(pipe: Any, text: str) -> None:
    try:
        with pipe:
            pipe.write(text)
    except BrokenPipeError:
        pass  # it has ended already; why, it has said


class ProgressTeller:
    """Tells the process that called this one how far its work is, twice a second at most."""

    _EVERY = 0.5  # seconds

    def __init__(self) -> None:
        """Nothing has been told yet."""
        self._next = 0.0

    def tell(self, **counts: int) -> None:
        """Say it, unless that was done a moment ago."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._EVERY
            print(_PROGRESS + json.dumps(counts), flush=True)


def _main() -> None:
    module, _, function = sys.argv[1].partition(":")
    result = getattr(import_module(module), function)(json.load(sys.stdin))
    print(_RESULT + json.dumps(result), flush=True)


if __name__ == "__main__":
    _main()
