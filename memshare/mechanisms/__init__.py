"""Ways to need less KV memory: a folder each."""
