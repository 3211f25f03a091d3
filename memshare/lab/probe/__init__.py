"""Trains and judges probes: what tells from the cache alone which tokens will be needed.

``texts`` says what is read; ``reader`` reads it with a transformers model; ``collect`` stores what
a probe learns from; ``fit`` trains its networks; ``evaluate`` drops tokens by a scorer, once or in
rounds, and measures the damage; ``train`` and ``judging`` are what the command line asks for.
``padded`` makes a probe for padded heads.
"""
