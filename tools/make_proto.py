"""Generate the modules of ``memshare/proto`` from ``memshare/proto/memshare.proto``.

    python -m tools.make_proto

The generated code is committed, so that nobody needs a compiler to install the package. A test
fails while it differs from what this script would write.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "memshare/proto"
NAMES = ("memshare_pb2.py", "memshare_pb2.pyi", "memshare_pb2_grpc.py")


def generate(folder: Path) -> list[Path]:
    """Write the package's generated files below ``folder``; returns them.

    Raises:
        subprocess.CalledProcessError: the compiler does not accept the file, and has said why.
    """
    outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
    # From the top folder: the generated modules import each other as memshare.proto.*
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs]
    subprocess.run([*command, f"{PACKAGE}/memshare.proto"], cwd=ROOT, check=True)
    return [folder / PACKAGE / name for name in NAMES]


if __name__ == "__main__":
    for file in generate(ROOT):
        print(f"wrote {file.relative_to(ROOT)}")
