"""Pooling: 3×3 maxima within the trunk; over time, in float32, attention as the Wav2Small students share it, or moments."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from w2s_jax.models import plan
from w2s_jax.models.forms import Dense
from w2s_jax.models.norm import EPSILON


@jax.custom_vjp
def max_pool(x: Array) -> Array:
    """PyTorch's ``MaxPool2d(3, 2, 1)``, gradient included: [B, time, mel, C] → [B, ⌈time/2⌉, ⌈mel/2⌉, C].

    Of equal maxima in a window the first one has the whole gradient: that of the least time, and of these that of the least
    mel. Padding never is a maximum.
    """
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


def _max_pool_forward(x: Array):
    # mel first, then time: the first of the rows' maxima, and within its row the first, is the window's first. The gradient of
    # XLA's own windowed maximum costs twice as much on a CPU
    rows, place_in_row = _first_of_three(x, 2)
    y, row = _first_of_three(rows, 1)
    return y, (place_in_row, row, x[:0])  # of x only the shape


def _max_pool_backward(residuals, g: Array):
    place_in_row, row, x = residuals
    return (_spread(_spread(g, row, 1, x.shape[1]), place_in_row, 2, x.shape[2]),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _first_of_three(x: Array, axis: int) -> tuple[Array, Array]:
    """Along one axis, the maximum of the elements 2k - 1, 2k and 2k + 1 for every k; and which is the first: int8 0, 1 or 2."""
    size, lowest = x.shape[axis], jnp.array(-jnp.inf, x.dtype)
    half = (size + 1) // 2
    pad = [(0, 0, 0)] * x.ndim
    pad[axis] = (0, 2 * half - size, 0)
    pairs = lax.pad(x, lowest, pad).reshape(*x.shape[:axis], half, 2, *x.shape[axis + 1 :])
    even, odd = (lax.index_in_dim(pairs, at, axis + 1, keepdims=False) for at in (0, 1))
    pad[axis] = (1, -1, 0)
    before, pair = lax.pad(odd, lowest, pad), jnp.maximum(even, odd)
    first = jnp.where(before >= pair, 0, jnp.where(even >= odd, 1, 2))
    return jnp.maximum(pair, before), first.astype(jnp.int8)


def _spread(g: Array, first: Array, axis: int, size: int) -> Array:
    """The gradient of ``_first_of_three``: each of g goes to where its maximum was, along an axis of ``size``."""
    zero = jnp.zeros((), g.dtype)
    pad = [(0, 0, 0)] * g.ndim
    pad[axis] = (-1, 1, 0)
    even = jnp.where(first == 1, g, zero)
    odd = jnp.where(first == 2, g, zero) + lax.pad(jnp.where(first == 0, g, zero), zero, pad)
    both = jnp.stack([even, odd], axis + 1).reshape(*g.shape[:axis], -1, *g.shape[axis + 1 :])
    return lax.slice_in_dim(both, 0, size, axis=axis)


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

    The deviation is ``sqrt(var + EPSILON)``, var that of the population: where nothing changes, a bare root has no gradient.
    """
    mean = x.mean(axis=1, dtype=jnp.float32)
    # squares of what is left after the mean is taken off: never below 0, and no digits are lost
    variance = jnp.square(x - mean[:, None]).mean(axis=1)
    return jnp.concatenate([mean, jnp.sqrt(variance + EPSILON)], axis=-1)


#: What a student's field ``pooling`` may be besides "attention": in training, [B, time, C] → [B, …], and as a layer of a plan.
POOLINGS = {
    "mean": (mean_pooling, plan.MomentPooling(deviation=False)),
    "statistics": (statistics_pooling, plan.MomentPooling(deviation=True)),
}


def fold_pooling(pooling: str, params: Mapping) -> plan.Layer:
    """A pooling by its name as a layer of a plan; ``params`` are those of the student, attention's under "pool"."""
    return plan.fold_attention(params["pool"]) if pooling == "attention" else POOLINGS[pooling][1]
