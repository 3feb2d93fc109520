"""What the kind "c-int8" computes, in numpy, to the last bit: INT8.md as a program.

Every operation on floats is one of float32 (of float64 where samples are measured), rounded, in the order of INT8.md.
"""

from __future__ import annotations

import numpy as np

from w2s_jax.export.c.generate import output_layer
from w2s_jax.export.c.network import BATCH, BLOCK, Network, sizes_of
from w2s_jax.export.c.quantise import Numbers, Rounded
from w2s_jax.models.plan import AttentionPooling

F = np.float32
#: 1.5 · 2^23: a float32 that is added to it is rounded to a whole number, which its lowest bits are then.
SHIFT = F(12_582_912)
LOWEST = F(-1e30)


def predict(
    network: Network, numbers: Numbers, wave: np.ndarray, shift: np.ndarray | float = 0.0, batch: int = BATCH
) -> np.ndarray:
    """Values [D], float32, of float32 [T].

    Args:
        network, numbers: of ``network.take_apart`` and ``quantise.quantise``.
        wave: at least a frame of samples.
        shift: of the outputs, as ``generate.generate_int8`` takes it.
        batch: W2S_BATCH, the tokens that are pooled at once.
    """
    sizes = sizes_of(network)
    tokens = run_trunk(network, numbers, log_mel(network, wave))
    rows = tokens.reshape(len(tokens), sizes["PLACES"], sizes["DEPTH"])
    products = multiply(rows, numbers.head).astype(F) * numbers.head_scale  # exact in float64, rounded here
    attention = isinstance(network.pooling, AttentionPooling)
    pooled = (_attend if attention else _measure)(network, products, batch)
    return _answer(network, pooled, shift)


def log_mel(network: Network, wave: np.ndarray) -> np.ndarray:
    """The natural logarithm of the mel power, float32 [frames, bands]."""
    sizes = sizes_of(network)
    n_fft, hop = sizes["W2S_FFT"], sizes["W2S_HOP"]
    mean, variance = measure(wave, sizes["FRAMES"] * n_fft)
    scale = F(1) / np.sqrt(variance + F(network.normalise.epsilon))
    frames = np.lib.stride_tricks.sliding_window_view(wave, n_fft)[::hop]
    rows = (frames - mean) * scale
    real = _add_up(rows, network.spectrum.real.astype(F))
    first, sines = sizes["FIRST_SINE"], sizes["PARTS_OF_SPECTRUM"] - sizes["BINS"]
    power = real * real
    imaginary = _add_up(rows, network.spectrum.imag[:, first : first + sines].astype(F))
    power[:, first : first + sines] += imaginary * imaginary
    mel = _add_up(power, network.mel.matrix.astype(F))
    return logarithm(np.maximum(mel, F(network.log.floor)))


def measure(wave: np.ndarray, piece: int) -> tuple[np.float32, np.float32]:
    """Mean and variance, of eight sums in float64; what the last piece has beyond a multiple of eight comes before the rest."""
    start = len(wave) // piece * piece
    last = wave[start:]
    tail = last[len(last) - len(last) % 8 :][::-1]
    order = np.concatenate([wave[:start], np.pad(tail, (0, -len(tail) % 8)), last[: len(last) - len(tail)]]).astype(np.float64)
    counts = np.ones(len(order))
    counts[start + len(tail) : start + (8 if len(tail) else 0)] = 0
    centre, sums = 0.0, []
    for power in (1, 2):
        distances = (order - centre) ** power * counts
        parts = np.add.accumulate(distances.reshape(-1, 8), axis=0)[-1]
        sums.append(np.add.accumulate(parts)[-1])
        centre = sums[0] / len(wave)
    return F(sums[0] / len(wave)), F(sums[1] / len(wave))


def run_trunk(network: Network, numbers: Numbers, image: np.ndarray) -> np.ndarray:
    """float32 [frames, bands] → tokens uint8 [tokens, mel, channel]."""
    x = quantise(image * numbers.steps + F(numbers.zero))[:, :, None]
    outside = numbers.zero
    for at, (layer, plain) in enumerate(zip(numbers.layers, network.before + network.after, strict=True)):
        x = convolve(x, layer, plain.stride, outside)
        outside = 0
        if at + 1 == len(network.before):
            x = _pool(x)
    return x


def convolve(x: np.ndarray, layer: Rounded, stride: int, outside: int) -> np.ndarray:
    """uint8 [time, mel, in] → uint8 [time, mel, out]; ``outside`` stands for 0 around the image."""
    size = layer.kernel.shape[2]
    reach = size // 2
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), constant_values=outside)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (0, 1))[::stride, ::stride]  # [.., in, time, mel]
    kernel = layer.kernel.transpose(1, 3, 2, 0).reshape(-1, len(layer.kernel))
    sums = multiply(windows.reshape(*windows.shape[:2], -1), kernel).astype(np.int64) + layer.bias
    return quantise(sums.astype(np.int32).astype(F) * layer.scale)


