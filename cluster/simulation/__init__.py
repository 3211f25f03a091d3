"""A cluster without engines: the product's routing, scaling and placement, on simulated replicas.

For what no test machine can hold: a thousand replicas and a hundred thousand sessions.
``python -m tools.bench.simulate_cluster`` runs it.
"""
