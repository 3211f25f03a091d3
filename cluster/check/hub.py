"""Whether the hub can be asked for a model. One try: vLLM's own retries last for 40 seconds."""

from __future__ import annotations

import os
import re
import ssl
import threading
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from urllib.error import HTTPError, URLError

from cluster.check.report import CheckFinding
from memshare.small_model.names import SPECIAL_NAME

SECTION = "model"
_ANSWER_S = 10.0
_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_OFFLINE = "HF_HUB_OFFLINE"
_YES = ("1", "ON", "YES", "TRUE")  # what huggingface_hub takes for yes


def is_on_hub(model: str) -> bool:
    """Whether ``model`` is a hub id, and neither a folder nor a model that is made here."""
    special = SPECIAL_NAME.fullmatch(model) is not None
    return not special and _ID.fullmatch(model) is not None and not Path(model).exists()


def look_at_hub(model: str, revision: str | None = None) -> CheckFinding | None:
    """See whether a model's files can be had; None if so.

    Where the hub does not answer, this process is told to do without it (``HF_HUB_OFFLINE``), as
    the command lines of vLLM and of huggingface_hub are. Call it before either is imported.

    Args:
        model: as configured.
        revision: of it; None for the newest.

    Returns:
        ``fail`` if they are not in this machine's cache either; ``warn`` if they are.
    """
    if not is_on_hub(model) or os.environ.get("VLLM_USE_MODELSCOPE", "0") not in ("", "0"):
        return None
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    switched_off = any(
        os.environ.get(name, "").upper() in _YES for name in (_OFFLINE, "TRANSFORMERS_OFFLINE")
    )
    reason = f"{_OFFLINE} is set" if switched_off else ask(endpoint)
    if reason is None:
        return None
    os.environ[_OFFLINE] = "1"
    cached = _is_cached(model, revision)
    if cached and switched_off:
        return None
    text = f"{model}: {endpoint} cannot be asked ({reason})"
    if cached:
        return CheckFinding(
            SECTION, "warn", f"{text}; what this machine's cache has of it is looked at",
            "nothing, if the cache is up to date",
        )  # fmt: skip
    fix = f"unset {_OFFLINE}" if switched_off else f"run `hf download {model}` with a network"
    return CheckFinding(
        SECTION, "fail", f"{text}, and it is not in this machine's cache",
        f"{fix}, or name a folder that holds the model",
    )  # fmt: skip


def ask(endpoint: str, timeout_s: float = _ANSWER_S) -> str | None:
    """Ask once, through the proxies of the environment; why there is no answer, or None.

    Any answer counts: what it says about a model is for vLLM to judge.
    """
    found: list[str | None] = []

    def look() -> None:
        request = urllib.request.Request(endpoint, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=timeout_s).close()
        except HTTPError:
            found.append(None)
        except (URLError, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            # Somebody answered; which certificates are good, huggingface_hub may know better.
            found.append(None if isinstance(reason, ssl.SSLError) else _words(reason))
        else:
            found.append(None)

    # In a thread: names take their time, and every address of a name has the whole timeout.
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return found[0] if found else f"no answer in {timeout_s:g} s"


def _words(reason: object) -> str:
    return (isinstance(reason, OSError) and reason.strerror) or str(reason)


def _is_cached(model: str, revision: str | None) -> bool:
    if find_spec("huggingface_hub") is None:  # comes with vLLM, and is what fills the cache
        return False
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str)
