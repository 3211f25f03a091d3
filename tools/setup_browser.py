"""Find a Chromium for the tests of the live page; install Debian's where that can be done.

    python tools/setup_browser.py

Prints its path. Looks on PATH (or at ``CHROMIUM``), then, as root on a machine with ``apt-get``,
installs it. Where there is none the tests of the page are skipped, and say so; in continuous
integration (``CI`` is set) that is a failure, of this command and of the tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Beside the browser a font, or all text would be boxes.
PACKAGES = ("chromium", "fonts-dejavu-core")


def find_chromium() -> str | None:
    """Path of a Chromium on this machine."""
    named = os.environ.get("CHROMIUM")
    if named:
        return shutil.which(named)
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def in_ci() -> bool:
    """Whether this is a run of continuous integration, where nothing may be left out."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def install() -> None:
    """Install Debian's Chromium, if this is root on a machine that has ``apt-get``."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    quiet = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    for command in (
        ["apt-get", "update", "-q"],
        ["apt-get", "install", "-q", "-y", "--no-install-recommends", *PACKAGES],
    ):
        done = subprocess.run(command, env=quiet, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"[browser] {' '.join(command)} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
            return


def main() -> int:
    """Print the path of a Chromium; the exit status says whether tests may go on."""
    if find_chromium() is None:
        print("[browser] no Chromium yet: trying to install one", file=sys.stderr, flush=True)
        install()
    path = find_chromium()
    if path is not None:
        print(path)
        return 0
    print(
        "[browser] there is no Chromium, so the tests of the live page will be skipped.\n"
        "          Install one (Debian, Ubuntu: sudo apt-get install chromium), or name one:\n"
        "          CHROMIUM=/path/to/chromium",
        file=sys.stderr,
    )
    return 1 if in_ci() else 0


if __name__ == "__main__":
    sys.exit(main())
