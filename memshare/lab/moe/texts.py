"""Texts of three domains that are there wherever Python is: worked problems, code and prose.

Code and prose come from the standard library (PSF licence), so that nothing is downloaded and
whoever has the same Python has the same texts. They are kept apart: code without its comments and
docstrings, prose without its examples.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal, get_args

from memshare.lab.problems import FAMILIES, generate

Domain = Literal["solutions", "code", "prose"]
DOMAINS: tuple[Domain, ...] = get_args(Domain)

_HELD_OUT = 10  # every tenth text, by its hash
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "encodings"}
_SHORTEST = 80  # characters of a paragraph that is prose
_WORDS = re.compile(r"[a-z]{2,}")
_TOGETHER = 8  # paragraphs, or problems, that make one text


@dataclass(frozen=True, slots=True)
class DomainTexts:
    """Texts of one domain: ``seen`` to train on, ``unseen`` to measure on."""

    domain: Domain
    seen: tuple[str, ...]
    unseen: tuple[str, ...]


def domain_texts(domain: Domain, problems: int = 2_500) -> DomainTexts:
    """All texts of a domain, the same ones each time.

    Args:
        domain: which.
        problems: worked problems to make, of which :data:`_TOGETHER` are a text.
    """
    if domain == "solutions":
        texts = _grouped(_solutions(problems))
    elif domain == "code":
        texts = _code()
    else:
        texts = _grouped(_prose())
    seen: list[str] = []
    unseen: list[str] = []
    for text in texts:
        digest = hashlib.sha256(text.encode()).digest()
        (unseen if digest[0] % _HELD_OUT == 0 else seen).append(text)
    return DomainTexts(domain, tuple(seen), tuple(unseen))


def _solutions(count: int) -> Iterator[str]:
    for number in range(count):
        problem = generate(FAMILIES[number % len(FAMILIES)], number)
        yield f"{problem.prompt}\n\n{problem.solution}"


def _code() -> Iterator[str]:
    for _, tree in _modules():
        for node in _documented(tree):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        text = ast.unparse(tree)
        if len(text) > _SHORTEST:
            yield text


def _prose() -> Iterator[str]:
    for topic in sorted(topics):
        yield from _paragraphs(topics[topic])
    for _, tree in _modules():
        for node in _documented(tree):
            yield from _paragraphs(ast.get_docstring(node) or "")


def _paragraphs(text: str) -> Iterator[str]:
    """Those that are sentences: neither examples nor tables."""
    for block in inspect.cleandoc(text).split("\n\n"):
        paragraph = " ".join(textwrap.dedent(block).split())
        words = _WORDS.findall(paragraph)
        is_prose = sum(map(len, words)) > 0.65 * len(paragraph) and ">>>" not in paragraph
        if len(paragraph) >= _SHORTEST and is_prose:
            yield paragraph


def _modules() -> Iterator[tuple[Path, ast.Module]]:
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if _LEFT_OUT.isdisjoint(file.relative_to(root).parts):
            yield file, ast.parse(file.read_bytes())


def _documented(tree: ast.Module) -> Iterator[_Documented]:
    return (node for node in ast.walk(tree) if isinstance(node, _Documented))


def _grouped(texts: Iterator[str]) -> Iterator[str]:
    group: list[str] = []
    for text in dict.fromkeys(texts):
        group.append(text)
        if len(group) == _TOGETHER:
            yield "\n\n".join(group)
            group = []
