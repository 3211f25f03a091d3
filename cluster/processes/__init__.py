"""Processes: how they start together, end together, and leave a node or a cluster with care."""
