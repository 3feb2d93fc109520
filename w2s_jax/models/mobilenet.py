"""MobileNet students: published trunks over the log-mel image, then the attention pooling of Wav2Small.

The trunks are MobileNetV3 (arXiv 1905.02244, tables 1 and 2) and MobileNetV4-Conv (arXiv 2404.10518, appendix D), each up to
its last 1×1 convolution and without the classifier. Where the papers leave a choice (rounding of channels, padding, epsilon),
it is that of timm 1.0, so that its published weights fit (``w2s_jax.convert``); parameter counts and outputs are tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax
from jax.nn import hard_sigmoid, hard_swish, relu

from w2s_jax.models.frontend import LogMel, normalise
from w2s_jax.models.pooling import AttentionPooling

Activation = Callable[[Array], Array]


class Conv(NamedTuple):
    """Convolution, BatchNorm, activation."""

    kernel: int
    stride: int
    channels: int
    activation: Activation = relu


class Separable(NamedTuple):
    """Depthwise convolution, then projection: MobileNetV3's first bottleneck, whose expansion is 1."""

    kernel: int
    stride: int
    channels: int
    squeeze: bool
    activation: Activation


class Bottleneck(NamedTuple):
    """Expansion, depthwise convolution, squeeze-excite where ``squeeze``, projection: "bneck" in the MobileNetV3 tables.

    ``expansion`` is a multiple of the input channels; where the papers give a size, it is this multiple, rounded.
    """

    kernel: int
    stride: int
    expansion: float
    channels: int
    squeeze: bool
    activation: Activation


class Fused(NamedTuple):
    """Expansion by a full convolution, then projection: "FusedIB" in the MobileNetV4 tables."""

    kernel: int
    stride: int
    expansion: float
    channels: int


class Universal(NamedTuple):
    """MobileNetV4's universal inverted bottleneck; a kernel of 0 is a depthwise convolution that is not there.

    ``before`` and ``middle`` are the tables' "DW K1" and "DW K2", around the expansion: both are ExtraDW, only ``middle`` is
    IB, only ``before`` is ConvNext, none is FFN.
    """

    before: int
    middle: int
    stride: int
    expansion: float
    channels: int


Row = Conv | Separable | Bottleneck | Fused | Universal


@dataclass(frozen=True)
class Architecture:
    """A trunk as the papers tabulate it.

    Attributes:
        stem: the first convolution.
        fixed_stem_below: the stem keeps its channels for width multipliers below this one, as in timm.
        stages: rows by stage. Together with the stem they halve time and mel five times.
    """

    stem: Conv
    fixed_stem_below: float
    stages: tuple[tuple[Row, ...], ...]


V3_SMALL = Architecture(
    stem=Conv(3, 2, 16, hard_swish),
    fixed_stem_below=0.75,
    stages=(
        #          kernel stride channels squeeze activation
        (Separable(3, 2, 16, True, relu),),
        #           kernel stride expansion channels squeeze activation
        (
            Bottleneck(3, 2, 4.5, 24, False, relu),
            Bottleneck(3, 1, 3.67, 24, False, relu),
        ),
        (
            Bottleneck(5, 2, 4, 40, True, hard_swish),
            Bottleneck(5, 1, 6, 40, True, hard_swish),
            Bottleneck(5, 1, 6, 40, True, hard_swish),
        ),
        (
            Bottleneck(5, 1, 3, 48, True, hard_swish),
            Bottleneck(5, 1, 3, 48, True, hard_swish),
        ),
        (
            Bottleneck(5, 2, 6, 96, True, hard_swish),
            Bottleneck(5, 1, 6, 96, True, hard_swish),
            Bottleneck(5, 1, 6, 96, True, hard_swish),
        ),
        (Conv(1, 1, 576, hard_swish),),
    ),
)

