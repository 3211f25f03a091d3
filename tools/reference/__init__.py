"""Pages of the API reference, each made from what the code itself says."""
