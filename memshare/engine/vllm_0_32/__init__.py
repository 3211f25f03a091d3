"""vLLM 0.32: everything that is not its public API."""
