"""What the log of ``serve run`` says (tools/serving/log.py)."""

from __future__ import annotations

from pathlib import Path

from tools.serving.log import ServeLog

CONTROLLER = "\x1b[36m(ServeController pid=7)\x1b[0m "


def test_a_failing_replica_is_counted_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "serve.log"
    path.write_text(f"{CONTROLLER}ERROR 1 -- Exception in Replica(id='a', deployment='Engine')")
    log = ServeLog(path)
    log.read_on()
    assert log.replica_failures == 0, "the line has no end yet"

    with path.open("a") as file:
        file.write("\n")
        file.write(f"{CONTROLLER}  raise ValueError(text)\n{CONTROLLER}ValueError: no such mode\n")
    log.read_on()
    log.read_on()

    assert log.replica_failures == 1
    assert log.reason == "ValueError: no such mode"
    assert not log.build_failed


def test_a_reason_of_several_lines_is_kept_whole(tmp_path: Path) -> None:
    path = tmp_path / "serve.log"
    reason = (
        "memshare.config.ConfigError: not valid:\nexplicit options:\n  mode = 'shar'\n    fix: x"
    )
    lines = [CONTROLLER + line for line in reason.splitlines()]
    path.write_text("\n".join([*lines, CONTROLLER, "  an unrelated line", ""]))
    log = ServeLog(path)
    log.read_on()

    assert log.reason == reason


def test_an_application_that_cannot_be_built_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "serve.log"
    path.write_text(
        f"{CONTROLLER}WARNING -- Deploying app 'memshare' failed with exception:\n"
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for AppArgs\n"
    )
    log = ServeLog(path)
    log.read_on()

    assert log.build_failed
    assert "validation error" in log.reason


def test_the_tail_leaves_out_what_waiting_wrote(tmp_path: Path) -> None:
    path = tmp_path / "serve.log"
    path.write_text("first\nx disconnected, cancelling request.\nsecond\nthird\n")

    assert ServeLog(path).tail(2) == "second\nthird"
