"""The tables of the compatibility page follow from tests that ran (tools/compatibility)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.compatibility import page, record
from tools.compatibility.claims import ROOT, Claim, ClaimError, claims
from tools.compatibility.record import Record, name_of, updated
from tools.compatibility.rows import ROWS, TABLES

HERE = Record("a machine", {"vLLM": "1"})
REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_x[eagle-1]"/>
<testcase classname="tests.test_a" name="test_x[ngram-1]"><failure/></testcase>
<testcase classname="tests.test_a" name="test_y"><skipped/></testcase>
<testcase classname="tests.test_b" name="test_z"/>
</testsuite></testsuites>"""
TESTS = """
import pytest

@pytest.mark.proves("mla", "pooling", how="refused")
@pytest.mark.proves("drafts", case="eagle")
@pytest.mark.parametrize("x", [1])
def test_x(x): ...
"""


def test_the_page_is_what_the_record_says() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert text == page.render(text), "run: python -m tools.make_docs compatibility"


def test_every_claim_is_of_a_row_and_every_row_that_is_said_to_work_has_a_test_that_ran() -> None:
    made = claims()
    assert {claim.row for claim in made} <= set(ROWS)
    found = page.states(record.read(), made)
    assert set(found) == set(ROWS)
    passed = set(record.read().passed)
    for row, word in found.items():
        ran = [claim for claim in made if claim.row == row and name_of(claim) in passed]
        assert bool(ran) == (word != "not run"), row
    assert "refused" in found.values()


def test_no_word_of_the_tables_is_written_by_hand() -> None:
    """But for versions, and for what a policy's settings mean."""
    by_hand = re.sub(r"<!-- table: \w+ -->.*?<!-- end", "", _page(), flags=re.DOTALL)
    _, _, about_set_ups = by_hand.partition("## Hardware")
    about_set_ups, _, _ = about_set_ups.partition("## Policies")
    for line in about_set_ups.splitlines():
        assert not re.search(r"\| (tested|by parts|refused|not run)\b[^|]*\|$", line), line
    assert all("tested" not in cell for row in ROWS.values() for cell in row.cells)


def _page() -> str:
    return page.PAGE.read_text(encoding="utf-8")


def test_claims_are_read_from_source(tmp_path: Path) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_a.py").write_text(TESTS)
    assert claims(folder) == [
        Claim("mla", "refused", "tests/test_a.py", "test_x"),
        Claim("pooling", "refused", "tests/test_a.py", "test_x"),
        Claim("drafts", "whole", "tests/test_a.py", "test_x", "eagle"),
    ]
    for wrong in ('how="somehow"', "cases=1", "case=name"):
        (folder / "test_a.py").write_text(TESTS.replace('how="refused"', wrong))
        with pytest.raises(ClaimError, match=r"test_a\.py:4"):
            claims(folder)


def test_what_passed_is_recorded_and_what_failed_is_taken_out(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    made = [
        Claim("drafts", "whole", "tests/test_a.py", "test_x", "eagle"),
        Claim("ngram", "whole", "tests/test_a.py", "test_x", "ngram"),
        Claim("lora", "whole", "tests/test_a.py", "test_y"),
        Claim("mla", "refused", "tests/test_b.py", "test_z"),
        Claim("arm", "whole", "tests/test_b.py", "test_elsewhere"),
    ]
    eagle, ngram, skipped, refused, elsewhere = map(name_of, made)
    old = Record("another", HERE.versions, dict.fromkeys((ngram, skipped, elsewhere), "2026-01-01"))
    new = updated(old, HERE, made, [report], "2026-02-02")
    assert new.machine == "a machine"
    assert new.passed == {
        eagle: "2026-02-02", refused: "2026-02-02", skipped: "2026-01-01", elsewhere: "2026-01-01",
    }  # fmt: skip
    found = page.states(new, made)
    assert {row: found[row] for row in ("drafts", "ngram", "mla", "x86")} == {
        "drafts": "tested", "ngram": "not run", "mla": "refused", "x86": "not run",
    }  # fmt: skip
    other = Record("another", {"vLLM": "2"}, old.passed)
    assert set(updated(other, HERE, made, [report], "2026-02-02").passed) == {eagle, refused}


def test_a_note_is_left_out_beside_a_state_that_it_is_not_about() -> None:
    empty = Record("a machine", {}, {})
    shown = page.render(_page(), empty, [])
    assert shown.count("| by parts |") == 1, "what the word means"
    assert "with small models of these architectures" not in shown
    assert shown.count("| not run") >= len(ROWS) - 2
    with pytest.raises(ValueError, match="can't be tested as well"):
        page.state({"whole", "refused"})


def test_keys_are_unique_and_rows_have_as_many_cells_as_their_table() -> None:
    assert sum(len(table.rows) for table in TABLES.values()) == len(ROWS)
    for table in TABLES.values():
        assert {len(row.cells) + 1 for row in table.rows} == {len(table.titles)}
    assert (ROOT / "docs" / "compatibility-run.json").exists()
