"""``python -m w2s_jax.cli``."""

from w2s_jax.cli import entry

entry()
