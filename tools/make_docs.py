"""Write every generated page of the documentation.

    python -m tools.make_docs             # all; loads vLLM for the HTTP reference
    python -m tools.make_docs cli grpc    # some

The pages are committed, so that they can be read without building the site. A test fails while one
of them differs from what this script would write.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from tools.compatibility import page
from tools.docs import cli, configuration, grpc, http, metrics

ROOT = Path(__file__).resolve().parent.parent

REFERENCE = ROOT / "docs" / "reference"
# By name: the page, and what makes its text.
PAGES: dict[str, tuple[Path, Callable[[], str]]] = {
    "configuration": (configuration.PAGE, configuration.render),
    "metrics": (
        metrics.PAGE,
        lambda: metrics.render(metrics.PAGE.read_text(encoding="utf-8")),
    ),
    "compatibility": (
        page.PAGE,
        lambda: page.render(page.PAGE.read_text(encoding="utf-8")),
    ),
    "cli": (REFERENCE / "cli.md", lambda: generated(cli.render())),
    "grpc": (REFERENCE / "grpc.md", lambda: generated(grpc.render())),
    "http": (REFERENCE / "http.md", lambda: generated(http.render())),
}


def generated(text: str) -> str:
    """The text with a note for whoever opens the file."""
    note = "Written by tools/make_docs.py. Change what it is made from, then run it."
    return f"<!-- {note} -->\n\n{text}"


def main() -> int:
    """Write pages; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("names", nargs="*", choices=[[], *PAGES], help="pages; all by default")
    for name in parser.parse_args().names or PAGES:
        file, render = PAGES[name]
        file.write_text(render(), encoding="utf-8")
        print(f"wrote {file.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
