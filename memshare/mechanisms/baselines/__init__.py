"""Baselines: the oldest blocks first, or random ones, whatever they hold."""
