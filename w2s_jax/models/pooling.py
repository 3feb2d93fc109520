"""Pooling over time: attention, as the Wav2Small students share it, and two simpler ways; sums over time are float32."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from w2s_jax.models.forms import Dense

#: What a student's field ``pooling`` may be.
POOLINGS = ("attention", "mean", "statistics")


class AttentionPooling(nn.Module):
    """Weighted sum over time with one softmax per feature: [B, time, ...] → float32 [B, ...].

    ``sum_t lin(x) · softmax_t(sof(x))``, both maps dense on the last axis (Wav2Small, arXiv 2408.13920). On flat tokens
    [B, time, C] it is the pooling of the 72K student; on an image [B, time, mel, C] the two maps are the 1×1 convolutions
    of the 17K one.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        features = x.shape[-1]
        value = Dense(features, name="lin")(x)
        # a softmax over time does not see this bias; the gradient would be rounding errors, which Adam makes whole steps of
        weight = nn.softmax(Dense(features, adds=False, name="sof")(x), axis=1)
        return (value * weight).sum(axis=1)


def mean_pooling(x: Array) -> Array:
    """Mean over time: [B, time, C] → float32 [B, C]."""
    return x.mean(axis=1, dtype=jnp.float32)


def statistics_pooling(x: Array) -> Array:
    """Mean and standard deviation over time: [B, time, C] → float32 [B, 2·C], as in x-vectors (Snyder et al., ICASSP 2018).

    The deviation is ``sqrt(var + 1e-5)``, var that of the population: where nothing changes, a bare root has no gradient.
    """
    mean = x.mean(axis=1, dtype=jnp.float32)
    # squares of what is left after the mean is taken off: never below 0, and no digits are lost
    variance = jnp.square(x - mean[:, None]).mean(axis=1)
    return jnp.concatenate([mean, jnp.sqrt(variance + 1e-5)], axis=-1)
