"""Errors that a reader can act on; the command line prints them as one line."""

from __future__ import annotations

from w2s_jax.install import pip_install


class W2SError(ValueError):
    """The work failed. The command line prints the message as one line and exits with 1."""

    exit_code = 1


class UsageError(W2SError):
    """The request was wrong (a path, a name, an option). The command line exits with 2."""

    exit_code = 2


class MismatchError(W2SError):
    """Two artifacts do not belong together (bank and views, views and labels, run and configuration)."""


def missing_extra(package: str, extra: str) -> UsageError:
    """The error for an import that an optional extra would have brought."""
    return UsageError(f"{package} is not installed; this command needs it: {pip_install(extra)}")
