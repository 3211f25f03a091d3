"""Instruments: comparisons, recorded texts, accuracy, simulation and pictures.

Nothing that serves imports them.
"""