V3_LARGE = Architecture(
    stem=Conv(3, 2, 16, hard_swish),
    fixed_stem_below=0.75,
    stages=(
        (Separable(3, 1, 16, False, relu),),
        #           kernel stride expansion channels squeeze activation
        (
            Bottleneck(3, 2, 4, 24, False, relu),
            Bottleneck(3, 1, 3, 24, False, relu),
        ),
        (
            Bottleneck(5, 2, 3, 40, True, relu),
            Bottleneck(5, 1, 3, 40, True, relu),
            Bottleneck(5, 1, 3, 40, True, relu),
        ),
        (
            Bottleneck(3, 2, 6, 80, False, hard_swish),
            Bottleneck(3, 1, 2.5, 80, False, hard_swish),
            Bottleneck(3, 1, 2.3, 80, False, hard_swish),
            Bottleneck(3, 1, 2.3, 80, False, hard_swish),
        ),
        (
            Bottleneck(3, 1, 6, 112, True, hard_swish),
            Bottleneck(3, 1, 6, 112, True, hard_swish),
        ),
        (
            Bottleneck(5, 2, 6, 160, True, hard_swish),
            Bottleneck(5, 1, 6, 160, True, hard_swish),
            Bottleneck(5, 1, 6, 160, True, hard_swish),
        ),
        (Conv(1, 1, 960, hard_swish),),
    ),
)

V4_SMALL = Architecture(
    stem=Conv(3, 2, 32),
    fixed_stem_below=1.0,
    stages=(
        (Conv(3, 2, 32), Conv(1, 1, 32)),
        (Conv(3, 2, 96), Conv(1, 1, 64)),
        #          before middle stride expansion channels
        (
            Universal(5, 5, 2, 3, 96),
            Universal(0, 3, 1, 2, 96),
            Universal(0, 3, 1, 2, 96),
            Universal(0, 3, 1, 2, 96),
            Universal(0, 3, 1, 2, 96),
            Universal(3, 0, 1, 4, 96),
        ),
        (
            Universal(3, 3, 2, 6, 128),
            Universal(5, 5, 1, 4, 128),
            Universal(0, 5, 1, 4, 128),
            Universal(0, 5, 1, 3, 128),
            Universal(0, 3, 1, 4, 128),
            Universal(0, 3, 1, 4, 128),
        ),
        (Conv(1, 1, 960),),
    ),
)

V4_MEDIUM = Architecture(
    stem=Conv(3, 2, 32),
    fixed_stem_below=1.0,
    stages=(
        (Fused(3, 2, 4, 48),),
        #          before middle stride expansion channels
        (
            Universal(3, 5, 2, 4, 80),
            Universal(3, 3, 1, 2, 80),
        ),
        (
            Universal(3, 5, 2, 6, 160),
            Universal(3, 3, 1, 4, 160),
            Universal(3, 3, 1, 4, 160),
            Universal(3, 5, 1, 4, 160),
            Universal(3, 3, 1, 4, 160),
            Universal(3, 0, 1, 4, 160),
            Universal(0, 0, 1, 2, 160),
            Universal(3, 0, 1, 4, 160),
        ),
        (
            Universal(5, 5, 2, 6, 256),
            Universal(5, 5, 1, 4, 256),
            Universal(3, 5, 1, 4, 256),
            Universal(3, 5, 1, 4, 256),
            Universal(0, 0, 1, 4, 256),
            Universal(3, 0, 1, 4, 256),
            Universal(3, 5, 1, 2, 256),
            Universal(5, 5, 1, 4, 256),
            Universal(0, 0, 1, 4, 256),
            Universal(0, 0, 1, 4, 256),
            Universal(5, 0, 1, 2, 256),
        ),
        (Conv(1, 1, 960),),
    ),
)

