"""Generated pages of the documentation, each made from what the code itself says."""
