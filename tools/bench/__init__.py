"""Benchmarks, loads and faults: ``python -m tools.bench.NAME``, in the top folder."""
