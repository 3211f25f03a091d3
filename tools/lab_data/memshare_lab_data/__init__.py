"""Data of MemShare's instruments.

``adapter/`` is the small reasoning model's LoRA adapter; ``probes/`` tell which cached tokens of
the small models will be needed; ``roles/`` are adapters of three agents that share one KV cache.
"""
