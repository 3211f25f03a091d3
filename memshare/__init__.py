"""MemShare: reclaims KV-cache blocks of running requests in unmodified vLLM.

The package itself imports neither Ray nor vLLM; only ``memshare.engine`` touches vLLM.
"""

__version__ = "0.1.0"
