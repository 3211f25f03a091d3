"""The engine side's core, without vLLM and without torch: requests, limits, triggers."""
