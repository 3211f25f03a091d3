"""Trace-driven simulation of scheduling under KV pressure, for machines that you do not have.

vLLM's real scheduler, block pool and cache manager run, with MemShare's real connector; only the
model is a stand-in, and time comes from a model of a step's cost.

- ``harness``: the scheduler and the stand-in for its workers
- ``costs``: how long an engine step takes, from published numbers or fitted to measured steps
- ``placed``: the same of a model that is divided over ranks
- ``run``: one workload under one configuration
"""
