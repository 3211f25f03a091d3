"""A stream to be broken, and the way back to full service. Shared by tests of faults."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from cluster.processes.workers import shared_memory
from tools.bench.local_cluster import Killed, Server, staff, wait_until_whole

RECOVERY_S = 60.0
PROMPT = "A long story about a lighthouse:"

Record = Callable[[str, object], None]


class Stream:
    """A streamed request, read by a thread of its own. Returns when tokens come."""

    def __init__(self, server: Server, tokens: int = 3000) -> None:
        self.events: list[str] = []
        self.error: Exception | None = None
        self._url = f"{server.url}/v1/completions"
        self._body = {
            "model": "smollm2", "prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True,
            "stream": True,
        }  # fmt: skip
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        end = time.monotonic() + 120
        while len(self.events) < 3:
            assert time.monotonic() < end, f"no tokens: {self.error}"
            time.sleep(0.05)

    def _read(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=120) as answer:
                for line in answer.iter_lines():
                    if line:
                        self.events.append(line)
        except httpx.HTTPError as error:
            self.error = error

    def is_told_of_its_end(self) -> bool:
        """Whether the client can tell that this is no whole answer, so that it may try again."""
        self._thread.join(60)
        assert not self._thread.is_alive(), "a stream of something dead must not hang"
        return self.error is not None or any('"error"' in event for event in self.events)


def recover(server: Server, killed: Killed, record_property: Record) -> None:
    """Wait for full service, and tell how long that took."""
    taken = wait_until_whole(server, killed)
    print(f"\n{killed.role} killed: whole again after {taken:.1f} s")
    record_property("recovered_s", taken)
    # A machine that is busy is slow in both; the figures are reported, and what hangs ends here.
    assert taken < 3 * max(RECOVERY_S, server.started_s)


@dataclass(frozen=True)
class Old:
    """Processes that are to go, and the shared memory that they use."""

    processes: list[psutil.Process]
    files: set[Path]

    @classmethod
    def of(cls, *roles: str) -> Old:
        """Those that play these roles now."""
        now = staff()
        found = [process for role in roles for process in now[role]]
        files = set().union(*map(shared_memory, found))
        assert files, "an engine shares memory with its worker"
        return cls(found, files)

    def assert_gone(self) -> None:
        """None of it is left."""
        _, alive = psutil.wait_procs(self.processes, timeout=30)
        assert alive == []
        end = time.monotonic() + 10
        while left := [path for path in self.files if path.exists()]:
            assert time.monotonic() < end, f"{left} outlive those who used them"
            time.sleep(0.1)
