"""lm-eval as docs/measuring.md calls it, in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.documents import ROOT, blocks, commands


class Sample(NamedTuple):
    """One answered problem.

    Attributes:
        problem: as it stands in the file.
        messages: that were sent.
        text: that came back.
        right: lm-eval's verdict, 0 or 1.
    """

    problem: str
    messages: list[dict[str, str]]
    text: str
    right: float


def run_lm_eval(
    url: str, folder: Path, count: int, options: dict[str, str], max_tokens: int
) -> list[Sample]:
    """Run the command of the documentation with fewer problems, one after the other.

    Args:
        url: of the server.
        folder: where it runs.
        count: problems.
        options: of every request (``vllm_xargs``).
        max_tokens: of an answer.
    """
    program = shutil.which("lm_eval")
    assert program, "lm_eval is not on PATH; `make venv` installs it (extra `dev`)"
    make_problems = [sys.executable, str(ROOT / "docs/recipes/problems.py"), str(count)]
    problems = subprocess.run(make_problems, capture_output=True, text=True, check=True).stdout
    (folder / "problems.jsonl").write_text(problems)
    words = [
        word.replace("http://127.0.0.1:8000", url)
        .replace("docs/recipes", str(ROOT / "docs/recipes"))
        .replace("num_concurrent=8", "num_concurrent=1")
        for word in _documented()[1:]
    ]
    words += ["--gen_kwargs", f"max_gen_toks={max_tokens}", f"vllm_xargs={json.dumps(options)}"]
    home = {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        [program, *words], cwd=folder, env=os.environ | home, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "|reasoner|" in done.stdout, "no table of results"
    (file,) = folder.glob("shared/**/samples_reasoner_*.jsonl")
    return [_read(json.loads(line)) for line in file.read_text().splitlines()]


def _documented() -> list[str]:
    (found,) = (
        words for block in blocks("sh") for words in commands(block) if words[0] == "lm_eval"
    )
    return found


def _read(line: dict[str, object]) -> Sample:
    doc, arguments, answers = line["doc"], line["arguments"], line["resps"]
    assert isinstance(doc, dict)
    assert isinstance(arguments, dict)
    assert isinstance(answers, list)
    messages = json.loads(arguments["gen_args_0"]["arg_0"][0])
    right = line["exact_match"]
    assert isinstance(right, float | int)
    return Sample(doc["prompt"], messages, answers[0][0], float(right))
