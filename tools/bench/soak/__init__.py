"""A cluster under load for hours, while its parts are killed: ``python -m tools.bench.soak``."""
