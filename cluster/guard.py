"""Ends the engine's processes with the replica, however the replica ends."""

from __future__ import annotations

import os

# Blocks on standard input, which ends with the process at its other end, even by SIGKILL.
_SCRIPT = 'read -r _; kill -s KILL -- "-$1" 2>/dev/null'


def leave_no_orphans() -> None:
    """Start a shell that outlives this process by an instant, to kill what it leaves behind.

    vLLM's engine runs as a child process that does not notice when its parent is killed: it would
    keep its memory, or its GPU, for ever. This catches what a destructor can't. To be called once,
    before the engine is started: what this process starts afterwards is in its process group.
    """
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    reader, _ = os.pipe()  # the writer is not inherited, and stays open as long as this process
    os.posix_spawn(
        "/bin/sh",
        ["/bin/sh", "-c", _SCRIPT, "memshare-guard", str(os.getpgrp())],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, reader, 0)],
        setsid=True,  # out of the group that it kills
    )
    os.close(reader)
