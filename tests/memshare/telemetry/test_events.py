"""The event log: whole lines, in order, on disk when it is closed."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from memshare.telemetry import event_log as events
from memshare.telemetry.event_log import EventLog


def lines(path: Path) -> list[dict[str, Any]]:
    """Read a log back; every line must be JSON of its own."""
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def test_every_line_is_one_event_in_order(tmp_path: Path) -> None:
    values = [
        "plain",
        "line\nbreak",
        '\u2028 \x00 "quote" \U0001f9e0',
        -1,
        1 << 70,
        0.1,
        True,
        None,
    ]
    log = EventLog(tmp_path / "events.jsonl")
    before = time.time()
    for value in values:
        log.record("step", request="r", value=value)
    log.close()
    written = lines(tmp_path / "events.jsonl")
    assert [line["value"] for line in written] == values
    assert {(line["event"], line["request"]) for line in written} == {("step", "r")}
    assert all(before <= line["t"] <= time.time() for line in written)


def test_close_writes_what_is_waiting_and_may_be_called_again(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for i in range(5000):
        log.record("applied", target=i)
    log.close()
    log.close()
    assert [line["target"] for line in lines(tmp_path / "events.jsonl")] == list(range(5000))
    assert not log._thread.is_alive()
    assert log.take_dropped() == 0


def test_a_quiet_log_is_readable_before_it_is_closed(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.record("started")
    deadline = time.monotonic() + 10.0
    while not lines(tmp_path / "events.jsonl") and time.monotonic() < deadline:
        time.sleep(0.005)
    assert [line["event"] for line in lines(tmp_path / "events.jsonl")] == ["started"]
    log.close()


def test_appends_and_makes_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "events.jsonl"
    for request in ("a", "b"):
        log = EventLog(path)
        log.record("finished", request=request)
        log.close()
    assert [line["request"] for line in lines(path)] == ["a", "b"]


def test_a_path_that_cannot_be_opened_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        EventLog(tmp_path / "file" / "events.jsonl")


def test_a_disk_that_lags_costs_lines_and_they_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "_MAX_WAITING", 3)
    disk = threading.Event()
    real = json.dumps

    def slow(*args: Any, **options: Any) -> str:
        disk.wait(10.0)
        return real(*args, **options)

    monkeypatch.setattr(events.json, "dumps", slow)
    log = EventLog(tmp_path / "events.jsonl")
    log.record("step", i=0)
    while log._waiting.qsize():  # until the thread stands before the disk
        time.sleep(0.001)
    for i in range(1, 8):
        log.record("step", i=i)
    assert log.take_dropped() == 4
    assert log.take_dropped() == 0, "counted once"
    disk.set()
    log.close()
    assert [line["i"] for line in lines(tmp_path / "events.jsonl")] == [0, 1, 2, 3]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_costs_lines_and_they_are_counted() -> None:
    log = EventLog(Path("/dev/full"))
    for i in range(3):
        log.record("step", i=i)
        while log._waiting.qsize():
            time.sleep(0.001)
    log.close()
    assert log.take_dropped() > 0
    assert log.take_dropped() == 0, "counted once"
