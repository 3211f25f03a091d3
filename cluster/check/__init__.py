"""``memshare check``: will this model, machine, version and configuration work together?

- ``report``: findings, and how they are shown
- ``setup``: what is to be checked, from a Ray Serve file or from vLLM's own options
- ``installed``: versions of the packages
- ``machine``: processors, memory, limits and ports
- ``model``: the model and its KV cache, against what MemShare refuses
- ``command``: the command line
"""
