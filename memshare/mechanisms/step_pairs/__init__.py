"""The paper: aligned blocks of lexically similar steps (arXiv 2507.21433)."""
