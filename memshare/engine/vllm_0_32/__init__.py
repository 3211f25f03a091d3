"""vLLM 0.32: everything that is not its public API. ``adapter`` is the door.

Nothing outside this folder knows these internals. What each module relies on is tested on vLLM's
own classes in tests/memshare/engine/adapter.
"""
