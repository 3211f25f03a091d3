"""Triton kernels, compiled for GPUs that are not here."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = ["cubin", "cubin", "hsaco"]
_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def compile_for_gpus(kernel, signature, constants):
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
    for target, code in (
        (GPUTarget("cuda", 80, 32), "cubin"),
        (GPUTarget("cuda", 90, 32), "cubin"),
        (GPUTarget("hip", "gfx942", 64), "hsaco"),
    ):
        print(code, len(triton.compile(source, target=target).asm[code]))
"""


def compiled(program: str) -> list[tuple[str, int]]:
    """Kinds and bytes of code that a program has made with ``compile_for_gpus(kernel, signature,
    constants)``, in the order of ``CODE`` for each kernel.

    Down to the instructions of the device; nothing runs. In a process of its own, because the
    interpreter leaves traces. Skips where there is no Triton.
    """
    pytest.importorskip("triton", reason="there is none for this machine")
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE + program], check=True, capture_output=True, text=True
    )
    words = done.stdout.split()
    return list(zip(words[::2], map(int, words[1::2]), strict=True))
