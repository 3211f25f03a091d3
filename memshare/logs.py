"""Log lines of ours: text, or one JSON object a line with what a line is about as fields."""

from __future__ import annotations

import logging
from logging.config import dictConfig

from memshare.config import LogConfig

_OURS = ("memshare", "cluster")
_TEXT = "%(levelname)s %(asctime)s [%(name)s] %(message)s"
_JSON = "%(asctime)s %(levelname)s %(name)s %(processName)s %(process)d %(message)s"


def set_up_logging(config: LogConfig) -> None:
    """Send our lines to standard error.

    A process whose loggers have handlers already, such as a test or a program that uses the
    library, keeps them, unless ``json`` is asked for.
    """
    if config.format == "text" and logging.getLogger(_OURS[0]).hasHandlers():
        return
    dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "text": {"format": _TEXT},
                "json": {
                    "()": "pythonjsonlogger.json.JsonFormatter",
                    "format": _JSON,
                    "rename_fields": {
                        "asctime": "time", "levelname": "level", "name": "logger",
                        "processName": "process", "process": "pid",
                    },
                },
            },
            "handlers": {
                "memshare": {
                    "class": "logging.StreamHandler",
                    "formatter": config.format,
                    "stream": "ext://sys.stderr",
                }
            },
            "loggers": {
                name: {
                    "handlers": ["memshare"],
                    "level": config.level.upper(),
                    "propagate": False,
                }
                for name in _OURS
            },
        }
    )  # fmt: skip
