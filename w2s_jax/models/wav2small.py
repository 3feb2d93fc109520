"""Wav2Small, the 72K-parameter student of arXiv 2408.13920, and its later 17K variant.

Sizes and layer order follow the paper's public text and audEERING's public model cards; parameter counts are tests.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from w2s_jax.models.frontend import LogMel, normalise
from w2s_jax.models.norm import BatchNorm
from w2s_jax.models.pooling import AttentionPooling


class ConvBlock(nn.Module):
    """3×3 convolution without bias, BatchNorm, ReLU over an image [B, time, mel, C] → [B, time, mel, channels]."""

    channels: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = nn.Conv(self.channels, (3, 3), padding=1, use_bias=False, name="conv")(x)
        return BatchNorm(True, self.axis_name, name="norm")(x, train)


def _halve(x: Array, axis: int) -> Array:
    """Maximum of three neighbours with stride 2 and one zero of padding, along one axis; x ≥ 0.

    As maxima of even and odd elements, because the gradient of XLA's windowed maximum costs twice as much on a CPU.
    """
    size = x.shape[axis]
    half = (size + 1) // 2
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, 2 * half - size)
    pairs = jnp.pad(x, pad).reshape(*x.shape[:axis], half, 2, *x.shape[axis + 1 :])
    even, odd = (lax.index_in_dim(pairs, at, axis + 1, keepdims=False) for at in (0, 1))
    pad[axis] = (1, 0)
    before = lax.slice_in_dim(jnp.pad(odd, pad), 0, half, axis=axis)
    return jnp.maximum(jnp.maximum(even, odd), before)


class VGG7(nn.Module):
    """Seven convolution blocks with one 3×3 stride-2 max pool after the third: [B, time, mel, 1] → [B, time/2, mel/2, C]."""

    channels: int = 13
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for layer in range(1, 8):
            x = ConvBlock(self.channels, self.axis_name, name=f"l{layer}")(x, train)
            if layer == 3:
                # PyTorch's MaxPool2d(3, 2, 1); what comes out of a ReLU is never below the zeros that pad it
                x = _halve(_halve(x, 2), 1)
        return x


class Wav2Small(nn.Module):
    """Wav2Small 72K: float32 16 kHz waveforms [B, T], T ≥ n_fft → logits [B, dimensions].

    67,577 trained parameters and 5,082 fixed ones in the front end. Each utterance is normalised inside the network, so
    the level of a recording does not matter. The outputs are not clipped.
    """

    dimensions: int = 3
    channels: int = 13
    n_fft: int = 64
    hop: int = 32
    n_mels: int = 26
    axis_name: str | None = None

    @property
    def minimum_samples(self) -> int:
        """The shortest input: one frame."""
        return self.n_fft

    @nn.compact
    def __call__(self, wave: Array, train: bool = False) -> Array:
        image = LogMel(self.n_fft, self.hop, self.n_mels, name="logmel")(normalise(wave))
        x = VGG7(self.channels, self.axis_name, name="vgg7")(image[..., None], train)
        x = nn.Conv(self.channels, (1, 1), name="mix")(x)
        batch, time, mel, channels = x.shape
        # features are ordered (channel, mel), as in the PyTorch original, so that weights carry over unchanged
        tokens = x.transpose(0, 1, 3, 2).reshape(batch, time, channels * mel)
        return nn.Dense(self.dimensions, name="adv")(AttentionPooling(name="pool")(tokens))


class Wav2Small17K(nn.Module):
    """Wav2Small 2.0, 17K: float32 16 kHz waveforms [B, T], T ≥ n_fft → logits [B, dimensions].

    The same trunk; attention pooling keeps a matrix X (channels × mel), and the output layer sees [X, X·Xᵀ]. 10,806 trained
    parameters and 5,082 fixed ones with three dimensions.
    """

    dimensions: int = 3
    channels: int = 13
    n_fft: int = 64
    hop: int = 32
    n_mels: int = 26
    axis_name: str | None = None

    @property
    def minimum_samples(self) -> int:
        """The shortest input: one frame."""
        return self.n_fft

    @nn.compact
    def __call__(self, wave: Array, train: bool = False) -> Array:
        image = LogMel(self.n_fft, self.hop, self.n_mels, name="logmel")(normalise(wave))
        x = VGG7(self.channels, self.axis_name, name="vgg7")(image[..., None], train)
        x = AttentionPooling(name="pool")(x).transpose(0, 2, 1)  # [B, channels, mel]
        gram = x @ x.transpose(0, 2, 1)
        features = jnp.concatenate([x, gram], axis=2).reshape(x.shape[0], -1)
        return nn.Dense(self.dimensions, name="adv")(features)
