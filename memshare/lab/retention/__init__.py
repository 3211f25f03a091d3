"""Ways to choose the tokens that stay, on one table: what the literature does beside our own.

``attention`` watches what a policy of the literature would need to see, ``policies`` are the
policies, ``needles`` texts that hide a number, and ``compare`` judges all by the same bytes. They
run in a transformers model: what earns its place is built into serving as a scorer.
"""
