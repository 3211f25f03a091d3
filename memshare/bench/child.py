"""Engines in processes of their own, so that no run warms or wears the next one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from typing import Any

from memshare.config import without_fields
from memshare.errors import UserError

_RESULT = "RESULT "
_ENVIRONMENT = {
    # The scheduler is looked at while it runs: it must be in this process.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def call(function: str, argument: dict[str, Any], name: str) -> Any:
    """Call ``module:function`` of one JSON object in a new process; return its JSON result.

    Args:
        function: takes one dict, returns what JSON can hold.
        argument: its argument.
        name: what runs, for the error text.

    Raises:
        UserError: the process failed; the end of what it said is in the text.
    """
    environment = without_fields(os.environ) | _ENVIRONMENT
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, function],
        input=json.dumps(argument), env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    for line in done.stdout.splitlines():
        if line.startswith(_RESULT):
            return json.loads(line.removeprefix(_RESULT))
    how = f"was ended by signal {-done.returncode}" if done.returncode < 0 else "failed"
    raise UserError(f"{name} {how}; the end of what it said:\n{done.stderr[-4000:] or '(nothing)'}")


def _main() -> None:
    module, _, function = sys.argv[1].partition(":")
    result = getattr(import_module(module), function)(json.load(sys.stdin))
    print(_RESULT + json.dumps(result), flush=True)


if __name__ == "__main__":
    _main()
