"""What the log of ``serve run`` says about a start that goes wrong.

``serve run`` stays alive when a replica cannot start: Ray tries again, and again. Waiting for the
time limit would hide the reason for minutes, so the log is watched while it grows.
"""

from __future__ import annotations

import re
from pathlib import Path

# Ray prefixes the lines of its actors: "\x1b[36m(ServeController pid=1)\x1b[0m text".
PREFIX = re.compile(r"(?:\x1b\[\d+m)?\([\w:.#]+ (?:pid|ip)=[^)]*\)(?:\x1b\[0m)? ")
ERROR = re.compile(r"[\w.]*(?:Error|Exception|Unsupported\w*): .+")
REPLICA_FAILED = "Exception in Replica("
BUILD_FAILED = ("Deploying app ", "failed with exception")
# Our own polling, and Ray's reminders that a start takes its time.
NOISE = ("disconnected, cancelling request", "taken more than", "slow __init__ or reconfigure")


class ServeLog:
    """Reads a growing log file, a piece at a time."""

    def __init__(self, path: Path) -> None:
        """Watch ``path``, which exists."""
        self.path = path
        self.replica_failures = 0
        """How often a replica failed to start."""
        self.build_failed = False
        """Whether the application could not be built at all; Ray does not try that again."""
        self.reason = ""
        """The last exception's type and message."""
        self._explaining = False
        self._offset = 0

    def read_on(self) -> None:
        """Take in what was written since the last call. A line without its end waits."""
        with self.path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        for raw in whole.decode(errors="replace").splitlines():
            line = PREFIX.sub("", raw)
            if ERROR.fullmatch(line):
                self.reason, self._explaining = line, True
            elif self._explaining:
                # Our errors go on: a line that ends with a colon, then indented ones.
                self._explaining = bool(line.strip()) and (
                    self.reason.endswith(":") or line.startswith(" ")
                )
                if self._explaining:
                    self.reason += f"\n{line}"
            self.replica_failures += REPLICA_FAILED in line
            self.build_failed |= all(part in line for part in BUILD_FAILED)

    def tail(self, lines: int) -> str:
        """Return the last lines of the file that say something."""
        text = self.path.read_text(errors="replace")
        telling = [line for line in text.splitlines() if not any(word in line for word in NOISE)]
        return "\n".join(telling[-lines:])
