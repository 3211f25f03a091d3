"""Code blocks of the README and of all pages, as CommonMark has them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# `docs` is a site; the others are read where they lie.
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "configs" / "README.md", *sorted(DOCS.rglob("*.md"))]

_COMMENT = re.compile(r"(?:^|\s)# .*$", re.MULTILINE)
_ASSIGNMENT = re.compile(r"^[A-Za-z_]\w*=")


class Block(NamedTuple):
    """A fenced block: its page, the line that it begins at, its language and its text."""

    page: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """For the name of a test."""
        return f"{self.page}:{self.line}"


def blocks(*languages: str) -> Iterator[Block]:
    """Blocks in these languages; in all of them if none is named."""
    return (block for block in _all_blocks() if not languages or block.language in languages)


@cache
def _all_blocks() -> list[Block]:
    found = []
    markdown = MarkdownIt("commonmark").disable("inline")  # what is inside lines takes longest
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        for token in markdown.parse(page.read_text(encoding="utf-8")):
            if token.type in ("fence", "code_block"):
                assert token.map is not None
                found.append(Block(name, token.map[0] + 1, token.info.strip(), token.content))
    return found


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block in words, as a shell would split them.

    Pipes and ``&&`` separate commands; assignments before a command, comments and redirections are
    left out.
    """
    text = _COMMENT.sub("", block.text.replace("\\\n", " "))
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|&;\n")
    lexer.whitespace = " \t\r"
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    for word in [*lexer, "\n"]:
        if set(word) <= set("|&;\n"):
            while words and (_ASSIGNMENT.match(words[0]) or words[0] == "export"):
                words.pop(0)
            if words:
                yield words
            words = []
        else:
            words.append(word)


def option(words: list[str], *names: str) -> str | None:
    """The value of an option in a command."""
    return next((words[i + 1] for i, word in enumerate(words[:-1]) if word in names), None)


def chat_bodies() -> list[dict[str, Any]]:
    """The bodies that pages post by ``curl`` to the chat route."""
    found = [
        json.loads(option(words, "-d", "--data") or "null")
        for block in blocks("sh")
        for words in commands(block)
        if words[0] == "curl" and any("/v1/chat/completions" in word for word in words)
    ]
    assert found
    return found


def inline_code() -> Iterator[tuple[str, str]]:
    """(page, text) of everything that stands in backticks in a line of text or a table."""
    for page in PAGES:
        markdown = MarkdownIt("commonmark").enable("table")
        for token in markdown.parse(page.read_text(encoding="utf-8")):
            for child in token.children or ():
                if child.type == "code_inline":
                    yield page.relative_to(ROOT).as_posix(), child.content
