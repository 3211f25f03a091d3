"""Remaps: an entry of a block table is pointed at another block of the request."""
