"""MobileNet students: published trunks over the log-mel image, then the attention pooling of Wav2Small.

The trunks are MobileNetV3 (arXiv 1905.02244, tables 1 and 2) and MobileNetV4-Conv (arXiv 2404.10518, appendix D), each up to
its last 1×1 convolution and without the classifier. Where the papers leave a choice (rounding of channels, padding, epsilon),
it is that of timm 1.0, so that its published weights fit (``w2s_jax.convert``); parameter counts and outputs are tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.nn import hard_sigmoid, hard_swish, relu

from w2s_jax.models import plan
from w2s_jax.models.forms import check_running
from w2s_jax.models.frontend import LogMel, normalise
from w2s_jax.models.norm import BatchNorm
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


def round_channels(channels: float) -> int:
    """The multiple of 8 nearest to a scaled channel count, at least 8, but never less than nine tenths of it."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


class Layer(NamedTuple):
    """A part of a row: a ``ConvNorm`` by its name and fields, or the ``SqueezeExcite`` "squeeze" by its channels."""

    name: str
    channels: int
    kernel: int = 1
    stride: int = 1
    activation: Activation | None = None
    depthwise: bool = False


def list_layers(row: Row, inputs: int, width: float) -> list[Layer]:
    """The parts of a row for so many input channels, in their order; training and the inference plan both follow them."""
    channels, wide = round_channels(row.channels * width), round_channels(inputs * getattr(row, "expansion", 1))
    match row:
        case Conv():
            return [Layer("conv", channels, row.kernel, row.stride, row.activation)]
        case Separable():
            wide = inputs
            layers = [Layer("depthwise", wide, row.kernel, row.stride, row.activation, True)]
        case Bottleneck():
            layers = [
                Layer("expand", wide, activation=row.activation),
                Layer("depthwise", wide, row.kernel, row.stride, row.activation, True),
            ]
        case Fused():
            layers = [Layer("expand", wide, row.kernel, row.stride, relu)]
        case Universal():
            before = Layer("before", inputs, row.before, 1 if row.middle else row.stride, None, True)
            middle = Layer("middle", wide, row.middle, row.stride, relu, True)
            layers = [layer for layer in (before, Layer("expand", wide, activation=relu), middle) if layer.kernel]
    squeeze = [Layer("squeeze", wide)] if getattr(row, "squeeze", False) else []
    return [*layers, *squeeze, Layer("project", channels)]


def has_residual(row: Row, inputs: int, outputs: int) -> bool:
    """Whether a row's input is added to its output."""
    return not isinstance(row, Conv) and row.stride == 1 and inputs == outputs


class Convolution(nn.Module):
    """Convolution without bias, as many zeros on both ends: [B, time, mel, C] → [B, ⌈time/stride⌉, ⌈mel/stride⌉, channels].

    Its kernel is [k, k, C, channels], and [k, k, 1, C] if ``depthwise``. How it is computed depends on the backend: XLA has
    slow convolutions on a CPU, above all their gradients (measured: experiments/README.md).
    """

    channels: int
    kernel: int = 1
    stride: int = 1
    depthwise: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size, stride, inputs = self.kernel, self.stride, x.shape[-1]
        # He's by fan-out; each output of a depthwise convolution goes to kernel² places, which is its kernel's fan-in
        initial = nn.initializers.variance_scaling(2.0, "fan_in" if self.depthwise else "fan_out", "normal")
        kernel = self.param("kernel", initial, (size, size, 1 if self.depthwise else inputs, self.channels), jnp.float32)
        if size == stride == 1:
            return _dense(x, kernel[0, 0].astype(x.dtype))
        if jax.default_backend() == "cpu":
            if self.depthwise:
                return shifted_products(x, kernel, stride)
            patches = jnp.concatenate([part for _, part in _shifts(_pad(x, size), size, stride)], axis=-1)
            return _dense(patches, kernel.reshape(size * size * inputs, self.channels).astype(x.dtype))
        return convolution(x, kernel, stride)


def convolution(x: Array, kernel: Array, stride: int) -> Array:
    """What every form of ``Convolution`` computes, as XLA's own operator: [B, time, mel, C] with [k, k, C or 1, channels]."""
    pad = (len(kernel) - 1) // 2  # not "SAME", which would pad less before than after
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (stride, stride),
        ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )


