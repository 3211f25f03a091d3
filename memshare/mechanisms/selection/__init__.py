"""Page selection: a query reads the pages of the KV cache that may matter to it.

After Quest (Tang et al., 2024, https://arxiv.org/abs/2406.10774): of every page and KV head the
elementwise maximum and minimum of its keys are kept, from which follows the most that any token of
the page can score with a query. Attention reads the pages with the highest bounds. Nothing is
freed: the next query may want other pages.

Other than in Quest, what comes first and what is newest is always read, within the budget.
"""
