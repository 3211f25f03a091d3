"""Which extra of MemShare brings a library that is not installed."""

from __future__ import annotations

from importlib.util import find_spec

from memshare.errors import UserError

_ENGINE = "pip install 'memshare[cpu]', or 'memshare[gpu]'"
_FIXES = {
    **dict.fromkeys(("prometheus_client", "safetensors", "tokenizers"), _ENGINE),
    **dict.fromkeys(("torch", "transformers", "vllm"), _ENGINE),
    **dict.fromkeys(
        (
            *("click", "fastapi", "grpc_health", "huggingface_hub", "opentelemetry"),
            *("psutil", "ray", "starlette", "uvicorn"),
        ),
        "pip install 'memshare[serve]'",
    ),
    **dict.fromkeys(("accelerate", "gguf"), "pip install 'memshare[model]'"),
    **dict.fromkeys(("datasets", "math_verify", "openai"), "pip install 'memshare[eval]'"),
    "peft": "pip install 'memshare[train]'",
    "matplotlib": "pip install 'memshare[plots]'",
}
"""Import name of a library to the command that installs it."""


def fix_for(module: str | None) -> str | None:
    """The command that installs what ``module`` is part of; None if no extra brings it."""
    return _FIXES.get((module or "").partition(".")[0])


def require(module: str, purpose: str) -> None:
    """Make sure that a library of an extra is installed.

    Args:
        module: its import name, one that an extra brings.
        purpose: what it is needed for, as the beginning of a sentence.

    Raises:
        UserError: it is not installed; names the extra.
    """
    if find_spec(module) is None:
        raise UserError(f"{purpose} needs {module}, which is not installed: {_FIXES[module]}")
