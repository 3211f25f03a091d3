"""What the engine side is made of, without vLLM and without torch: requests, limits, triggers."""
