"""Comparing arms: the same work on the same KV memory, with and without sharing.

- ``arms``: what is compared
- ``workloads``: what the engines are asked to do
- ``run``: one engine, one workload, and what is measured
- ``records``: the plan, and what was measured, as they are kept
- ``engine_process``: every engine in its own process
- ``block_outcomes``: what became of a request's blocks
- ``report``: tables of ratios within a repeat
- ``models``: what ``--model`` names
- ``exactness``: what must not change a token
"""
