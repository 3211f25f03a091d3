"""The serving cluster: Ray Serve replicas of vLLM with MemShare, and a pool of CPU evaluators.

``serve run configs/cluster.yaml`` starts the Ray Serve application, :func:`cluster.app.build`.
"""
