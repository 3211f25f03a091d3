"""Problems with known answers, and the chains of thought that solve them.

Two families, which lose different things when KV memory is taken from a running request:

- ``chain``: a total changed by 6-14 small steps. Each line needs only the line before it, so a
  policy that keeps the recent tokens keeps the accuracy.
- ``recall``: 6-8 people, each with an amount that the chain of thought works out and checks, and
  later a sum over a few of them. The amounts are nowhere in the prompt: if every copy of one is
  lost, the sum is wrong; if one of its copies is lost, the other one still serves.

The numbers are small, so that a model of 135M parameters makes hardly any mistake of its own: wrong
answers are due to the memory that was given up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

Family = Literal["chain", "recall"]
FAMILIES: tuple[Family, ...] = get_args(Family)

MAX_TOTAL = 20
"""No total of a ``chain`` problem is larger."""
MAX_STEP = 5
"""No single change is larger."""
MAX_AMOUNT = 9
"""What one person of a ``recall`` problem ends up with, at most."""

ANSWER = re.compile(r"The final answer is (-?\d+)\.")
NAMES = (
    "Anna", "Ben", "Carl", "Greg", "Jack", "Paul", "Sam", "Tom", "Will",
    "Alice", "Bob", "David", "Frank", "Henry", "Jane", "Mark", "Peter", "Tim",
    "Lily", "Max", "Adam", "John", "Mary", "Luke", "Anne", "Kim", "Dan",
    "Nick",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem."""

    family: Family
    prompt: str
    """What the user asks."""
    solution: str
    """The chain of thought the reasoner learns to write, up to and with the final answer."""
    answer: int


@dataclass(frozen=True, slots=True)
class ChainWords:
    """How a ``chain`` problem is told: ``{n}`` is a number, ``{i}`` the step's."""

    start: str
    label: str
    """Of a step, as ``Stop {i}``."""
    more: str
    less: str
    question: str


CHAINS = (
    ChainWords(
        "A bus leaves the depot with {n} passengers.",
        "Stop {i}",
        "{n} get on",
        "{n} get off",
        "How many passengers are on the bus after stop {i}?",
    ),
    ChainWords(
        "A shelf in a shop holds {n} books.",
        "Day {i}",
        "{n} are added",
        "{n} are sold",
        "How many books are on the shelf after day {i}?",
    ),
    ChainWords(
        "A player begins a game with {n} points.",
        "Round {i}",
        "win {n}",
        "lose {n}",
        "How many points does the player have after round {i}?",
    ),
    ChainWords(
        "A number begins at {n}.",
        "Step {i}",
        "add {n}",
        "subtract {n}",
        "What is the number after step {i}?",
    ),
)


@dataclass(frozen=True, slots=True)
class RecallWords:
    """How a ``recall`` problem is told."""

    opening: str
    things: str
    first: str
    """How one comes by the first amount: ``{n}`` is a number."""
    more: str
    less: str


RECALLS = (
    RecallWords(
        "{k} friends collect marbles.", "marbles", "starts with {n}", "finds {n}", "loses {n}"
    ),
    RecallWords("{k} children count their coins.", "coins", "has {n}", "gets {n}", "spends {n}"),
    RecallWords("{k} neighbours pick apples.", "apples", "picks {n}", "picks {n} more", "eats {n}"),
    RecallWords("{k} players trade cards.", "cards", "holds {n}", "draws {n}", "gives away {n}"),
)
CHECKS = ("Wait, let me check", "Let me verify", "Hold on, let me check")
COLOURS = ("red", "blue", "green", "black", "white", "brown")


def _changes(random: Random, total: int, count: int) -> Iterator[tuple[int, int, int]]:
    """Yield ``count`` steps as (total before, signed change, total after)."""
    for _ in range(count):
        allowed = [
            change
            for change in range(-MAX_STEP, MAX_STEP + 1)
            if change and 1 <= total + change <= MAX_TOTAL
        ]
        change = random.choice(allowed)
        yield total, change, total + change
        total += change


def _sum(total: int, change: int) -> str:
    """Return the change as arithmetic, with its result."""
    return f"{total} {'+' if change > 0 else '-'} {abs(change)} = {total + change}"


def _chain(random: Random) -> Problem:
    words = random.choice(CHAINS)
    check = random.choice(CHECKS)
    count = random.randint(6, 14)
    start = random.randint(1, MAX_TOTAL // 2)
    told, thought = [words.start.format(n=start)], [f"The total starts at {start}."]
    total = start
    for i, (before, change, total) in enumerate(_changes(random, start, count), start=1):
        label = words.label.format(i=i)
        event = (words.more if change > 0 else words.less).format(n=abs(change))
        told.append(f"{label}: {event}.")
        sums = _sum(before, change)
        thought.append(f"{label}: {event}. So {sums}. Now the total is {total}.")
        thought.append(f"{check} {label.lower()}: {event}, and {sums}. Yes, the total is {total}.")
    thought.append(f"The final answer is {total}.")
    told.append(words.question.format(i=count))
    return Problem("chain", "\n".join(told), "\n\n".join(thought), total)


def _recall(random: Random) -> Problem:
    words = random.choice(RECALLS)
    check = random.choice(CHECKS)
    names = random.sample(NAMES, random.randint(6, 8))
    told = [words.opening.format(k=len(names))]
    thought = [f"First I find how many {words.things} each one has."]
    amounts = {}
    for name in names:
        while True:
            first, up, down = (
                random.randint(1, MAX_AMOUNT),
                random.randint(1, 5),
                random.randint(1, 5),
            )
            amount = first + up - down
            if 1 <= amount <= MAX_AMOUNT:
                break
        amounts[name] = amount
        event = ", ".join(
            (words.first.format(n=first), words.more.format(n=up), words.less.format(n=down))
        )
        told.append(f"{name} {event}.")
        steps = f"{_sum(first, up)} and {_sum(first + up, -down)}"
        thought.append(f"{name} {event}. So {steps}. {name} has {amount} {words.things}.")
        thought.append(f"{check} {name}: {steps}. Yes, {name} has {amount} {words.things}.")
        if random.random() < 0.2:
            colour = random.choice(COLOURS)
            told.append(f"{name} wears a {colour} hat.")
            thought.append(f"{name} wears a {colour} hat, but that does not matter here.")
    asked = random.sample(names, random.randint(3, 4))
    together = f"{', '.join(asked[:-1])} and {asked[-1]}"
    told.append(f"How many {words.things} do {together} have together?")
    thought.append(f"Now I add what {together} have.")
    total = 0
    for name in asked:
        added, sums = f"{name} has {amounts[name]} {words.things}", _sum(total, amounts[name])
        total += amounts[name]
        thought.append(f"{added}. So {sums}. The sum is {total}.")
        thought.append(f"{check} the sum: {added}, and {sums}. Yes, the sum is {total}.")
    thought.append(f"The final answer is {total}.")
    return Problem("recall", "\n".join(told), "\n\n".join(thought), total)


def generate(family: Family, seed: int) -> Problem:
    """Return problem number ``seed`` of ``family``, always the same one."""
    random = Random(f"{family} {seed}")
    return _chain(random) if family == "chain" else _recall(random)


def read_answer(text: str) -> int | None:
    """Return the last final answer stated in ``text``, or None if it states none."""
    found = ANSWER.findall(text)
    return int(found[-1]) if found else None
