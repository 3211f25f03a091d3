"""The section ``guard`` of the application's arguments."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from memshare.config import Real, Section, Whole


class GuardConfig(Section):
    """A guard on quality. Some requests are chosen when they come; what MemShare approximated of
    them is scored again by an exact request of the server's own, their *shadow*."""

    share: Real = Field(default=0.05, gt=0.0, le=1.0)
    """Fraction of the requests that are chosen. A shadow computes a request's prompt and answer as
    one prompt, without the prefix cache; requests that MemShare left exact need none."""
    bound: Real = Field(default=0.1, gt=0.0, lt=1.0)
    """Disagreement above which the guard acts, 0..1: the mean part of an answer's tokens that the
    exact model would not have let pass (1 - min(1, exact probability / served probability))."""
    false_alarm_rate: Real = Field(default=0.01, gt=0.0, le=0.2)
    """Probability of an alarm within ``window`` shadows although disagreement is within the bound,
    at most; however often it is looked at."""
    window: Whole = Field(default=1000, ge=20)
    """Shadows after which the evidence is gathered anew. The interval is of the last so many."""
    on_alarm: Literal["stop", "report"] = "stop"
    """``stop``: new requests run exact until ``cool_down_s`` is over, or an operator lets the
    replica go on. ``report``: only metrics and logs say so."""
    cool_down_s: Real | None = Field(default=None, gt=0.0)
    """Seconds after which MemShare goes on by itself, with no evidence. None waits for an operator.
    """
    concurrent: Whole = Field(default=1, ge=1)
    """Shadows that run at one time in a replica."""
    waiting: Whole = Field(default=64, ge=1)
    """Answers that wait to be scored; beyond that the oldest is dropped, and counted."""
    patience_s: Real = Field(default=30.0, ge=0.0)
    """Seconds that a shadow waits for a moment in which no request waits and the KV cache has
    room. Then it runs all the same, or a busy server would never be judged."""
    max_usage: Real = Field(default=0.8, gt=0.0, le=1.0)
    """Fraction of the KV cache in use above which it has no such room."""

    @model_validator(mode="after")
    def _cools_down_from_something(self) -> GuardConfig:
        if self.on_alarm == "report" and self.cool_down_s is not None:
            raise ValueError(
                f"cool_down_s ({self.cool_down_s:g}) has no effect with on_alarm 'report', which "
                "stops nothing; leave it out, or set on_alarm to 'stop'"
            )
        return self
