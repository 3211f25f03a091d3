"""Probes: small networks that read off the cache which tokens will be needed.

``network`` computes, ``card`` says what a probe is for and how good it is, ``file`` reads and
writes both, ``weights`` recognises the model that it was trained for, ``find`` looks for one.
"""
