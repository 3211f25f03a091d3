"""The reasoner's problems are right, varied and as long as they claim; its adapter merges."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from memshare.lab.problems import FAMILIES, MAX_TOTAL, Family, generate, read_answer
from memshare.small_model.reasoner import CONFIG, WEIGHTS, adapter_folder, merge, write_merged

SUM = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")
AMOUNT = re.compile(r"([A-Z][a-z]+) has (\d+) \w+\.")


@given(family=st.sampled_from(FAMILIES), seed=st.integers(0, 10**9))
def test_every_sum_of_a_solution_is_right_and_so_is_the_answer(family: Family, seed: int) -> None:
    problem = generate(family, seed)
    sums = SUM.findall(problem.solution)
    assert sums
    for a, sign, b, result in sums:
        assert int(a) + (int(b) if sign == "+" else -int(b)) == int(result)
    assert read_answer(problem.solution) == problem.answer
    assert problem == generate(family, seed)
    assert generate(family, seed + 1).prompt != problem.prompt


@given(seed=st.integers(0, 10**9))
def test_a_chain_starts_and_ends_as_its_prompt_says(seed: int) -> None:
    """The answer is worked out anew from the prompt alone."""
    problem = generate("chain", seed)
    first, *steps, _question = problem.prompt.splitlines()
    total = int(re.findall(r"\d+", first)[0])
    for step in steps:
        change = int(re.findall(r"\d+", step.partition(":")[2])[0])
        less = any(word in step for word in ("off", "sold", "lose", "subtract"))
        total += -change if less else change
        assert 1 <= total <= MAX_TOTAL
    assert total == problem.answer


@given(seed=st.integers(0, 10**9))
def test_recall_needs_amounts_that_only_the_solution_holds(seed: int) -> None:
    problem = generate("recall", seed)
    found: dict[str, set[int]] = {}
    for name, amount in AMOUNT.findall(problem.solution):
        found.setdefault(name, set()).add(int(amount))
    assert all(len(amounts) == 1 for amounts in found.values()), "no two values for one name"
    asked = re.search(r"do (.*) have together", problem.prompt)
    assert asked is not None
    names = re.findall(r"[A-Z][a-z]+", asked[1])
    assert sum(found[name].copy().pop() for name in names) == problem.answer
    assert not AMOUNT.search(problem.prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_third_of_a_solution_repeats_itself(family: Family) -> None:
    """Words of lines most of whose words stand in one earlier line, as the checks' do."""
    repeated = words = 0
    for seed in range(50):
        lines = [set(line.split()) for line in generate(family, seed).solution.split("\n\n")]
        for i, line in enumerate(lines):
            words += len(line)
            if any(len(line & earlier) >= 0.6 * len(line) for earlier in lines[:i]):
                repeated += len(line)
    assert repeated / words >= 0.3


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The final answer is 7. No: The final answer is 12.", 12),
        ("The final answer is -3.", -3),
        ("The final answer is 1", None),
        ("", None),
    ],
)
def test_the_last_stated_answer_counts(text: str, answer: int | None) -> None:
    assert read_answer(text) == answer


def test_merging_is_the_definition_of_lora() -> None:
    weight, down, up = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2)
    inputs = torch.randn(3, 4)
    apart = inputs @ weight.T + 0.5 * (inputs @ down.T) @ up.T
    torch.testing.assert_close(inputs @ merge(weight, down, up, 0.5).T, apart)
    assert merge(weight.bfloat16(), down, up, 0.5).dtype == torch.bfloat16


def test_the_merged_folder_has_changed_only_what_the_adapter_names(tmp_path: Path) -> None:
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    for folder in (base, adapter, out):
        folder.mkdir()
    weights = {"model.a.weight": torch.ones(2, 2), "model.b.weight": torch.ones(2, 2)}
    save_file(weights, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    (base / "chat_template.jinja").write_text("chat")
    lora = {
        "base_model.model.model.a.lora_A.weight": torch.tensor([[1.0, 0.0]]),
        "base_model.model.model.a.lora_B.weight": torch.tensor([[0.0], [1.0]]),
    }
    save_file(lora, adapter / WEIGHTS)
    (adapter / CONFIG).write_text(json.dumps({"r": 1, "lora_alpha": 2}))
    write_merged(base, adapter, out)
    from safetensors.torch import load_file

    merged = load_file(out / "model.safetensors")
    assert merged["model.a.weight"].tolist() == [[1.0, 1.0], [3.0, 1.0]]
    assert torch.equal(merged["model.b.weight"], weights["model.b.weight"])
    assert (out / "config.json").exists()
    assert (out / "chat_template.jinja").read_text() == "chat"


def test_the_adapter_is_there_with_its_card_and_small() -> None:
    folder = adapter_folder()
    assert (folder / WEIGHTS).stat().st_size <= 20e6
    settings = json.loads((folder / CONFIG).read_text())
    assert settings["peft_type"] == "LORA"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "tools/train_reasoner.py" in card
