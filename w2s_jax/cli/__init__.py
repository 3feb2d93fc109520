"""The command line. It only reads options, shows progress and prints results; the work is in the library."""

from w2s_jax.cli.program import app, entry, main

__all__ = ["app", "entry", "main"]
