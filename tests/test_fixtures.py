"""Fixtures end where they say."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent


def test_fixtures_of_a_package_are_in_one() -> None:
    """Elsewhere pytest lets them live until all tests are over, without a word: a server that
    later tests were not meant to meet, or variables of the environment."""
    scoped = [file for file in TESTS.rglob("*.py") if 'scope="package"' in file.read_text()]
    folders = {file.parent for file in scoped if file != Path(__file__)}
    assert folders, "nothing is looked for"
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