V4_LARGE = Architecture(
    stem=Conv(3, 2, 24),
    fixed_stem_below=1.0,
    stages=(
        (Fused(3, 2, 4, 48),),
        #          before middle stride expansion channels
        (
            Universal(3, 5, 2, 4, 96),
            Universal(3, 3, 1, 4, 96),
        ),
        (
            Universal(3, 5, 2, 4, 192),
            Universal(3, 3, 1, 4, 192),
            Universal(3, 3, 1, 4, 192),
            Universal(3, 3, 1, 4, 192),
            Universal(3, 5, 1, 4, 192),
            Universal(5, 3, 1, 4, 192),
            Universal(5, 3, 1, 4, 192),
            Universal(5, 3, 1, 4, 192),
            Universal(5, 3, 1, 4, 192),
            Universal(5, 3, 1, 4, 192),
            Universal(3, 0, 1, 4, 192),
        ),
        (
            Universal(5, 5, 2, 4, 512),
            Universal(5, 5, 1, 4, 512),
            Universal(5, 5, 1, 4, 512),
            Universal(5, 5, 1, 4, 512),
            Universal(5, 0, 1, 4, 512),
            Universal(5, 3, 1, 4, 512),
            Universal(5, 0, 1, 4, 512),
            Universal(5, 0, 1, 4, 512),
            Universal(5, 3, 1, 4, 512),
            Universal(5, 5, 1, 4, 512),
            Universal(5, 0, 1, 4, 512),
            Universal(5, 0, 1, 4, 512),
            Universal(5, 0, 1, 4, 512),
        ),
        (Conv(1, 1, 960),),
    ),
)


def rounded(channels: float) -> int:
    """The multiple of 8 nearest to a scaled channel count, at least 8, but never less than nine tenths of it."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


class BatchNorm(nn.Module):
    """BatchNorm of an image [B, time, mel, C] with the parameters and statistics of ``nn.BatchNorm``.

    Momentum and epsilon are PyTorch's defaults, as in timm. The variance is the mean square of what is left after the mean is
    taken off: a log-mel image is around -40 dB, where a mean of squares less a squared mean loses digits. Under a pmap with
    ``axis_name`` the moments are those of the whole global batch.
    """

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        if not train:
            # one factor and one shift per channel: onnxruntime merges them into the convolution before
            factor = scale * lax.rsqrt(running_var.value + 1e-5)
            return x * factor + (bias - running_mean.value * factor)

        mean = self._global_mean(x)
        centred = x - mean
        var = self._global_mean(centred * centred)
        if not self.is_initializing():
            running_mean.value = 0.9 * running_mean.value + 0.1 * mean
            running_var.value = 0.9 * running_var.value + 0.1 * var
        return centred * (scale * lax.rsqrt(var + 1e-5)) + bias

    def _global_mean(self, x: Array) -> Array:
        mean = x.mean(axis=(0, 1, 2))
        if self.axis_name is not None and not self.is_initializing():
            mean = lax.pmean(mean, self.axis_name)
        return mean


class ConvNorm(nn.Module):
    """Convolution without bias, BatchNorm, activation: [B, time, mel, C] → [B, ⌈time/stride⌉, ⌈mel/stride⌉, channels]."""

    channels: int
    kernel: int = 1
    stride: int = 1
    activation: Activation | None = None
    depthwise: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        pad = (self.kernel - 1) // 2  # the same on both ends, as in PyTorch: "SAME" would pad less before than after
        x = nn.Conv(
            self.channels,
            (self.kernel, self.kernel),
            strides=self.stride,
            padding=((pad, pad), (pad, pad)),
            feature_group_count=x.shape[-1] if self.depthwise else 1,
            use_bias=False,
            # He's by fan-out; each output of a depthwise convolution goes to kernel² places, which is its kernel's fan-in
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_in" if self.depthwise else "fan_out", "normal"),
            name="conv",
        )(x)
        x = BatchNorm(self.axis_name, name="norm")(x, train)
        return x if self.activation is None else self.activation(x)


class SqueezeExcite(nn.Module):
    """Each channel of [B, time, mel, C] times a gate in [0, 1] that all channels' means decide."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        gate = x.mean(axis=(1, 2), keepdims=True)
        gate = relu(nn.Conv(rounded(channels / 4), (1, 1), name="reduce")(gate))
        return x * hard_sigmoid(nn.Conv(channels, (1, 1), name="expand")(gate))


