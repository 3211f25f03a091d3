"""Records of roles, their trajectories, and the passes that they are trained in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from transformers import AutoModelForCausalLM, AutoTokenizer

from memshare.errors import UserError
from memshare.lab.agents.fit import nll
from memshare.lab.agents.passes import Pass, make_passes
from memshare.lab.agents.records import Record, read_records, split, trajectories
from tests.memshare.lab.agents.trajectories import ROLES, rows, write_base, write_rows

GOOD = {"input": "a", "output": "b"}


def records(role: str = "plan", count: int = 6) -> list[Record]:
    return [Record(**row) for row in rows(role, count)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return AutoTokenizer.from_pretrained(base)


# ---- reading ----


def test_lines_and_lists_are_read(tmp_path: Path) -> None:
    lines = write_rows(tmp_path / "lines.jsonl", rows("plan"))
    lines.write_text(lines.read_text() + "\n")  # an empty line is none
    a_list = tmp_path / "list.json"
    a_list.write_text(json.dumps(rows("plan")))
    assert read_records(lines) == read_records(a_list) == records()


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "line 2: no JSON"),
        ("7", "line 2: "),
        (json.dumps({"input": "a"}), "line 2: output: Field required"),
        (json.dumps(GOOD | {"input": 3}), "line 2: input: Input should be a valid string"),
        (json.dumps(GOOD | {"score": 3}), "line 2: score: Extra inputs are not permitted"),
        (json.dumps(GOOD | {"output": " \n"}), "line 2: output is empty"),
        (json.dumps(GOOD | {"input": ""}), "line 2: input is empty"),
    ],
)
def test_a_bad_line_is_named(line: str, what: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    with pytest.raises(UserError) as caught:
        read_records(file)
    assert str(caught.value).startswith(f"{file}, {what}")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "no records"), (b"[]", "no records"), (b"[1", "no JSON"), (b"\xff", "cannot be read"),
        (b"[{}]", "record 1: input: Field required"),
    ],
)  # fmt: skip
def test_a_bad_file(content: bytes, what: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=what):
        read_records(file)


# ---- trajectories ----


@given(st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=12))
def test_a_trajectory_begins_with_its_shortest_input(inputs: list[str]) -> None:
    found = trajectories([Record(input=text, output="x") for text in inputs])
    for text, root in zip(inputs, found, strict=True):
        assert root == min((one for one in inputs if text.startswith(one)), key=len)


def test_whole_trajectories_are_kept_aside() -> None:
    by_role = {role: records(role, 12) for role in ROLES}
    parts = split(by_role, 0.25)
    assert parts.trajectories == (9, 3)
    for role in ROLES:
        assert (len(parts.seen[role]), len(parts.held_out[role])) == (18, 6)
        assert sorted(parts.seen[role] + parts.held_out[role], key=str) == sorted(
            by_role[role], key=str
        )
    roots = [
        set(trajectories([r for role in ROLES for r in side[role]]))
        for side in (parts.seen, parts.held_out)
    ]
    assert not roots[0] & roots[1]
    assert split(dict(reversed(by_role.items())), 0.25).held_out == parts.held_out


def test_too_few_trajectories_to_keep_any_aside() -> None:
    with pytest.raises(UserError, match=r"plan: its records are of too few .* all 1 aside"):
        split({"plan": records(count=1)}, 0.5)
    assert split({"plan": records(count=1)}, 0.0).held_out == {"plan": []}


# ---- passes ----


def test_what_goes_on_from_a_record_is_read_with_it(tokenizer: Any) -> None:
    passes = make_passes(records(), tokenizer, 1000)
    assert [one.records for one in passes] == [2] * 6
    alone = make_passes(records()[:1], tokenizer, 1000)
    assert passes[0].targets[: len(alone[0].targets)] == alone[0].targets
    assert passes[0].targets[-1] == tokenizer.eos_token_id


def test_an_output_that_was_not_followed_has_a_pass_of_its_own(tokenizer: Any) -> None:
    other = Record(input=records()[0].input, output="something else")
    assert [one.records for one in make_passes([*records()[:2], other], tokenizer, 1000)] == [2, 1]


def test_long_contexts_are_cut_and_no_record_is_lost(tokenizer: Any) -> None:
    first = Record(input="x" * 50, output="y")
    later = Record(input="x" * 50 + "y" + "z" * 40, output="w")
    for context, expected in ((1000, [2]), (60, [1, 1]), (85, [2])):
        passes = make_passes([first, later], tokenizer, context)
        assert [one.records for one in passes] == expected
        assert all(min(one.positions) >= min(50, context // 2) - 1 for one in passes)
        assert max(len(one.tokens) for one in passes) == min(context, 91) + 1


def test_one_pass_says_what_many_say(base: Path, tokenizer: Any) -> None:
    """Whatever records a pass holds, their targets are as likely as in passes of their own; those
    of other records are not."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    together = make_passes(records(), tokenizer, 1000)
    apart = [make_passes([record], tokenizer, 1000)[0] for record in records()]

    def said(passes: list[Pass]) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([nll(model, one) for one in passes])

    assert len(together) < len(apart)
    assert torch.allclose(said(together), said(apart), atol=1e-4)
    assert not torch.allclose(said(together), said(apart).roll(1), atol=1e-1)
