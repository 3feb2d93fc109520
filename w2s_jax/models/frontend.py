"""Waveform to log-mel image without an FFT operator, so that the whole network exports as convolutions and matmuls."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from w2s_jax import NORM_EPSILON, SAMPLING_RATE

#: Front ends of published students, as fields of every student: ``build("mobilenet_v4_s", **PRESETS["144/72"])``. 64/32 is
#: Wav2Small's; 144/72 is that of audEERING's MobileNetV4 student, which takes less than half the frames (its number of bands is
#: not public).
PRESETS = {
    "64/32": {"n_fft": 64, "hop": 32, "n_mels": 26},
    "144/72": {"n_fft": 144, "hop": 72, "n_mels": 26},
}
#: Floor of the mel power before the logarithm; -100 dB.
MEL_FLOOR = 1e-10
#: Samples that tell waveforms apart, for ``jitter``.
RECOGNISED = 64
#: Accelerators would round the factors of float32 products to 8 or 11 bits, and a spectrum spans more than that.
EXACT = lax.Precision.HIGHEST


def normalise(wave: Array) -> Array:
    """Each utterance to zero mean and unit variance: float32 [B, T] → [B, T]. Silence stays zero."""
    wave = wave - wave.mean(axis=1, keepdims=True)
    return wave / jnp.sqrt(jnp.mean(wave * wave, axis=1, keepdims=True) + NORM_EPSILON)


def jitter(wave: Array, key: Array, deviation: Array) -> Array:
    """Give normalised waveforms [B, T] a random level and offset each, as if their moments had been measured elsewhere.

    A running stream measures them on all that came before. The draw is a function of the key and of the waveform, so that it is
    the same on any number of devices.

    Args:
        wave: as ``normalise`` gives them.
        key: of jax.random, its data.
        deviation: of the level's natural logarithm, and of the offset in deviations of the waveform.
    """
    bits = lax.bitcast_convert_type(wave[:, : 2 * RECOGNISED : 2], jnp.uint32)
    marks = lax.reduce(bits, jnp.uint32(0), lax.bitwise_xor, (1,))
    keys = jax.vmap(lambda mark: jax.random.fold_in(jax.random.wrap_key_data(key), mark))(marks)
    level, offset = deviation * jax.vmap(lambda one: jax.random.normal(one, (2,)))(keys).T
    return wave * jnp.exp(level)[:, None] + offset[:, None]


def fourier_kernels(n_fft: int) -> tuple[np.ndarray, np.ndarray]:
    """Real and imaginary Fourier kernels under a periodic Hann window, each float32 [n_fft, n_fft // 2 + 1]."""
    samples, bins = np.arange(n_fft), np.arange(n_fft // 2 + 1)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * samples / n_fft)
    angle = 2 * np.pi * np.outer(samples, bins) / n_fft
    return (
        (window[:, None] * np.cos(angle)).astype(np.float32),
        (-window[:, None] * np.sin(angle)).astype(np.float32),
    )


def mel_matrix(n_fft: int, n_mels: int, sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
    """Librosa's default (Slaney) mel filter bank from 0 Hz to half the sampling rate, float32 [n_fft // 2 + 1, n_mels]."""
    return _librosa_filters().mel(sr=sampling_rate, n_fft=n_fft, n_mels=n_mels).T.astype(np.float32)


def _librosa_filters():
    """``librosa.filters``, on a machine where nothing can be written too.

    Numba keeps what it compiles beside librosa or below the home, and librosa cannot be imported where both are read-only.
    Then numba must not compile, which the filter bank does not need.
    """
    import numba

    try:
        from librosa import filters
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        before, numba.config.DISABLE_JIT = numba.config.DISABLE_JIT, True
        try:
            from librosa import filters
        finally:
            numba.config.DISABLE_JIT = before
    return filters


class LogMel(nn.Module):
    """Log-mel power image in dB of an already normalised waveform: float32 [B, T] → [B, frames, n_mels].

    The short-time Fourier transform is a strided convolution without centre padding: ``frames = 1 + (T - n_fft) // hop``.
    Kernels and filter bank are fixed; they live in the collection ``frontend`` so that counts and files can tell them from
    what is trained.
    """

    n_fft: int = 64
    hop: int = 32
    n_mels: int = 26

    @nn.compact
    def __call__(self, wave: Array) -> Array:
        real = self.variable("frontend", "real", lambda: jnp.asarray(fourier_kernels(self.n_fft)[0])).value
        imag = self.variable("frontend", "imag", lambda: jnp.asarray(fourier_kernels(self.n_fft)[1])).value
        mel = self.variable("frontend", "mel", lambda: jnp.asarray(mel_matrix(self.n_fft, self.n_mels))).value
        kernels = jnp.concatenate([real, imag], axis=1)[:, None, :]  # one convolution for both parts
        spectrum = lax.conv_general_dilated(
            wave[:, :, None], kernels, (self.hop,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), precision=EXACT
        )
        bins = self.n_fft // 2 + 1
        power = spectrum[..., :bins] ** 2 + spectrum[..., bins:] ** 2
        return 10.0 * jnp.log10(jnp.maximum(jnp.matmul(power, mel, precision=EXACT), MEL_FLOOR))
