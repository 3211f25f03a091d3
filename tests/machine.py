"""What tests of real engines expect of the machine."""

DTYPE = "float32"
"""Of weights and KV cache: several times as fast as bfloat16 on CPUs that only emulate that."""
