"""Questions to Ray Serve's controller, from wherever Ray is."""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.exceptions import RayError

logger = logging.getLogger(__name__)

_NAME, _NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"  # ray/serve/_private/constants.py
_ANSWER_S = 30.0


def ask_controller(*methods: str) -> list[Any] | None:
    """What its methods return; None if this process isn't in a cluster with a controller.

    None, too, where the controller does not answer: the log says why.
    """
    if not ray.is_initialized():
        return None
    try:
        controller: Any = ray.get_actor(_NAME, _NAMESPACE)
        calls = [getattr(controller, method).remote() for method in methods]
        answers: list[Any] = ray.get(calls, timeout=_ANSWER_S)
    except (ValueError, RayError) as error:
        logger.info("Ray Serve's controller does not answer %s: %r", ", ".join(methods), error)
        return None
    return answers
