"""What host memory is worth to preempted requests, beside reclaiming and with it:
``python -m tools.bench.host_memory``."""
