"""Scorers: what tokens are worth, by what the cache holds of them. ``registry`` has their names."""
