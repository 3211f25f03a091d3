"""The role adapters of memshare-lab-data, served and compared as an operator would do it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from memshare.cli.main import main
from memshare.lab.agents.turns import ReplayPlan, Turn
from memshare.small_model.names import SMOLLM2
from tests.machine import DTYPE
from tests.memshare.engine.harness import BLOCK
from tests.memshare.lab.agents.trajectories import write_rows

pytestmark = [pytest.mark.engine, pytest.mark.complete, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[4]
SHIPPED = ROOT / "tools" / "lab_data" / "memshare_lab_data" / "roles"
ROLES = ("plan", "action", "reflect")


@dataclass(frozen=True)
class Task:
    """A question, and what three roles say on the way to its answer."""

    question: str
    options: str
    thought: str
    caption: str
    seen: str
    query: str
    found: str
    answer: str
    letter: str


# Made up for this test, in the form of the records that the adapters were trained on.
TASKS = (
    Task(
        "Which of these objects lets an electric current pass most easily?",
        "(A) Rubber glove (B) Copper wire (C) Glass rod (D) Wooden spoon",
        "Let's see what the picture shows about these objects.",
        "A picture of four household objects on a table",
        "Compared with what I know, metals let a current pass.",
        "electrical conductors",
        "A conductor is a material in which charges move freely. Silver, copper and aluminium are "
        "good conductors, which is why cables are made of them. Rubber, glass and dry wood hold "
        "their charges in place, and are used to keep people away from wires under voltage.",
        "Based on the search results, copper wire lets a current pass most easily.",
        "B",
    ),
    Task(
        "Which body of the solar system gives off light of its own?",
        "(A) The Moon (B) Venus (C) The Sun (D) Mars",
        "Let's analyze the question and look at the picture first.",
        "A diagram of the planets and their orbits around a star",
        "Based on the image caption, a star is in the middle of the diagram.",
        "why does the Sun shine",
        "The Sun is a star. In its core hydrogen becomes helium, and what that sets free comes to "
        "the surface after thousands of years and leaves it as light. Planets and moons are seen "
        "because they send back a part of that light, and are dark on the far side.",
        "Based on the search results, the Sun is the body that gives off light.",
        "C",
    ),
    Task(
        "What do roots of most plants take up from the soil?",
        "(A) Water and minerals (B) Sunlight (C) Oxygen alone (D) Sugar",
        "I need to find out what roots are for.",
        "A drawing of a plant with leaves, a stem and roots",
        "The picture shows roots in the soil, below the stem.",
        "what do plant roots absorb",
        "Fine hairs behind the tip of each root make its surface many times larger. Through them "
        "water enters the plant, and with it nitrate, phosphate, potassium and other minerals. "
        "Leaves make sugar out of water, carbon dioxide and light, and send some of it down again.",
        "Based on the search results, roots take up water and minerals.",
        "A",
    ),
    Task(
        "Which change of state happens when a puddle dries in the sun?",
        "(A) Melting (B) Freezing (C) Condensation (D) Evaporation",
        "Let's think about what happens to the water in a puddle.",
        "A picture of a street with a puddle after the rain",
        "Based on the image caption, there is liquid water on the street.",
        "liquid water becomes vapor",
        "Molecules at the surface of a liquid move at different speeds, and the fastest leave it. "
        "Warm air and wind let more of them go, so that a wet street is dry after an hour of sun. "
        "The opposite happens when vapor meets a cold window: small drops form on the glass.",
        "Based on the search results, a puddle dries by evaporation.",
        "D",
    ),
)


def turns_of(task: Task) -> Iterator[tuple[str, str, str]]:
    """A trajectory: role, what it reads, and what it writes."""
    context = f"Question:{task.question}\nOptions:{task.options}\nThought: \n### Response:\n"
    for thought, action, argument, observation in (
        (task.thought, "Image2Text", "image", f"Image caption: {task.caption}"),
        (task.seen, "BingSearch", task.query, task.found),
        (task.answer, "Finish", task.letter, "Please reflect your answer."),
    ):
        yield "plan", context, thought
        yield "plan", f"{context}{thought}\nAction: \n### Response:\n", action
        context += f"{thought}\nAciton: {action}[\n### Response:\n"
        yield "action", context, argument
        context += f"{argument}]\nObversation: {observation}\nThought: \n### Response:\n"
    thought = "My answer is correct."
    yield "reflect", context, thought
    yield "reflect", f"{context}{thought}\nAction: \n### Response:\n", "Reflect[right]"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    for role in ROLES:
        rows = [
            {"input": read, "output": wrote}
            for task in TASKS
            for who, read, wrote in turns_of(task)
            if who == role
        ]
        write_rows(folder / f"{role}.jsonl", rows)
    return folder


def bench(records: Path, folders: dict[str, str], work: Path, schemes: str) -> dict[str, Any]:
    """Figures of ``memshare agents bench``."""
    figures = work.with_suffix(".json")
    assert main([
        "agents", "bench", *(f"{role}={SHIPPED / name}" for role, name in folders.items()),
        *(f"--records={role}={records / role}.jsonl" for role in ROLES), "--held-out", "1",
        "--base", SMOLLM2.name, "--dtype", DTYPE, "--block-size", str(BLOCK), "--schemes", schemes,
        "--work", str(work), "--json", str(figures),
    ]) == 0  # fmt: skip
    read: dict[str, Any] = json.loads(figures.read_text())
    return read


def findable(turns: list[Turn], number: int) -> int:
    """Tokens in whole blocks of what is cached when a turn begins, whoever wrote them."""
    prompt, most = turns[number].prompt, 0
    for before in turns[:number]:
        cached = [*before.prompt, *before.output[:-1]]
        pairs = zip(prompt[:-1], cached, strict=False)  # the last token is always computed
        same = next(
            (i for i, (a, b) in enumerate(pairs) if a != b), min(len(prompt) - 1, len(cached))
        )
        most = max(most, same // BLOCK * BLOCK)
    return most


def test_shipped_roles_share_one_cache(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every switch of roles finds all whole blocks, and little is lost by it. Whoever takes the
    other's whole cache loses several times as much, and another role's matrices are no use."""
    folders = [str(SHIPPED / role) for role in ROLES]
    assert main(["agents", "check", *folders]) == 0
    assert "plan, action, reflect share one cache, with 8 low-rank columns" in (
        capsys.readouterr().out
    )
    work = tmp_path / "own"
    own = bench(records, {role: role for role in ROLES}, work, "base_lr_shared,full_shared")
    plan = ReplayPlan.load(work / "plan.json")
    runs = own["runs"]["base_lr_shared"]["turns"]
    assert len(runs) == len(TASKS) * 11
    for turn in runs:
        talk = plan.conversations[turn["conversation"]]
        assert turn["cached"] == findable(talk, turn["turn"])
    switches = [turn["cached"] for turn in runs if turn["switched"]]
    assert len(switches) == len(TASKS) * 6
    assert sum(found > 0 for found in switches) == len(switches)

    others = {"plan": "reflect", "action": "plan", "reflect": "action"}
    wrong = bench(records, others, tmp_path / "others", "nonshared")
    for role in ("action", "reflect"):  # little that plan reads was written by others
        found = own["quality"][f"Role {role}"]
        kl = {scheme: quality["kl"]["value"] for scheme, quality in found.items()}
        nll = {scheme: quality["nll"]["value"] for scheme, quality in found.items()}
        assert 0 < kl["base_lr_shared"] < 0.2 * kl["full_shared"]
        lost = nll["base_lr_shared"] - nll["nonshared"]
        assert lost < 0.3 * (nll["full_shared"] - nll["nonshared"])
        strange = wrong["quality"][f"Role {role}"]["nonshared"]["nll"]["value"]
        assert strange > nll["full_shared"] + 0.1, "control: another role's matrices"
