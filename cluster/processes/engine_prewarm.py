"""The engine's process begins to import vLLM while the replica does, and not after it.

vLLM starts the process of its engine when the replica has imported vLLM and read the configuration;
a fresh interpreter then imports all of it again. That is a fifth of the time until a replica serves
a small model, and a second core is idle meanwhile. So the interpreter is started first, imports,
and waits for what ``multiprocessing`` tells a spawned process. It is a spawned process in all else.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from importlib import import_module
from multiprocessing import context, popen_spawn_posix, process, resource_tracker, spawn, util
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler

from memshare.process_env import collector_at_rest

# What an engine with MemShare imports before it does anything.
ENGINE_MODULES = (
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "memshare.engine.connector",
)


class EnginePrewarm:
    """An interpreter that imports modules, and then becomes a process that is asked for."""

    def __init__(self, modules: tuple[str, ...] = ENGINE_MODULES) -> None:
        """Start it.

        Args:
            modules: what it imports.
        """
        self._executable = spawn.get_executable()
        tracker = resource_tracker.getfd()
        assert tracker is not None
        self._sentinel, child_w = os.pipe()
        child_r, self._pipe = os.pipe()
        program = (
            f"import sys; sys.path = {sys.path!r}\n"
            f"from {__name__} import become; become({child_r}, {tracker}, {modules!r})"
        )
        flags = util._args_from_interpreter_flags()  # type: ignore[attr-defined]
        command = [self._executable, *flags, "-c", program, "--multiprocessing-fork"]
        try:
            self.pid = util.spawnv_passfds(
                os.fsencode(self._executable), command, (child_r, child_w, tracker)
            )
        finally:
            os.close(child_r)
            os.close(child_w)
        self._waits = True  # for somebody to ask

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, the first process that is spawned is this one. Afterwards it is too late.

        A process that needs more than an interpreter (another executable, open files of its parent)
        is spawned as always.
        """
        ordinary = context.SpawnProcess._Popen

        def popen(process_obj: process.BaseProcess) -> popen_spawn_posix.Popen:
            if self._can_be_taken():
                with contextlib.suppress(_NeedsFilesError):
                    return _Popen(process_obj, self)
            return ordinary(process_obj)

        context.SpawnProcess._Popen = staticmethod(popen)  # type: ignore[method-assign]
        try:
            yield
        finally:
            context.SpawnProcess._Popen = staticmethod(ordinary)  # type: ignore[method-assign]
            if self._waits:
                self._end()

    def take(self, data: bytes) -> tuple[int, int, int]:
        """Tell it who it is. From now on it belongs to the caller.

        Args:
            data: what :func:`multiprocessing.spawn.spawn_main` reads.

        Returns:
            Its id; a file descriptor that can be read when it has ended; and one that it watches,
            to notice the end of its parent.
        """
        self._waits = False
        with Connection(os.dup(self._pipe), readable=False) as environment:
            environment.send(dict(os.environ))
        with open(self._pipe, "wb", closefd=False) as pipe:
            pipe.write(data)
        return self.pid, self._sentinel, self._pipe

    def _can_be_taken(self) -> bool:
        # One that has failed wrote its traceback to the log.
        same = spawn.get_executable() == self._executable
        return self._waits and same and not self._has_ended()

    def _has_ended(self) -> bool:
        try:
            return os.waitpid(self.pid, os.WNOHANG) != (0, 0)
        except ChildProcessError:  # somebody else was told of its end
            return True

    def _end(self) -> None:
        self._waits = False
        if not self._has_ended():
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._pipe)
        os.close(self._sentinel)


class _NeedsFilesError(Exception):
    """The process is to inherit open files, which one that runs already can't."""


class _Popen(popen_spawn_posix.Popen):
    """As its base in CPython's popen_spawn_posix.py, with a process that has been started."""

    def __init__(self, process_obj: process.BaseProcess, prewarm: EnginePrewarm) -> None:
        self._prewarm = prewarm
        super().__init__(process_obj)

    def duplicate_for_child(self, fd: int) -> int:
        raise _NeedsFilesError

    def _launch(self, process_obj: process.BaseProcess) -> None:
        data = io.BytesIO()
        context.set_spawning_popen(self)
        try:
            ForkingPickler(data).dump(spawn.get_preparation_data(process_obj.name))
            ForkingPickler(data).dump(process_obj)
        finally:
            context.set_spawning_popen(None)
        self.pid, self.sentinel, pipe = self._prewarm.take(data.getvalue())
        self.finalizer = util.Finalize(self, util.close_fds, (self.sentinel, pipe))  # type: ignore[attr-defined]


def become(pipe: int, tracker: int, modules: tuple[str, ...]) -> None:
    """Import modules, and be the process that the other end of a pipe tells. Ends the interpreter.

    Args:
        pipe: file descriptor that brings an environment and then what ``spawn_main`` reads.
        tracker: file descriptor of the parent's resource tracker.
        modules: what to import meanwhile.
    """
    with collector_at_rest():
        for name in modules:
            import_module(name)
    try:
        with Connection(os.dup(pipe), writable=False) as told:
            environment: dict[str, str] = told.recv()
    except EOFError:  # nobody needs it
        sys.exit(0)
    # What is the same stays in place: where it is, setproctitle writes.
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update({k: v for k, v in environment.items() if os.environ.get(k) != v})
    spawn.spawn_main(pipe_handle=pipe, tracker_fd=tracker)
