"""MemShare's log lines: text, or one JSON object per line with the line's content as fields."""

from __future__ import annotations

import logging

from memshare.config import LogConfig

_OURS = ("memshare", "cluster")
_TEXT = "%(levelname)s %(asctime)s [%(name)s] %(message)s"
_JSON = "%(asctime)s %(levelname)s %(name)s %(processName)s %(process)d %(message)s"
_FIELDS = {
    "asctime": "time", "levelname": "level", "name": "logger", "processName": "process",
    "process": "pid",
}  # fmt: skip


def set_up_logging(config: LogConfig) -> None:
    """Send our lines to standard error.

    A process whose loggers have handlers already, such as a test or a program that uses the
    library, keeps them, unless ``json`` is asked for.
    """
    if config.format == "text" and logging.getLogger(_OURS[0]).hasHandlers():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(_formatter(config))
    # Not by dictConfig: it closes every handler of the process, ours or not.
    for name in _OURS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(config.level.upper())
        logger.propagate = False


def _formatter(config: LogConfig) -> logging.Formatter:
    if config.format == "text":
        return logging.Formatter(_TEXT)
    from pythonjsonlogger.json import JsonFormatter

    return JsonFormatter(_JSON, rename_fields=_FIELDS)
