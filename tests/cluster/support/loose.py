"""MemShare's options under which blocks are given up at once, without any pressure."""

from __future__ import annotations

from typing import Any

LOOSE: dict[str, Any] = {
    "mode": "share",
    "trigger": {"kind": "eager"},
    "policy": {"name": "paper"},
    # Cut often: a small model writes few blank lines.
    "steps": {"similarity_threshold": 0.1, "min_tokens": 8, "max_tokens": 32},
    "distance": {"similarity_threshold": 0.0},
    "protect": {"recent_tokens": 32},
    "budget": {"max_shared_fraction": 0.4},
    "evaluator": {"source": "ray", "actors": 1, "cpus_per_actor": 0.25},
}
"""Settings so loose that hardly a block is left alone, within a few hundred tokens."""
