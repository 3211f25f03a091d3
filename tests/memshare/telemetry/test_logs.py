"""Log lines, as another process writes them."""

from __future__ import annotations

import io
import json
import logging
import logging.handlers
import subprocess
import sys
from http import HTTPStatus
from pathlib import Path

import pytest

from cluster.telemetry.serve_logs import say_refusals_in_a_line

ROOT = Path(__file__).resolve().parents[3]

PROGRAM = """
import logging, sys
from memshare.config import LogConfig
from memshare.telemetry.logs import set_up_logging
config = LogConfig(format=sys.argv[1], level=sys.argv[2])
set_up_logging(config)
set_up_logging(config)  # a second connector in the same process
log = logging.getLogger("memshare.engine.somewhere")
log.info("reclaimed %d", 3, extra={"request": "cmpl-1", "blocks": 3})
log.warning("two\\nlines")
logging.getLogger("elsewhere").warning("not ours")
"""


def lines(*arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    return [line for line in done.stderr.splitlines() if line != "not ours"]


def test_json_lines_hold_what_a_line_is_about() -> None:
    first, second = (json.loads(line) for line in lines("json", "info"))
    assert first["message"] == "reclaimed 3"
    assert first["request"] == "cmpl-1"
    assert first["blocks"] == 3
    assert first["level"] == "INFO"
    assert first["logger"] == "memshare.engine.somewhere"
    assert {"time", "pid", "process"} <= first.keys()
    assert second["message"] == "two\nlines"


def test_text_is_the_default() -> None:
    first, *_ = lines("text", "info")
    assert first.startswith("INFO ")
    assert first.endswith("[memshare.engine.somewhere] reclaimed 3")


def test_lines_below_the_level_are_not_written() -> None:
    assert len(lines("json", "warning")) == 1


def test_handlers_of_others_stay(caplog: pytest.LogCaptureFixture) -> None:
    from memshare.config import LogConfig
    from memshare.telemetry.logs import set_up_logging

    before = logging.getLogger("memshare").handlers[:]
    set_up_logging(LogConfig())  # pytest has handlers of its own
    assert logging.getLogger("memshare").handlers == before


def test_handlers_of_others_stay_open() -> None:
    from memshare.config import LogConfig
    from memshare.telemetry.logs import set_up_logging

    target = logging.NullHandler()
    other = logging.handlers.MemoryHandler(10, target=target)
    ours = [logging.getLogger(name) for name in ("memshare", "cluster")]
    before = [(log, log.handlers, log.level, log.propagate) for log in ours]
    try:
        set_up_logging(LogConfig(format="json"))
        assert other.target is target
    finally:
        for log, log.handlers, level, log.propagate in before:
            log.setLevel(level)


@pytest.mark.complete
@pytest.mark.timeout(240)  # a process that loads Ray Serve and vLLM
@pytest.mark.parametrize("kept", [True, False])
def test_ray_serves_log_survives_vllm(tmp_path: Path, kept: bool) -> None:
    """In a process of its own, whose logging vLLM configures. Without our care it is closed."""
    program = f"""
import contextlib, logging
from logging.handlers import MemoryHandler
from cluster.telemetry.serve_logs import logs_kept
log = logging.getLogger("ray.serve")
log.addHandler(MemoryHandler(10, target=logging.FileHandler({str(tmp_path / "serve.log")!r})))
log.warning("before")
from vllm.config.logging import LoggingConfig
from vllm.logger import configure_logging
with logs_kept() if {kept} else contextlib.nullcontext():
    configure_logging(LoggingConfig())
log.warning("after")
log.handlers[-1].flush()  # before it are Ray Serve's own
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
    assert (tmp_path / "serve.log").read_text().split() == ["before", "after"][: 1 + kept]


@pytest.mark.engine  # vLLM is loaded
def test_a_refusal_is_a_line_of_vllms_log_and_a_fault_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.exceptions import GenerationError, GracefulHTTPError, VLLMValidationError

    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    monkeypatch.setattr(logging.getLogger("vllm"), "handlers", [handler])
    say_refusals_in_a_line()
    log = logging.getLogger("vllm.entrypoints.anthropic.api_router")

    def tell(error: Exception, text: str, *values: object) -> list[str]:
        written.truncate(written.seek(0))
        try:
            raise error
        except Exception:
            log.exception(text, *values)
        return written.getvalue().splitlines()

    salt = VLLMValidationError("leave cache_salt out\nERROR forged", parameter="cache_salt")
    said = "leave cache_salt out ERROR forged (parameter=cache_salt)"
    assert tell(salt, "Error in x: %s", salt) == [f"INFO Error in x: {said}"]
    assert tell(salt, "Error in a stream.") == [f"INFO Error in a stream. {said}"]
    forbidden = GracefulHTTPError("not for this key", HTTPStatus.FORBIDDEN)
    assert tell(forbidden, "Error:") == ["INFO Error: not for this key"]
    fault = tell(GenerationError(), "Error:")
    assert fault[:2] == ["ERROR Error:", "Traceback (most recent call last):"]
