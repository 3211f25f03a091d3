"""What runs in a process of its own for a test; it loads as little as it can."""

from __future__ import annotations

import os
import signal
from typing import Any

from memshare.lab.bench.progress import ProgressTeller


def in_child(argument: dict[str, Any]) -> dict[str, Any]:
    if argument["fail"] == "raise":
        raise RuntimeError("as asked")
    if argument["fail"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    print("other output")
    teller = ProgressTeller()
    for written in range(3):
        teller.tell(written=written, total=3)  # one at once; the others come too soon after it
    return {"pid": os.getpid(), "environment": dict(os.environ)}
