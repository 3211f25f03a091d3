"""LoRA adapters of one base model that share one KV cache (LRAgent, arXiv 2602.01053).

Adapters on ``q_proj`` and ``v_proj`` leave keys as the base model makes them, up to what earlier
layers changed. Cached are the base's keys and values and, in a few more columns of the values, the
*low-rank part* ``x A``; each adapter applies its own ``B`` when it reads them. ``adapter`` reads
what peft writes, ``family`` says which adapters may read each other's blocks and where each finds
its columns, ``refusals`` what cannot share and why, ``memory`` what a token takes, and ``values``
has the arithmetic. Nothing here knows vLLM.
"""
