"""BatchNorm whose sums are fast on a CPU, as every convolution block here uses it."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax


@jax.custom_vjp
def channel_sum(x: Array) -> Array:
    """Sum over all axes but the last: [B, time, mel, C] → [C].

    In two steps with a barrier between: XLA's CPU loops add whole images fast, but to reduce to a few channels at once costs
    more than a convolution (measured: experiments/README.md).
    """
    return lax.optimization_barrier(x.sum(axis=0)).sum(axis=(0, 1))


channel_sum.defvjp(lambda x: (channel_sum(x), x), lambda x, g: (jnp.broadcast_to(g, x.shape),))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def scale_shift(x: Array, scale: Array, shift: Array, relu: bool) -> Array:
    """``x · scale + shift`` of [B, time, mel, C], [C], [C], cut off below 0 if ``relu``; gradients use ``channel_sum``."""
    y = x * scale + shift
    return jnp.maximum(y, 0) if relu else y


def _scale_shift_forward(x: Array, scale: Array, shift: Array, relu: bool):
    y = scale_shift(x, scale, shift, relu)
    return y, (x, scale, y if relu else None)


def _scale_shift_backward(relu: bool, kept, g: Array):
    x, scale, y = kept
    if relu:
        g = jnp.where(y > 0, g, 0)
    return g * scale, channel_sum(g * x), channel_sum(g)


scale_shift.defvjp(_scale_shift_forward, _scale_shift_backward)


class BatchNorm(nn.Module):
    """BatchNorm of an image [B, time, mel, C], with the parameters and statistics of ``nn.BatchNorm``; then ReLU, if asked.

    Momentum and epsilon are PyTorch's defaults (its 0.1 is 0.9 here), which the published students used. The variance is the
    mean square of what is left after the mean is taken off: a log-mel image is around -40 dB, where a mean of squares less a
    squared mean loses digits. Under a pmap with ``axis_name`` the moments are those of the whole global batch.
    """

    relu: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        mean, var = running_mean.value, running_var.value
        if train:
            mean = self._global_mean(x)
            # the mean as a constant: the deviations add up to zero, so the variance does not change with it
            var = self._global_mean(jnp.square(x - lax.stop_gradient(mean)))
            if not self.is_initializing():
                running_mean.value = 0.9 * running_mean.value + 0.1 * mean
                running_var.value = 0.9 * running_var.value + 0.1 * var
        # one factor and one shift per channel: onnxruntime merges them into the convolution before
        factor = scale * lax.rsqrt(var + 1e-5)
        return scale_shift(x, factor, bias - mean * factor, self.relu)

    def _global_mean(self, x: Array) -> Array:
        mean = channel_sum(x) / (x.size // x.shape[-1])
        if self.axis_name is not None and not self.is_initializing():
            mean = lax.pmean(mean, self.axis_name)
        return mean
