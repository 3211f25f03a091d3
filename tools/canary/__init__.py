"""Says what of vLLM MemShare touches, and what of that another version has moved.

It reads source alone: neither vLLM nor torch is imported, so that a wheel will do that this machine
could not even install. ``touch_points.py`` what we touch; ``sources.py`` what a version has.
"""
