"""Compaction: tokens of running requests are dropped, and those that stay move together.

Does: in every layer and KV head the least needed tokens go, chosen anew for each; the rest is
packed into fewer blocks, and the others become *holes*: null entries of the block table, which
attention is not shown. A request is compacted in few, large rounds. It is tainted by its first
loss, until a preemption makes it exact again. Costs: what is dropped cannot return; each round
scores and moves tokens. From: the idea of KVzip (arXiv 2505.23416) and its relatives, to drop by
head what will not be needed; how a paged cache does it, is ours.

``scheduler`` decides how many blocks of which requests (``budget``), and says so to the workers
(``messages``); these choose the tokens and move them.
"""
