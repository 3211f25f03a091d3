"""Which rank holds what of a model, by arithmetic over its ``config.json``.

``model_config`` reads a :class:`~memshare.moe.placement.shape.ModelShape`; ``parallelism`` says how
it may be divided; ``ranks`` divides it; ``traffic`` counts what ranks send each other; ``proposal``
tries every division of a machine. Loads neither torch nor vLLM, and no weights.
"""
