"""Settings of all tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# No deadline: on loaded cores a slow example says nothing. `pytest --hypothesis-profile=thorough`
# digs deeper than a run at every change can.
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", quick)
settings.register_profile("thorough", quick, max_examples=500)
settings.load_profile("quick")
