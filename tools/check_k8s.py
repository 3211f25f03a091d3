"""Build every overlay of ``k8s/`` and check it, without a cluster.

python -m tools.check_k8s                     # all of ours
python -m tools.check_k8s k8s/overlays/ha     # or some, or your own
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.kubernetes.build import BuildError, Manifests, build
from tools.kubernetes.checks import run
from tools.kubernetes.layout import OVERLAYS


def main() -> int:
    """Check them; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folders", type=Path, nargs="*", default=OVERLAYS, help="default: all")
    failed = False
    for folder in parser.parse_args().folders:
        try:
            manifests = Manifests(build(folder))
        except BuildError as error:
            print(f"{folder.name}: does not build\n  {error}")
            failed = True
            continue
        findings = run(manifests)
        failed |= bool(findings)
        print(f"{folder.name}: {len(manifests.all)} manifests, {len(findings)} findings")
        for finding in findings:
            print(f"  {finding}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
