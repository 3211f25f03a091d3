"""The live page: what every replica's KV cache holds, minute by minute, and why.

A :class:`~cluster.dashboard.engine_sampler.EngineSampler` in each replica samples what the engine
reports anyway. Once a second the replica sends its samples to the
:class:`~cluster.dashboard.hub.DashboardHub`, one small deployment that remembers them. Whichever
replica a browser reaches asks the board. A fault anywhere on this way is counted
(``memshare_monitoring_faults_total``); it costs samples, never a request.
"""
