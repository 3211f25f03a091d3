"""Records of made-up trajectories, and a tiny base model that reads their bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.memshare.engine.harness import write_tiny_model

ROLES = ("plan", "act")


def rows(role: str, count: int = 6) -> list[dict[str, str]]:
    """Two records of a role for each of the trajectories, of which the second goes on from the
    first."""
    found = []
    for number in range(count):
        first = f"{number}: what is {number}+{number}? Think of {number} apples and {number} more. "
        said = f"{role} {number}"
        found.append({"input": first, "output": said})
        found.append({"input": f"{first}{said}. Sure? ", "output": "yes"})
    return found


def write_rows(path: Path, lines: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_base(folder: Path) -> Path:
    from transformers import AutoConfig, LlamaForCausalLM

    folder.mkdir()
    write_tiny_model(folder)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
