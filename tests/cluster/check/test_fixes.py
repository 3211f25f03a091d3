"""Every fix that ``memshare check`` or a configuration error proposes is a whole sentence.

Texts are read from the source: whatever follows ``fix:`` in a string, and what findings are given
as their fix. What is filled in at run time stands there as ``X``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from cluster.config import ClusterArgs
from memshare.config import MemShareConfig, Section

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted([*ROOT.glob("cluster/**/*.py"), *ROOT.glob("memshare/**/*.py")])
# What `fixes` looks for; a file without any of them need not be parsed.
NAMES = re.compile("fix|CheckFinding|_wrong")

# Words with which no English sentence ends, and beginnings of something that never comes.
OPEN_ENDS = re.compile(
    r"""(\b(a|an|the|and|or|of|to|in|on|at|by|with|from|for|its|their|your|than|as|is|are|if|where
        |which|that|not|no|set|lower|raise)|'s|[,;:(\-])$""",
    re.VERBOSE | re.IGNORECASE,
)


def text_of(node: ast.AST) -> str | None:
    """A string of the source, ``X`` for what is filled in; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "X" for part in node.values)
    return None


def fixes(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of each fix in a module."""
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)
             for part in node.values}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "CheckFinding":
            given = [*node.args[3:4], *(k.value for k in node.keywords if k.arg == "fix")]
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "fix":
            given = [node.value]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_wrong":
            given = node.args[3:4]
        else:
            given = []
        for value in given:
            for part in (value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,):
                text = text_of(part)
                if text is not None:
                    yield part.lineno, text
        text = None if id(node) in inner else text_of(node)
        if text is not None and "\n    fix: " in text:
            for line in text.split("\n    fix: ")[1:]:
                yield node.lineno, line.partition("\n")[0]  # type: ignore[attr-defined]


FIXES = [
    pytest.param(text, id=f"{path.relative_to(ROOT)}:{line}")
    for path in SOURCES
    if NAMES.search(source := path.read_text(encoding="utf-8"))
    for line, text in fixes(ast.parse(source))
]


def test_fixes_are_found() -> None:
    """The search itself: of each kind at least one that is known."""
    texts = "\n".join(str(fix.values[0]) for fix in FIXES)
    for known in (
        "run the check where replicas will run, or lower X",
        "pip install 'X'",
        "set it to 'mp', or set replica.gpus",
        "give a value that vLLM accepts",
    ):
        assert known in texts
    assert len(FIXES) > 40


@pytest.mark.parametrize("fix", FIXES)
def test_a_fix_is_a_whole_sentence(fix: str) -> None:
    assert fix.strip(), "a fix says something"
    assert not OPEN_ENDS.search(fix.strip()), fix
    assert fix.count("(") == fix.count(")"), fix
    assert fix.count("`") % 2 == 0, fix


def test_the_rule_knows_a_sentence_that_breaks_off() -> None:
    broken = "run the check where replicas will run, or lower tensor_parallel_size or the replica's"
    assert OPEN_ENDS.search(broken)
    assert not OPEN_ENDS.search("or lower replica.cpus")


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from sections(kind)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        pytest.param(model, name, id=f"{model.__name__}.{name}")
        for root in (ClusterArgs, MemShareConfig)
        for model in dict.fromkeys(sections(root))
        for name in model.model_fields
    ],
)
def test_what_a_field_says_of_itself_is_whole(model: type[BaseModel], name: str) -> None:
    """It is the fix that is shown for a wrong value."""
    text = (model.model_fields[name].description or "").strip()
    if name != "name":  # tells policies apart
        assert text.endswith("."), text
