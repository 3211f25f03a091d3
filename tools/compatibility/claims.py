"""Which tests say that they prove a row. Read from their source: nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

ROOT = Path(__file__).resolve().parents[2]

How = Literal["whole", "parts", "refused"]
"""The whole runs; pieces of it do, or stand-ins; it is refused at start."""


class ClaimError(Exception):
    """A mark can't be read. Names the file and the line."""


@dataclass(frozen=True)
class Claim:
    """A test that proves a row.

    Attributes:
        row: key of :data:`tools.compatibility.rows.ROWS`.
        how: what it shows.
        file: path of the test's file below the top.
        test: the function.
        case: part of the parameters' id of the cases that count; ``""``: of all.
    """

    row: str
    how: How
    file: str
    test: str
    case: str = ""

    def is_of(self, file: str, name: str) -> bool:
        """Whether this is a case of the claim.

        Args:
            file: of the test.
            name: of its function, with the id of its parameters in brackets.
        """
        function, _, parameters = name.partition("[")
        return (file, function) == (self.file, self.test) and self.case in parameters


def claims(top: Path = ROOT / "tests") -> list[Claim]:
    """All claims of the tests below a folder.

    Raises:
        ClaimError: a mark can't be read.
    """
    found: list[Claim] = []
    for file in sorted(top.rglob("test_*.py")):
        source = file.read_text(encoding="utf-8")
        if "proves(" in source:
            found.extend(_of_file(ast.parse(source), str(file.relative_to(top.parent))))
    return found


def _of_file(module: ast.Module, file: str) -> Iterator[Claim]:
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for decorator in node.decorator_list:
                if ast.unparse(decorator).startswith("pytest.mark.proves("):
                    yield from _of_mark(cast("ast.Call", decorator), file, node.name)


def _of_mark(mark: ast.Call, file: str, test: str) -> Iterator[Claim]:
    try:
        rows = [ast.literal_eval(argument) for argument in mark.args]
        options = {str(word.arg): ast.literal_eval(word.value) for word in mark.keywords}
    except ValueError:
        raise ClaimError(f"{file}:{mark.lineno}: marks of rows are plain text") from None
    how, case = options.pop("how", "whole"), options.pop("case", "")
    if options or how not in get_args(How):
        known = ", ".join(get_args(How))
        raise ClaimError(f"{file}:{mark.lineno}: give rows, how ({known}) and case only")
    for row in rows:
        yield Claim(row, how, file, test, case)
