"""``memshare check``: will this model, machine, version and configuration work together?

- ``report``: findings, and how they are shown
- ``setup``: what is to be checked, from a Ray Serve file or from vLLM's own options
- ``installed``: versions of the packages
- ``hub``: whether a model's files can be had
- ``machine``: processors, memory and limits
- ``ports``: who listens where the application is going to
- ``model``: the model and its KV cache, against what MemShare refuses
- ``command``, ``progress``: the command line, and what is being looked at
"""