def _dense(x: Array, kernel: Array) -> Array:
    """[B, time, mel, C] times [C, channels], as one plain matrix product: XLA's CPU backend is slow at those of more axes."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def shifted_products(x: Array, kernel: Array, stride: int) -> Array:
    """The depthwise convolution of [B, time, mel, C] with float32 [k, k, 1, C], as a float32 sum of k² shifted products.

    XLA fuses them into one loop over long rows. On a CPU, its own depthwise convolution costs 20 to 90 times as much
    (measured: experiments/README.md).
    """
    size = len(kernel)
    return sum(kernel[i, j, 0] * part for (i, j), part in _shifts(_pad(x, size), size, stride)).astype(x.dtype)


def _pad(x: Array, size: int) -> Array:
    return jnp.pad(x, ((0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0)))


def _shifts(x: Array, size: int, stride: int) -> Iterator[tuple[tuple[int, int], Array]]:
    """What each place (i, j) of a kernel sees of a padded image [B, time, mel, C]."""
    batch, time, mel, channels = x.shape
    for i in range(size):
        for j in range(size):
            stop = batch, time - size + 1 + i, mel - size + 1 + j, channels
            yield (i, j), lax.slice(x, (0, i, j, 0), stop, (1, stride, stride, 1))


def _shifted_products_forward(x: Array, kernel: Array, stride: int):
    return shifted_products(x, kernel, stride), (x, kernel)


def _shifted_products_backward(stride: int, residuals, g: Array):
    x, kernel = residuals
    size = len(kernel)
    g32 = g.astype(jnp.float32)
    # in two steps: XLA's loops add whole images fast, but not down to a few channels at once; the barrier keeps them apart
    parts = _shifts(_pad(x, size), size, stride)
    sums = [lax.optimization_barrier((g32 * part).sum(axis=0)).sum(axis=(0, 1)) for _, part in parts]
    # for x the same sum with the kernel turned round, over g with zeros where the stride left places out
    low = size // 2
    edges = [(0, 0, 0), *((low, x.shape[a] + low - (g.shape[a] - 1) * stride - 1, stride - 1) for a in (1, 2)), (0, 0, 0)]
    spread = lax.pad(g, jnp.zeros((), g.dtype), edges)
    dx = sum(kernel[size - 1 - i, size - 1 - j, 0] * part for (i, j), part in _shifts(spread, size, 1))
    return dx.astype(x.dtype), jnp.stack(sums).reshape(kernel.shape)


shifted_products.defvjp(_shifted_products_forward, _shifted_products_backward)


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
        x = Convolution(self.channels, self.kernel, self.stride, self.depthwise, name="conv")(x)
        x = BatchNorm(self.activation is relu, self.axis_name, name="norm")(x, train)
        return x if self.activation in (None, relu) else self.activation(x)


class SqueezeExcite(nn.Module):
    """Each channel of [B, time, mel, C] times a gate in [0, 1] that all channels' means decide; the gates are float32."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        gate = x.mean(axis=(1, 2), keepdims=True, dtype=jnp.float32)
        gate = relu(nn.Conv(round_channels(channels / 4), (1, 1), name="reduce")(gate))
        # the product in float32, and so the sums of the gates' gradient
        return (x * hard_sigmoid(nn.Conv(channels, (1, 1), name="expand")(gate))).astype(x.dtype)


class Block(nn.Module):
    """One row of a table: [B, time, mel, C] → [B, ⌈time/stride⌉, ⌈mel/stride⌉, channels]; all but ``Conv`` have a residual."""

    row: Row
    width: float = 1.0
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        before = x
        for layer in list_layers(self.row, x.shape[-1], self.width):
            if layer.name == "squeeze":
                x = SqueezeExcite(name="squeeze")(x)
            else:
                x = ConvNorm(*layer[1:], self.axis_name, name=layer.name)(x, train)
        return x + before if has_residual(self.row, before.shape[-1], x.shape[-1]) else x


