"""Write down which of the tests that prove a row have passed.

    python -m tools.compatibility.record build/test-reports/*.xml

Reads pytest's JUnit reports and updates ``docs/compatibility-run.json``: tests that passed are
entered with today's date, tests that failed are taken out, and what did not run stays as it was,
unless it ran with other versions. Then run ``python -m tools.make_docs compatibility``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from memshare.engine.versions import check_vllm_version
from tools.compatibility.claims import ROOT, Claim, How, claims

FILE = ROOT / "docs" / "compatibility-run.json"
PACKAGES = {"Ray": "ray", "PyTorch": "torch"}

Result = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Record:
    """What has run.

    Attributes:
        machine: its class, in words.
        versions: by package, Python among them.
        passed: the day of each test's last run, ISO; by its file and function.
    """

    machine: str
    versions: Mapping[str, str]
    passed: Mapping[str, str] = field(default_factory=dict)

    def proofs(self, made: Iterable[Claim]) -> dict[str, set[How]]:
        """How each row has been proved."""
        found: dict[str, set[How]] = {}
        for claim in made:
            if name_of(claim) in self.passed:
                found.setdefault(claim.row, set()).add(claim.how)
        return found


def name_of(claim: Claim) -> str:
    """The name of a claim's test in a record."""
    case = f"[{claim.case}]" if claim.case else ""
    return f"{claim.file}::{claim.test}{case}"


def read(file: Path = FILE) -> Record:
    """The committed record."""
    return Record(**json.loads(file.read_text(encoding="utf-8")))


def updated(
    old: Record | None, here: Record, made: Iterable[Claim], reports: Iterable[Path], day: str
) -> Record:
    """The record after a run.

    Args:
        old: before it; None if there was none.
        here: this machine and these versions.
        made: the claims.
        reports: JUnit reports of the run.
        day: of the run, ISO.
    """
    outcomes = list(_outcomes(reports))
    same = old is not None and old.versions == here.versions
    before = old.passed if old is not None and same else {}
    passed: dict[str, str] = {}
    for claim in made:
        name = name_of(claim)
        results = {r for file, test, r in outcomes if claim.is_of(file, test)}
        if "failed" in results:
            continue
        if "passed" in results:
            passed[name] = day
        elif name in before:
            passed[name] = before[name]
    return Record(here.machine, here.versions, dict(sorted(passed.items())))


def _outcomes(reports: Iterable[Path]) -> Iterator[tuple[str, str, Result]]:
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            file = case.get("classname", "").replace(".", "/") + ".py"
            tags = {child.tag for child in case}
            result: Result = "passed"
            if tags & {"failure", "error"}:
                result = "failed"
            elif "skipped" in tags:
                result = "skipped"
            yield file, case.get("name", ""), result


def this_machine() -> Record:
    """An empty record of this machine and what is installed."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    extension = next(
        (n for f, n in (("amx_tile", "AMX"), ("avx512f", "AVX-512")) if f in flags), ""
    )
    words = [f"{platform.machine()} CPU", f"with {extension}" if extension else ""]
    machine = " ".join(filter(None, words)) + f", {os.cpu_count()} cores, no GPU"
    versions = {
        "vLLM": check_vllm_version(),
        "Python": platform.python_version().rpartition(".")[0],
    }
    versions |= {name: version(package).split("+")[0] for name, package in PACKAGES.items()}
    return Record(machine, versions)


def main() -> int:
    """Update the record; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("reports", nargs="+", type=Path, help="pytest's JUnit reports")
    reports = parser.parse_args().reports
    old = read() if FILE.exists() else None
    made = claims()
    new = updated(old, this_machine(), made, reports, datetime.date.today().isoformat())
    FILE.write_text(json.dumps(asdict(new), indent=1) + "\n", encoding="utf-8")
    missing = sorted({name_of(claim) for claim in made} - set(new.passed))
    print(f"{len(new.passed)} tests that prove a row have passed; {len(missing)} have not run:")
    print("\n".join(f"  {name}" for name in missing))
    return 0


if __name__ == "__main__":
    sys.exit(main())
