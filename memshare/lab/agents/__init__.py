"""Role adapters: what they are trained on, how, and what sharing a cache does to them.

``records`` reads what roles wrote and tells which records are of one trajectory, ``passes`` makes
of them what a model reads at a time, ``fit`` trains one role, and ``train`` all of them, into a
folder each with the card that ``card`` writes. ``turns`` makes conversations of trajectories,
``replay`` lets an engine repeat them under a scheme, ``quality`` compares what it says, and
``switches`` has one text read by all. ``layers`` keeps what no adapter changes out of a training,
and ``unify`` gives adapters that were trained apart one A matrix.
"""
