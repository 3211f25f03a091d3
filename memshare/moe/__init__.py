"""Mixtures of experts: what their operators ask of a KV manager (PiKV, arXiv 2508.06526)."""
