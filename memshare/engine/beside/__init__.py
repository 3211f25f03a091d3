"""MemShare beside another KV connector, both inside vLLM's ``MultiConnector``.

Another connector keeps copies of KV blocks, in host memory or in another engine, and gives them
back as the exact KV of a text. What it copies and what MemShare may change must therefore be
disjoint: it copies prompts, and MemShare touches none of them (:mod:`~.rules`).
"""
