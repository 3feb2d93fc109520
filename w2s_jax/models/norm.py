"""BatchNorm whose sums are fast on a CPU, as every convolution block here uses it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

#: Added to the variance; PyTorch's default.
EPSILON = 1e-5


def channel_sum(x: Array) -> Array:
    """Sum over all axes but the last, in float32: [B, time, mel, C] → [C].

    In two steps with a barrier between: XLA's CPU loops add whole images fast, but to reduce to a few channels at once costs
    more than a convolution (measured: experiments/README.md).
    """
    return lax.optimization_barrier(x.sum(axis=0, dtype=jnp.float32)).sum(axis=(0, 1))


def scale_shift(x: Array, scale: Array, shift: Array, relu: bool) -> Array:
    """``x · scale + shift`` of [B, time, mel, C], [C], [C], cut off below 0 if ``relu``; in float32, rounded to x's dtype."""
    y = x * scale + shift
    return (jnp.maximum(y, 0) if relu else y).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def batch_norm(x: Array, scale: Array, bias: Array, relu: bool, axis_name: str | None) -> tuple[Array, Array, Array]:
    """An image [B, time, mel, C] normalised by its own moments, then ``scale_shift``; also the moments, float32 [C] each.

    The variance is the mean square of what is left after the mean is taken off: a log-mel image is around -40 dB, where a mean
    of squares less a squared mean loses digits. The moments themselves have no gradient. What the gradient needs is kept in the
    dtype of x, and its sums are ``channel_sum``: automatic differentiation would do neither.
    """
    return _batch_norm_forward(x, scale, bias, relu, axis_name)[0]


def _batch_norm_forward(x: Array, scale: Array, bias: Array, relu: bool, axis_name: str | None):
    mean = _global(channel_sum(x) / (x.size // x.shape[-1]), axis_name)
    var = _global(channel_sum(jnp.square(x - mean)) / (x.size // x.shape[-1]), axis_name)
    inverse = lax.rsqrt(var + EPSILON)
    y = scale_shift(x, scale * inverse, bias - mean * scale * inverse, relu)
    return (y, mean, var), (x, y if relu else None, scale, mean, inverse)


def _batch_norm_backward(relu: bool, axis_name: str | None, residuals, gradients):
    x, y, scale, mean, inverse = residuals
    g = gradients[0].astype(jnp.float32)
    if relu:
        g = jnp.where(y > 0, g, 0)
    normed = (x - mean) * inverse
    slope, offset = channel_sum(g * normed), channel_sum(g)
    # every element moves the mean and the variance of all: on all devices, hence their means
    mean_slope, mean_offset = _global((slope / (x.size // x.shape[-1]), offset / (x.size // x.shape[-1])), axis_name)
    dx = scale * inverse * (g - mean_offset - normed * mean_slope)
    return dx.astype(x.dtype), slope, offset


batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


def _global(means, axis_name: str | None):
    return means if axis_name is None else lax.pmean(means, axis_name)


def update_running_stats(running: Mapping[str, Array], mean: Array, var: Array) -> dict[str, Array]:
    """Running ``mean`` and ``var`` [C] after one more batch; the momentum is PyTorch's default (its 0.1 is 0.9 here)."""
    return {name: 0.9 * running[name] + 0.1 * moment for name, moment in (("mean", mean), ("var", var))}


class BatchNorm(nn.Module):
    """BatchNorm of an image [B, time, mel, C], with the parameters and statistics of ``nn.BatchNorm``; then ReLU, if asked.

    Momentum and epsilon are PyTorch's defaults, which the published students used. Moments and running statistics are float32,
    the image may be bfloat16. With an ``axis_name`` (of ``shard_map`` or ``pmap``) the moments are those of the global batch.
    """

    relu: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        if not train:
            # one factor and one shift per channel: onnxruntime merges them into the convolution before
            factor = scale * lax.rsqrt(running_var.value + EPSILON)
            return scale_shift(x, factor, bias - running_mean.value * factor, self.relu)
        axis_name = None if self.is_initializing() else self.axis_name
        y, mean, var = batch_norm(x, scale, bias, self.relu, axis_name)
        if not self.is_initializing():
            updated = update_running_stats({"mean": running_mean.value, "var": running_var.value}, mean, var)
            running_mean.value, running_var.value = updated["mean"], updated["var"]
        return y
