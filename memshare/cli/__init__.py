"""Subcommands of ``memshare``, one module each. See :mod:`memshare.cli.main`."""
