"""Ends the engine's processes with the replica, however the replica ends."""

from __future__ import annotations

import os
from multiprocessing import resource_tracker

# `read` blocks on standard input, which ends with the process at its other end, even by SIGKILL.
# Python's resource trackers are spared: with nobody left to serve they remove the shared memory
# that the killed left behind, hundreds of MB for each engine, and end. Killing goes on until nobody
# is left, as the killed may have started others meanwhile.
_SCRIPT = r"""
group=$1
exec 2>/dev/null
read -r _
for round in 1 2 3 4 5 6 7 8 9 10; do
  left=
  for folder in /proc/[0-9]*; do
    read -r stat < "$folder/stat" || continue
    set -- ${stat##*) }  # behind the name: state, parent, group
    [ "$3" = "$group" ] && [ "$1" != Z ] || continue
    tr '\0' ' ' < "$folder/cmdline" | grep -q multiprocessing.resource_tracker && continue
    kill -s KILL "${folder#/proc/}"
    left=yes
  done
  [ "$left" ] || break
  sleep 0.1
done
"""


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


def remove_shared_memory() -> None:
    """Remove what the engine's processes, which have ended, left in shared memory.

    That is the work of Python's resource tracker, once nobody needs it any more. But a Ray worker
    that exits kills its children, and the tracker is one: so it has to be done before. Returns when
    it is; waits for processes of the engine that are still there.
    """
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]
