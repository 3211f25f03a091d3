"""Compaction: tokens of running requests are dropped, and those that stay move together.

Does: in every layer and KV head the least needed tokens go, chosen anew for each; the rest is packed
into fewer blocks, and the others become *holes*: null entries of the block table, which attention
is not shown. A request is compacted in few, large rounds. It is tainted by its first loss, until a
preemption makes it exact again. Costs: what is dropped cannot return; scoring and moving at each
round. From: KVzip (arXiv 2505.23416) and relatives, made for a paged cache; the rest is ours.

``scheduler`` decides how many blocks of which requests (``budget``), ``messages`` is what it says to
the workers, and these choose the tokens and move them.
"""
