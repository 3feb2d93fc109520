"""The state of JAX that this package computes in, whatever its user has set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import jax.experimental

from w2s_jax.errors import UsageError


@contextlib.contextmanager
def computing() -> Iterator[None]:
    """Decorates functions that compute with JAX and are called from outside: float32, on devices that there are.

    Labels, students and files are float32 also where the user or another package has turned 64 bits on (``jax_enable_x64``).

    Raises:
        UsageError: there is no device of the kind that JAX was told to use.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where the plugin of that kind is not installed
        wanted = jax.config.jax_platforms
        if not wanted:
            raise
        said = str(error).strip().split("\n")[0][:200]
        raise UsageError(
            f"JAX finds no {wanted} device (JAX_PLATFORMS={wanted}{said and ': '}{said}); unset JAX_PLATFORMS, set it to cpu, "
            f"or install JAX for {wanted}"
        ) from error
    # its name before JAX 0.8
    with jax.enable_x64(False) if hasattr(jax, "enable_x64") else jax.experimental.disable_x64():
        yield
