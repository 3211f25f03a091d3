"""Subcommands of ``memshare``, one module each. See ``memshare.cli.main``."""
