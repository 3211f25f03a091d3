"""Tests with engines in this process; pytest puts the environment back after the package."""