def list_rows(architecture: Architecture) -> list[tuple[str, Row]]:
    """The rows of a table below the stem, with the names of their ``Block``s."""
    stages = enumerate(architecture.stages)
    return [(f"stage{number}_{place}", row) for number, stage in stages for place, row in enumerate(stage)]


class Trunk(nn.Module):
    """A MobileNet without its head: images [B, time, mel, 1] → [B, ⌈time/32⌉, ⌈mel/32⌉, C].

    C is the last row's count (576 or 960) times ``width``. Any image of at least one frame and one band will do; its dtype,
    float32 or bfloat16, is that of all activations.
    """

    architecture: Architecture
    width: float = 1.0
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        stem, fixed = self.architecture.stem, self.width < self.architecture.fixed_stem_below
        channels = stem.channels if fixed else round_channels(stem.channels * self.width)
        x = ConvNorm(channels, stem.kernel, stem.stride, stem.activation, axis_name=self.axis_name, name="stem")(x, train)
        for name, row in list_rows(self.architecture):
            x = Block(row, self.width, self.axis_name, name=name)(x, train)
        return x


class MobileNetStudent(nn.Module):
    """What the five students share: float32 16 kHz waveforms [B, T], T ≥ n_fft → logits [B, dimensions].

    Normalised per utterance inside the network; log-mel image; trunk; every place of its image [B, t, m, C] is a token of
    the attention pooling; Dense. The outputs are not clipped. A student's class names its table as ``architecture``. ``dtype``
    is that of the trunk's activations, "float32" or "bfloat16"; parameters, front end, sums and logits are float32 anyway.
    """

    source = "arXiv 2408.13920"

    dimensions: int = 3
    width: float = 1.0
    n_fft: int = 64
    hop: int = 32
    n_mels: int = 26
    axis_name: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_running(self)
        super().__post_init__()

    @property
    def minimum_samples(self) -> int:
        """The shortest input: one frame."""
        return self.n_fft

    @nn.compact
    def __call__(self, wave: Array, train: bool = False) -> Array:
        image = LogMel(self.n_fft, self.hop, self.n_mels, name="logmel")(normalise(wave))
        x = Trunk(self.architecture, self.width, self.axis_name, name="trunk")(image[..., None].astype(self.dtype), train)
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        return nn.Dense(self.dimensions, name="adv")(AttentionPooling(name="pool")(tokens))

    @nn.nowrap
    def fold(self, variables: Mapping) -> plan.Plan:
        """The plan of this student; see ``models.plan``."""
        params, stats = variables["params"]["trunk"], variables["batch_stats"]["trunk"]
        layers = plan.fold_log_mel(self, variables)
        layers.append(_fold_layer(params["stem"], stats["stem"], self.architecture.stem, plan.DECIBEL))
        channels = layers[-1].kernel.shape[0]
        for name, row in list_rows(self.architecture):
            inner = [
                _fold_squeeze(params[name]["squeeze"]) if layer.name == "squeeze"
                else _fold_layer(params[name][layer.name], stats[name][layer.name], layer)
                for layer in list_layers(row, channels, self.width)
            ]  # fmt: skip
            outputs = inner[-1].kernel.shape[0]
            layers += [plan.Residual(tuple(inner))] if has_residual(row, channels, outputs) else inner
            channels = outputs
        pool, adv = variables["params"]["pool"], variables["params"]["adv"]
        layers += [plan.Places(), plan.fold_attention(pool), plan.Dense(adv["kernel"], adv["bias"])]
        return plan.Plan(tuple(layers), self.minimum_samples)


def _fold_layer(params: Mapping, stats: Mapping, layer: Layer | Conv, scale: float = 1.0) -> plan.Convolution:
    activation = {None: None, relu: "relu", hard_swish: "hard_swish"}[layer.activation]
    return plan.fold_convolution(params["conv"]["kernel"], params["norm"], stats["norm"], layer.stride, activation, scale)


def _fold_squeeze(params: Mapping) -> plan.SqueezeExcite:
    reduce, expand = (
        plan.Convolution(params[name]["kernel"].transpose(3, 2, 1, 0), params[name]["bias"], 1, activation)
        for name, activation in (("reduce", "relu"), ("expand", None))
    )
    return plan.SqueezeExcite(reduce, expand)


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
