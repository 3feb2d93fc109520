"""Plans of the Wav2Small family, taken apart, and their sizes as the C code names them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from w2s_jax.errors import UsageError
from w2s_jax.export.plan import merge
from w2s_jax.models.plan import (
    AttentionPooling,
    Convolution,
    Dense,
    Gram,
    Log,
    MaxPool,
    Mel,
    MomentPooling,
    Normalise,
    Plan,
    Spectrum,
    Tokens,
)

#: Columns of a matrix that lie together; PANEL in basics.c.
PANEL = 16
#: Columns that a convolution writes at once, tokens that are multiplied at once in a whole recording, and tokens of a block.
GROUP, BATCH, BLOCK = 4, 12, 252


@dataclass(frozen=True)
class Network:
    """A plan of the Wav2Small family, taken apart."""

    normalise: Normalise
    spectrum: Spectrum
    mel: Mel
    log: Log
    before: list[Convolution]
    after: list[Convolution]
    mix: Convolution | None
    pooling: AttentionPooling | MomentPooling
    gram: bool
    output: Dense


def take_apart(plan: Plan) -> Network:
    """The layers of a plan of the Wav2Small family.

    Args:
        plan: as ``plan.fold`` gives it.

    Raises:
        UsageError: another network; names what C has no code for.
    """
    match plan.layers[:4]:
        case [Normalise() as normalise, Spectrum(imag=np.ndarray()) as spectrum, Mel() as mel, Log() as log]:
            rest = list(merge(plan).layers[4:])
        case _:
            raise UsageError("C has no code for a front end that is not a log-mel spectrum of the normalised waveform")
    trunk: list[list[Convolution]] = [[]]
    while rest and (isinstance(rest[0], MaxPool) or isinstance(rest[0], Convolution) and rest[0].activation == "relu"):
        layer = rest.pop(0)
        if isinstance(layer, MaxPool):
            trunk.append([])
        else:
            trunk[-1].append(layer)
    mix = rest.pop(0) if rest and isinstance(rest[0], Convolution) and rest[0].activation is None else None
    match rest:
        case [Tokens(), AttentionPooling(bias=None) as pooling, Dense(activation=None) as output] if mix is None:
            gram = False
        case [Tokens(), MomentPooling() as pooling, Dense(activation=None) as output] if mix is not None:
            gram = False
        case [AttentionPooling() as pooling, Gram(), Dense(activation=None) as output] if mix is None:
            gram = True
        case _:
            names = ", ".join(type(layer).__name__ for layer in rest[:4])
            raise UsageError(f"C has no code for a network that goes on with {names} behind its convolutions")
    if len(trunk) != 2 or not trunk[0]:
        raise UsageError(f"C has code for convolutions with one max pool among them, got {len(trunk) - 1} max pools")
    first, *others = trunk[0] + trunk[1]
    channels, _, *sizes = first.kernel.shape
    if first.kernel.shape[1] != 1 or any(
        layer.kernel.shape != (channels, channels, *sizes) or layer.stride > 1 for layer in others
    ):
        raise UsageError(
            "C has code for convolutions with as many channels each, of one size, of which the first may have a stride"
        )
    return Network(normalise, spectrum, mel, log, *trunk, mix, pooling, gram, output)


def sizes_of(network: Network) -> dict[str, int]:
    """The sizes of a network: macros of the C code."""
    n_fft, bins = network.spectrum.real.shape
    bands, hop = network.mel.matrix.shape[1], network.spectrum.hop
    channels, _, kernel, _ = network.before[0].kernel.shape
    stride, reach = network.before[0].stride, kernel // 2
    mels = -(-bands // stride)
    mels_after = (mels + 1) // 2
    lag_of_image = -(-(reach + 1) // stride) - 1
    lag_of_pool = -(-(lag_of_image + (len(network.before) - 1) * reach) // 2)
    attention = isinstance(network.pooling, AttentionPooling)
    places = mels_after if network.gram or not attention else 1
    frames = 2 * GROUP * stride
    first_sine, sines = _find_sines(network.spectrum)
    return {
        "W2S_FFT": n_fft,
        "W2S_HOP": hop,
        "W2S_KERNEL": kernel,
        "W2S_TAPS": kernel,
        "W2S_ATTENTION": int(attention),
        "W2S_GRAM": int(network.gram),
        "W2S_DEVIATION": int(not attention and network.pooling.deviation),
        "BINS": bins,
        "FIRST_SINE": first_sine,
        "PARTS_OF_SPECTRUM": bins + sines,
        "BANDS": bands,
        "STRIDE": stride,
        "CHANNELS": channels,
        "MELS": mels,
        "MELS_AFTER": mels_after,
        "BEFORE": len(network.before),
        "AFTER": len(network.after),
        "REACH": reach,
        "GROUP": GROUP,
        "FRAMES": frames,
        "SAMPLES": frames * hop + max(0, n_fft - hop),
        "LAG_OF_IMAGE": lag_of_image,
        "KEPT_OF_IMAGE": stride * lag_of_image + reach,
        "LAG_OF_POOL": lag_of_pool,
        "LAG": lag_of_pool + len(network.after) * reach,
        "TOKEN": mels_after * channels,
        "PLACES": places,
        "DEPTH": mels_after * channels // places,
        "FEATURES": network.pooling.value.shape[1] if attention else channels,
        "PARTS": 2 if attention else 1,
        "OUTPUT_DEPTH": len(network.output.kernel),
        "TOKENS_OF_BLOCK": BLOCK,
    }


def _find_sines(spectrum: Spectrum) -> tuple[int, int]:
    """The first bin whose imaginary part is not always zero, and how many bins there are to the last such one."""
    used = np.flatnonzero(np.abs(spectrum.imag).max(axis=0) > 1e-9)
    return (int(used[0]), int(used[-1] - used[0] + 1)) if len(used) else (0, 0)


def head_matrix(network: Network) -> np.ndarray:
    """What tokens are multiplied by, [DEPTH, PARTS · FILLED(FEATURES)]: scores, then values."""
    pooling, sizes = network.pooling, sizes_of(network)
    if isinstance(pooling, MomentPooling):
        parts = [network.mix.kernel[:, :, 0, 0].T]
    else:
        parts = [pooling.score, pooling.value]
        if not network.gram:  # tokens are ordered (channel, mel), and here (mel, channel)
            order = np.arange(sizes["TOKEN"]).reshape(sizes["CHANNELS"], -1).T.ravel()
            parts = [part[order] for part in parts]
    fill = -sizes["FEATURES"] % PANEL
    return np.concatenate([np.pad(part, ((0, 0), (0, fill))) for part in parts], axis=1)
