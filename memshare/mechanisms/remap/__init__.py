"""Remaps: under pressure, an entry of a block table is pointed at another block of the request.

Does: frees the target's block; its tokens are read from the donor's from now on. The request is
tainted by its first remap: none of its later blocks enters the prefix cache, until a preemption
makes it exact again. Costs: the donor is read twice, and what the target held is approximate. From:
MemShare / ReasonCache, arXiv 2507.21433.

This folder is what such mechanisms share. ``policy`` is what most of them are: a choice of victim
and donor. ``on_demand`` asks a policy when a block is needed; ``scheduler`` and ``worker`` are the
two halves, ``remapper`` the act, ``messages`` what goes between them.
"""
