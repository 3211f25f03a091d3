"""Write the generated files of ``k8s/``: Serve configurations, dashboards, alerts.

    python -m tools.make_k8s

Sources are ``configs/`` and ``tools/kubernetes/``. A test fails while a file differs from what this
script would write.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tools.kubernetes import alerts, dashboards, serve_config
from tools.kubernetes.layout import K8S, SERVED

ROOT = Path(__file__).resolve().parent.parent

OBSERVABILITY = K8S / "components" / "observability"


def files() -> dict[Path, str]:
    """Path and text of every generated file."""
    texts = {
        folder / "serve-config.yaml": serve_config.render(served)
        for folder, served in SERVED.items()
    }
    texts[OBSERVABILITY / "alerts.yaml"] = alerts.render()
    texts[OBSERVABILITY / "memshare-ray.json"] = dashboards.render("ray")
    texts[OBSERVABILITY / "memshare-vllm.json"] = dashboards.render("vllm")
    return texts


def main() -> int:
    """Write them; return the exit status."""
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
