"""A small mixture of experts to measure with, and what affinity of requests can gain on it."""
