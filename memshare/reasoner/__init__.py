"""A small reasoning model, and the problems that measure it.

Accuracy is what a KV-memory policy must not cost, and a public reasoning model does not run on two
CPU cores. So here is one that does: SmolLM2-135M-Instruct with a LoRA adapter that makes it think
at length, check itself, and answer.

- ``problems``: problems of two families, without limit, from a seed; and their worked solutions
- ``model``: the model, made once, of base and adapter

The adapter, which ``tools/train_reasoner.py`` trains, is in a distribution of its own,
``memshare-lab-data``, with its model card: ``tools/lab_data/memshare_lab_data/adapter``.
"""
