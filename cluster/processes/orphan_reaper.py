"""Ends the engine's processes with the replica, however the replica ends, and what they leave."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

# The guard is an orphan itself, in a session of its own: when a worker of Ray ends, its children
# and its process group are killed, by itself or by the raylet. `read` blocks on a pipe that ends
# with the process at its other end, even by SIGKILL; until then it brings names of files. Python's
# resource trackers are spared: with nobody left to serve they remove the shared memory that the
# killed left behind, and end; but they may have been killed already. Killing goes on until nobody
# is left, as the killed may have started others meanwhile.
_SCRIPT = r"""
kill_group() {
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
}
guard() {
  group=$1; shift
  while read -r name; do set -- "$@" "$name"; done
  kill_group
  rm -f -- "$@"
}
exec 3<&0 2>/dev/null
guard "$1" <&3 &
"""


class OrphanReaper:
    """A shell that outlives this process by an instant, to kill and remove what it leaves behind.

    vLLM's engine runs as a child process that does not notice when its parent is killed: it would
    keep its memory, or its GPU, for ever. This catches what a destructor can't. To be made once,
    before the engine is started: what this process starts afterwards is in its process group.
    """

    def __init__(self) -> None:
        """Start the shell."""
        if os.getpgrp() != os.getpid():
            os.setpgid(0, 0)
        reader, self._writer = os.pipe()  # the writer is not inherited, and open as long as we are
        starter = os.posix_spawn(
            "/bin/sh",
            ["/bin/sh", "-c", _SCRIPT, "memshare-guard", str(os.getpgrp())],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, reader, 0)],
            setsid=True,
        )
        os.close(reader)
        os.waitpid(starter, 0)

    def remove_at_the_end(self, files: Iterable[Path]) -> None:
        """Have files removed once nobody is left who could use them.

        The engine's processes share hundreds of MB of memory by files in ``/dev/shm``, which stay
        there for ever if whoever made them, and Python's resource tracker, are killed.
        """
        os.write(self._writer, "".join(f"{file}\n" for file in files).encode())
