"""Which tests ``-m`` selects, as far as files tell that are not imported; what stays together."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator, Mapping

MARKS = ("browser", "cluster", "complete", "engine")
"""Marks that decide which command runs a test (pyproject.toml says what each means)."""

SHARED = ("tests/cluster/serve",)
"""Folders whose tests share a server: one process runs them all."""

_MARK = re.compile(r"\bmark\.(\w+)")


def selects(expression: str, marks: Mapping[str, bool]) -> bool:
    """Whether ``-m expression`` selects a test with these marks; others are unset."""
    # The grammar is Python's own, with names of marks for values.
    names = {node.id for node in ast.walk(ast.parse(expression)) if isinstance(node, ast.Name)}
    values = {name: marks.get(name, False) for name in names}
    return bool(eval(compile(expression, "-m", "eval"), {"__builtins__": {}}, values))


def may_select(expression: str, source: str) -> bool:
    """Whether ``-m expression`` may select a test of a file with this source.

    Marks of ``pytestmark`` are on every test of the file; others that it names may be on some.
    """
    everywhere = set(_MARK.findall(_module_marks(source)))
    # Parameters of shared fixtures bring `complete`, which no file needs to name.
    somewhere = {"complete", *_MARK.findall(source)} - everywhere
    return any(
        selects(expression, dict.fromkeys(everywhere, True) | some)
        for some in assignments(*somewhere & set(MARKS))
    )


def work_unit(nodeid: str) -> str:
    """What one process runs in a go: the test's file, or its folder if that is in ``SHARED``."""
    file = nodeid.split("::", 1)[0]
    folder = file.rpartition("/")[0]
    return folder if folder in SHARED else file


def assignments(*names: str) -> Iterator[dict[str, bool]]:
    """Every way in which these marks may be set or unset."""
    for values in itertools.product((False, True), repeat=len(names)):
        yield dict(zip(names, values, strict=True))


def _module_marks(source: str) -> str:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            return ast.unparse(node.value)
    return ""