def multiply(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Products of whole numbers, exact: in float64, which BLAS multiplies."""
    return x.astype(np.float64) @ kernel.astype(np.float64)


def quantise(x: np.ndarray) -> np.ndarray:
    """The nearest whole number from 0 to 255, of two equally near ones the even one."""
    return np.rint(np.minimum(np.maximum(x, F(0)), F(255))).astype(np.uint8)


def exponential(x: np.ndarray) -> np.ndarray:
    """e^x for x <= 0, as basics.c has it."""
    x = np.maximum(x, F(-87))
    shifted = x * F(1.44269504) + SHIFT
    whole = shifted - SHIFT
    rest = x - whole * F(0.693359375) + whole * F(2.12194440e-4)
    total = np.full_like(x, F(1) / F(5040))
    for divisor in (720, 120, 24, 6, 2, 1, 1):
        total = total * rest + F(1) / F(divisor)
    power = ((shifted.view(np.uint32) + np.uint32(127)) << np.uint32(23)).view(F)
    return np.where(x > F(-87), total * power, F(0))


def logarithm(x: np.ndarray) -> np.ndarray:
    """The natural logarithm, as basics.c has it."""
    above = x.view(np.uint32) - np.uint32(0x3F3504F3)
    mantissa = ((above & np.uint32(0x007FFFFF)) + np.uint32(0x3F3504F3)).view(F)
    whole = (above.view(np.int32) >> 23).astype(F)
    part = (mantissa - F(1)) / (mantissa + F(1))
    square = part * part
    total = np.full_like(x, F(2) / F(9))
    for divisor in (7, 5, 3, 1):
        total = total * square + F(2) / F(divisor)
    return whole * F(0.693147181) + total * part


def _add_up(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """A product of float32 matrices, its terms added one after another."""
    total = np.zeros((len(rows), matrix.shape[1]), F)
    for k in range(len(matrix)):
        total += rows[:, k, None] * matrix[k]
    return total


def _pool(x: np.ndarray) -> np.ndarray:
    """Maxima of 3×3 windows, stride 2; there is nothing below the zeros around the image."""
    time, mel = x.shape[:2]
    padded = np.pad(x, ((1, 1 + time % 2), (1, 1 + mel % 2), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (0, 1))[::2, ::2]
    return windows.max(axis=(3, 4))[: (time + 1) // 2, : (mel + 1) // 2]


def _attend(network: Network, products: np.ndarray, batch: int) -> np.ndarray:
    """The means of the values with the weights e^score, float32 [places · features]."""
    features = network.pooling.value.shape[1]
    half = products.shape[2] // 2
    scores, values = (products[:, :, at : at + features].reshape(len(products), -1) for at in (0, half))
    empty = np.full(scores.shape[1], LOWEST), np.zeros(scores.shape[1], F), np.zeros(scores.shape[1], F)
    everything, now = empty, empty
    for count, start in enumerate(range(0, len(scores), batch), start=1):
        now = _add_tokens(*now, scores[start : start + batch], values[start : start + batch])
        if count % (BLOCK // batch) == 0:
            everything, now = _add_block(*everything, *now), empty
    return _add_block(*everything, *now)[2]


def _add_tokens(largest, total, mean, scores, values):
    most = np.maximum(largest, scores.max(axis=0))
    total, change = total * exponential(largest - most), np.zeros_like(mean)
    for score, value in zip(scores, values, strict=True):
        weight = exponential(score - most)
        total = total + weight
        change = change + weight * (value - mean)
    return most, total, mean + change / total


def _add_block(largest, total, mean, own_largest, own_total, own_mean):
    weight = np.where(own_total > 0, own_largest + logarithm(np.maximum(own_total, F(1e-30))), LOWEST)
    most = np.maximum(largest, weight)
    own, more = total * exponential(largest - most), exponential(weight - most)
    return most, own + more, mean + (own_mean - mean) * (more / (own + more))


def _measure(network: Network, products: np.ndarray, batch: int) -> np.ndarray:
    """Mean, and with the deviation that, of the values, float32 [places · features], one behind the other."""
    channels = sizes_of(network)["FEATURES"]
    values = products[:, :, :channels].reshape(len(products), -1)
    empty = F(0), np.zeros(values.shape[1], F), np.zeros(values.shape[1], F)
    everything, now = empty, empty
    for number, value in enumerate(values, start=1):
        count, mean, squares = now
        count = count + F(1)
        distance = value - mean
        mean = mean + distance * (F(1) / count)
        now = count, mean, squares + distance * (value - mean)
        if number % (BLOCK // batch * batch) == 0:
            everything, now = _add_moments(*everything, *now), empty
    count, mean, squares = _add_moments(*everything, *now)
    if not network.pooling.deviation:
        return mean
    return np.concatenate([mean, np.sqrt(squares / count + F(network.pooling.epsilon))])


def _add_moments(count, mean, squares, own_count, own_mean, own_squares):
    both = count + own_count
    share = own_count / both
    distance = own_mean - mean
    squares = squares + (own_squares + distance * distance * share * count)
    return both, mean + distance * share, squares


def _answer(network: Network, pooled: np.ndarray, shift: np.ndarray | float) -> np.ndarray:
    """The output layer: values [D]."""
    arrays, sizes = output_layer(network), sizes_of(network)
    if network.gram:
        features = sizes["FEATURES"]
        places = pooled.reshape(sizes["PLACES"], features) + arrays["pooled_bias"].astype(F)
        gram = np.zeros((features, features), F)
        for row in places:
            gram += row[:, None] * row
        pooled = np.concatenate([places.ravel(), gram.ravel()])
    total = arrays["output_bias"].astype(F) + np.asarray(shift, F)
    for weight, value in zip(arrays["output_kernel"].astype(F).T, pooled, strict=True):
        total = total + value * weight
    return total
