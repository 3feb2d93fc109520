"""The training loss: one minus the concordance correlation coefficient of the global batch, plus a weighted squared error.

Whoever changes it increases ``train.run.NUMERICS``, so that no run goes on with another loss than it began with.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

#: Keeps CCC and its gradient finite where prediction and target are both constant (0/0).
EPSILON = 1e-8


def ccc(prediction: Array, target: Array, axis_name: str | None = None) -> Array:
    """Concordance correlation coefficient per dimension: float32 [B, D], [B, D] → [D].

    ``2·cov(x, y) / (var x + var y + (mean x − mean y)²)`` with population moments (Lin 1989). The moments are those of the
    set, never means of parts' CCCs: with ``axis_name`` they are reduced over all devices. 0/0 gives 0.
    """
    if prediction.shape != target.shape or prediction.ndim != 2:
        raise ValueError(f"expected prediction and target [B, D], got {prediction.shape} and {target.shape}")

    def mean(x: Array) -> Array:
        local = x.mean(axis=0)
        return local if axis_name is None else lax.pmean(local, axis_name)

    mean_p, mean_t = mean(prediction), mean(target)
    p, t = prediction - mean_p, target - mean_t
    return 2 * mean(p * t) / (mean(p * p) + mean(t * t) + (mean_p - mean_t) ** 2 + EPSILON)


def distillation_loss(
    prediction: Array, target: Array, *, l2: float = 0.0, axis_name: str | None = None
) -> tuple[Array, Array]:
    """``mean_d(1 − CCC_d) + l2 · mean squared error`` of [B, D] and [B, D]: the loss [] and the CCCs [D].

    The squared error gives a direction where a CCC has none: a batch of equal targets, or equal predictions.
    """
    concordance = ccc(prediction, target, axis_name)
    error = jnp.mean((prediction - target) ** 2)
    if axis_name is not None:
        error = lax.pmean(error, axis_name)
    return jnp.mean(1 - concordance) + l2 * error, concordance
