"""The script for people with GPUs, as far as it runs without one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from memshare.cli import main as cli
from memshare.errors import UserError
from memshare.lab.bench import exactness
from memshare.lab.bench.exactness import COPIES, ExactnessEngine, Written
from tools import gpu_acceptance
from tools.gpu_acceptance import (
    RUN,
    SCALES,
    SECTIONS,
    AcceptancePlan,
    main,
    measure,
    report,
    require,
)

ROOT = Path(__file__).resolve().parents[2]
REQUEST = AcceptancePlan(SCALES["cpu"], "cpu", 1, Path("math500.jsonl"))


def test_a_machine_without_gpus_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main(["--accelerator", "gpu"]) == 1
    said = capsys.readouterr().err
    assert "needs 1 GPU(s), torch sees 0" in said
    assert "--accelerator cpu" in said
    require("cpu", 4)


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--accelerator", "cpu", "--sections", "exactness,speed"])
    assert "no such section: speed" in capsys.readouterr().err


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("section", ["overhead", "memory", "accuracy"])
def test_sections_use_options_that_exist(
    section: str, scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real parser of ``memshare`` reads them; only the work is left out."""
    seen: list[list[str]] = []

    def parse(words: tuple[str, ...]) -> int:
        cli.build_parser(words).parse_args(words)
        seen.append(list(words))
        print("| a table |")
        return 0

    monkeypatch.setattr(gpu_acceptance.cli, "main", parse)
    text = RUN[section](AcceptancePlan(SCALES[scale], scale, 2, None))
    (words,) = seen
    assert text == f"`memshare {' '.join(words)}`\n\n| a table |"
    assert words[words.index("--tensor-parallel-size") + 1] == "2"


def test_a_report_has_all_that_figures_depend_on() -> None:
    text = report(REQUEST, {"exactness": ("| claim |", 12.3)})
    for fact in ("MemShare", "vllm", "torch", "tensor parallel", "CUDA graphs", "smollm2-135m"):
        assert fact in text, fact
    assert "says nothing of GPUs" in text
    assert "## exactness (12 s)" in text
    assert str(ROOT) not in text


def test_a_section_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(request: AcceptancePlan) -> str:
        raise UserError("the engine of dense failed: no memory")

    monkeypatch.setitem(RUN, "overhead", fail)
    monkeypatch.setitem(RUN, "memory", lambda request: "| figures |")
    file = tmp_path / "report.md"
    assert not measure(REQUEST, ["overhead", "memory"], file)
    text = file.read_text()
    assert "the engine of dense failed: no memory" in text
    assert "| figures |" in text
    assert measure(REQUEST, ["memory"], file)


def engine(ranks: int = 1) -> ExactnessEngine:
    return ExactnessEngine("model", "float32", ranks, True, False)


def answers(
    monkeypatch: pytest.MonkeyPatch, *, wrong: int = COPIES, observed: int = 1, leak: bool = False
) -> None:
    """Stand-in engines: what plain vLLM writes is ``[1]``, something else is ``[2]``."""

    def ask(
        _: ExactnessEngine, memshare: dict[str, object] | None, forget: bool = False
    ) -> Written:
        outputs = [[1]] * COPIES
        if forget:
            outputs = [[2]] * wrong + [[1]] * (COPIES - wrong)
        elif memshare == {"mode": "observe"}:
            outputs = [[observed], *outputs[1:]]
        shares = memshare is exactness.IDENTICAL_ONLY
        return Written(outputs, 12 if shares else 0, not leak)

    monkeypatch.setattr(exactness, "ask", ask)


def test_all_claims_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch)
    assert [v.claim for v in exactness.check(engine()) if not v.holds] == []
    assert "**no**" not in RUN["exactness"](REQUEST)


def test_claims_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, observed=2)
    (failed,) = [v for v in exactness.check(engine()) if not v.holds]
    assert failed.claim == "mode `observe` writes what plain vLLM writes"
    assert failed.seen == "9 of 10 outputs identical"
    answers(monkeypatch, leak=True)
    assert [v.claim for v in exactness.check(engine()) if not v.holds] == [
        "every block is free again"
    ]
    answers(monkeypatch, wrong=0)
    (failed,) = [v for v in exactness.check(engine()) if not v.holds]
    assert failed.claim.startswith("negative control")


def test_the_negative_control_needs_the_worker_in_this_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers(monkeypatch)
    claims = [v.claim for v in exactness.check(engine(ranks=2))]
    assert not any(claim.startswith("negative control") for claim in claims)


def test_the_page_lists_the_sections() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(SECTIONS)
