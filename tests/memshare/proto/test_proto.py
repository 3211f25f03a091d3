"""The generated code is what the compiler makes of ``memshare/proto/memshare.proto``."""

from __future__ import annotations

from pathlib import Path

from tools.make_proto import ROOT, generate


def test_the_generated_code_is_up_to_date(tmp_path: Path) -> None:
    for file in generate(tmp_path):
        committed = ROOT / file.relative_to(tmp_path)
        assert committed.read_text() == file.read_text(), "run: python -m tools.make_proto"
