"""Attention pooling over time, as the Wav2Small students share it."""

from __future__ import annotations

import flax.linen as nn
from jax import Array


class AttentionPooling(nn.Module):
    """Weighted sum over time with one softmax per feature: [B, time, ...] → [B, ...].

    ``sum_t lin(x) · softmax_t(sof(x))``, both maps dense on the last axis (Wav2Small, arXiv 2408.13920). On flat tokens
    [B, time, C] it is the pooling of the 72K student; on an image [B, time, mel, C] the two maps are the 1×1 convolutions
    of the 17K one.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        features = x.shape[-1]
        value = nn.Dense(features, name="lin")(x)
        weight = nn.softmax(nn.Dense(features, name="sof")(x), axis=1)
        return (value * weight).sum(axis=1)
