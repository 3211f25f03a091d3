"""vLLM's engine in a replica: its client, its options, and requests that go through it."""
