"""A guard on quality: scores answers again without MemShare, and stops sharing when they differ.

``config.py`` what there is to set; ``evidence.py`` the statistic; ``lot.py`` which requests are
chosen; ``answers.py`` what is recorded of them; ``shadows.py`` the exact request that scores them;
``guard.py`` puts these together, and decides.
"""
