"""Role switches in real engines, replayed and measured as a user would do it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memshare.cli.main import main
from memshare.lab.agents.fit import mean_nll
from memshare.lab.agents.passes import make_passes
from memshare.lab.agents.records import read_records
from tests.memshare.agents.tiny import write_adapter
from tests.memshare.lab.agents.trajectories import ROLES, rows, write_base, write_rows

pytestmark = [pytest.mark.engine, pytest.mark.complete, pytest.mark.timeout(900)]


def test_schemes_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``nonshared`` says what peft says. Roles read what others have written under the other
    schemes, and sharing everything loses more than sharing what adapters leave alone."""
    from peft import PeftModel

    base = write_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for number, role in enumerate(ROLES):
        write_adapter(tmp_path / role, model, seed=number, a_seed=9)
        write_rows(tmp_path / f"{role}.jsonl", rows(role))
    command = [
        "agents", "bench", *(str(tmp_path / role) for role in ROLES), "--base", str(base),
        *(f"--records={role}={tmp_path / role}.jsonl" for role in ROLES), "--held-out", "1",
        "--schemes", "base_lr_shared,full_shared", "--work", str(tmp_path / "work"),
        "--json", str(tmp_path / "figures.json"),
    ]  # fmt: skip
    assert main(command) == 0
    figures: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
    runs, quality = figures["runs"], figures["quality"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    for role in ROLES:
        adapted = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / role
        )
        passes = make_passes(read_records(tmp_path / f"{role}.jsonl"), tokenizer, 4096)
        wanted = mean_nll(adapted, passes, role)
        found = quality[f"Role {role}"]["nonshared"]["nll"]["value"]
        assert found == pytest.approx(wanted, abs=0.01)  # distributions are kept in 16 bits
    everyone = quality["All roles"]
    assert 0.01 < everyone["base_lr_shared"]["kl"]["value"] < everyone["full_shared"]["kl"]["value"]
    assert 0 < everyone["base_lr_shared"]["kept_kl"]["value"] < 1
    switches = {
        scheme: [turn["cached"] > 0 for turn in run["turns"] if turn["switched"]]
        for scheme, run in runs.items()
    }
    assert all(switches["base_lr_shared"])
    assert not all(switches["nonshared"])
    assert runs["base_lr_shared"]["computed"] < 0.9 * runs["nonshared"]["computed"]
    assert runs["base_lr_shared"]["kept"] < 0.7 * runs["nonshared"]["kept"]

    capsys.readouterr()
    assert main(command) == 0  # from what was kept, without engines
    assert "base_lr_shared" in capsys.readouterr().out
    assert main([*command, "--at-once", "2"]) == 1
    assert "holds what was measured otherwise" in capsys.readouterr().err


def test_switches_by_number_of_agents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under a scheme that shares the others compute what is new, and memory does not grow with
    them; each with a cache of its own computes and keeps everything."""
    base = write_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    write_adapter(tmp_path / "plan", model, seed=0)
    write_rows(tmp_path / "plan.jsonl", rows("plan"))
    command = [
        "agents", "switches", *(f"{name}={tmp_path / 'plan'}" for name in "abc"),
        "--base", str(base), "--records", str(tmp_path / "plan.jsonl"),
        "--schemes", "base_lr_shared", "--contexts", "64,256", "--new", "10", "--block-size", "32",
        "--work", str(tmp_path / "work"), "--json", str(tmp_path / "figures.json"),
        "--plot", str(tmp_path / "figures.svg"),
    ]  # fmt: skip
    assert main(command) == 0
    assert "From the first context to the last" in capsys.readouterr().out
    runs = {
        scheme: json.loads((tmp_path / "work" / "3-agents" / f"{scheme}.json").read_text())
        for scheme in ("nonshared", "base_lr_shared")
    }
    found = {scheme: [turn["cached"] for turn in run["turns"]] for scheme, run in runs.items()}
    assert found == {"nonshared": [0] * 6, "base_lr_shared": [0, 64, 64, 0, 256, 256]}
    kept = [runs[scheme]["kept"] for scheme in ("nonshared", "base_lr_shared")]
    assert kept == [2 * 3 + 8 * 3, 2 + 8]
    figures = json.loads((tmp_path / "figures.json").read_text())["3"]
    assert [row["context"] for row in figures["nonshared"]] == [64, 256]
    assert (tmp_path / "figures.svg").stat().st_size > 0
