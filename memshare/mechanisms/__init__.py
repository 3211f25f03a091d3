"""Ways to need less KV memory, a folder each: parameters, scheduler part, worker part.

``contract`` says what a mechanism is. ``remap`` is what those have in common that re-point entries
of block tables; ``twins``, ``step_pairs`` and ``baselines`` choose which. The names by which users
choose one are in ``memshare/config/registry.py``.
"""