class Block(nn.Module):
    """One row of a table: [B, time, mel, C] → [B, ⌈time/stride⌉, ⌈mel/stride⌉, channels]; all but ``Conv`` have a residual."""

    row: Row
    width: float = 1.0
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def layer(name: str, x: Array, channels: int, kernel: int = 1, stride: int = 1, activation=None) -> Array:
            return ConvNorm(channels, kernel, stride, activation, axis_name=self.axis_name, name=name)(x, train)

        def depthwise(name: str, x: Array, kernel: int, stride: int, activation=None) -> Array:
            return ConvNorm(x.shape[-1], kernel, stride, activation, True, self.axis_name, name=name)(x, train)

        row, before = self.row, x
        channels = rounded(row.channels * self.width)
        match row:
            case Conv():
                return layer("conv", x, channels, row.kernel, row.stride, row.activation)
            case Separable():
                x = depthwise("depthwise", x, row.kernel, row.stride, row.activation)
            case Bottleneck():
                x = layer("expand", x, rounded(x.shape[-1] * row.expansion), activation=row.activation)
                x = depthwise("depthwise", x, row.kernel, row.stride, row.activation)
            case Fused():
                x = layer("expand", x, rounded(x.shape[-1] * row.expansion), row.kernel, row.stride, relu)
            case Universal():
                expanded = rounded(x.shape[-1] * row.expansion)
                if row.before:
                    x = depthwise("before", x, row.before, 1 if row.middle else row.stride)
                x = layer("expand", x, expanded, activation=relu)
                if row.middle:
                    x = depthwise("middle", x, row.middle, row.stride, relu)
        if getattr(row, "squeeze", False):
            x = SqueezeExcite(name="squeeze")(x)
        x = layer("project", x, channels)
        return x + before if row.stride == 1 and before.shape[-1] == channels else x


class Trunk(nn.Module):
    """A MobileNet without its head: float32 images [B, time, mel, 1] → [B, ⌈time/32⌉, ⌈mel/32⌉, C].

    C is the last row's count (576 or 960) times ``width``. Any image of at least one frame and one band will do.
    """

    architecture: Architecture
    width: float = 1.0
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        stem, fixed = self.architecture.stem, self.width < self.architecture.fixed_stem_below
        channels = stem.channels if fixed else rounded(stem.channels * self.width)
        x = ConvNorm(channels, stem.kernel, stem.stride, stem.activation, axis_name=self.axis_name, name="stem")(x, train)
        for stage, rows in enumerate(self.architecture.stages):
            for number, row in enumerate(rows):
                x = Block(row, self.width, self.axis_name, name=f"stage{stage}_{number}")(x, train)
        return x


class MobileNetStudent(nn.Module):
    """What the five students share: float32 16 kHz waveforms [B, T], T ≥ n_fft → logits [B, dimensions].

    Normalised per utterance inside the network; log-mel image; trunk; every place of its image [B, t, m, C] is a token of
    the attention pooling; Dense. The outputs are not clipped. A student's class names its table as ``architecture``.
    """

    dimensions: int = 3
    width: float = 1.0
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
        x = Trunk(self.architecture, self.width, self.axis_name, name="trunk")(image[..., None], train)
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        return nn.Dense(self.dimensions, name="adv")(AttentionPooling(name="pool")(tokens))


class MobileNetV3S(MobileNetStudent):
    """MobileNetV3-Small: float32 16 kHz waveforms [B, T] → logits [B, dimensions]; 1,598,237 parameters in all."""

    architecture = V3_SMALL


class MobileNetV3L(MobileNetStudent):
    """MobileNetV3-Large: float32 16 kHz waveforms [B, T] → logits [B, dimensions]; 4,824,749 parameters in all."""

    architecture = V3_LARGE


class MobileNetV4S(MobileNetStudent):
    """MobileNetV4-Conv-S: float32 16 kHz waveforms [B, T] → logits [B, dimensions]; 3,114,173 parameters in all."""

    architecture = V4_SMALL


class MobileNetV4M(MobileNetStudent):
    """MobileNetV4-Conv-M: float32 16 kHz waveforms [B, T] → logits [B, dimensions]; 9,055,661 parameters in all."""

    architecture = V4_MEDIUM


class MobileNetV4L(MobileNetStudent):
    """MobileNetV4-Conv-L: float32 16 kHz waveforms [B, T] → logits [B, dimensions]; 31,931,157 parameters in all."""

    architecture = V4_LARGE
