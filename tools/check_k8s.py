"""Build every overlay of ``k8s/`` and check it, without a cluster.

python tools/check_k8s.py                     # all of ours
python tools/check_k8s.py k8s/overlays/ha     # or some, or your own
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, from anywhere
    sys.path.insert(0, str(ROOT))

from tools.kubernetes.build import BuildError, Manifests, build  # noqa: E402
from tools.kubernetes.checks import run  # noqa: E402
from tools.kubernetes.layout import OVERLAYS  # noqa: E402


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
