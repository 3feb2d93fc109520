"""Wav2Small, the 72K-parameter student of arXiv 2408.13920, and its later 17K variant.

Sizes and layer order follow the paper's public text and audEERING's public model cards; parameter counts are tests. Every size
is a field: the defaults are the published networks, other values are for the search after better ones, as in
experiments/variants.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from w2s_jax.errors import UsageError
from w2s_jax.models import native, plan
from w2s_jax.models.forms import Dense, FormedConvolution, check_running, trains_natively
from w2s_jax.models.frontend import LogMel, jitter, normalise
from w2s_jax.models.norm import EPSILON, BatchNorm, update_running_stats
from w2s_jax.models.pooling import POOLINGS, AttentionPooling, fold_pooling, max_pool


def _check(module: nn.Module) -> None:
    """Refuse fields of the trunk that make no network."""
    for name, least in (("channels", 1), ("before", 1), ("after", 0), ("kernel", 1), ("stride", 1)):
        value = getattr(module, name)
        if not isinstance(value, int) or value < least:
            raise UsageError(f"{name} is {value!r}; expected a whole number of at least {least}")
    if module.kernel % 2 == 0:
        raise UsageError(f"kernel is {module.kernel}; expected an odd number, which has a middle")
    check_running(module)


class Block(NamedTuple):
    """A row of the trunk's table: a ``ConvBlock`` by its name, and whether the max pool follows it."""

    name: str
    stride: int
    pool: bool


def list_blocks(before: int, after: int, stride: int) -> list[Block]:
    """The trunk as a table, which training in Flax, training by the compiled kernel and the inference plan all follow."""
    return [
        Block(f"l{layer}", stride if layer == 1 else 1, layer == before) for layer in range(1, before + after + 1)
    ]  # fmt: skip


class ConvBlock(nn.Module):
    """Convolution without bias, BatchNorm, ReLU: [B, time, mel, C] → [B, ⌈time/stride⌉, ⌈mel/stride⌉, channels]."""

    channels: int
    kernel: int = 3
    stride: int = 1
    axis_name: str | None = None
    form: str = "auto"

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = FormedConvolution(self.channels, self.kernel, self.stride, self.form, name="conv")(x)
        return BatchNorm(True, self.axis_name, name="norm")(x, train)


class VGG(nn.Module):
    """Convolution blocks l1, l2, … with one 3×3 stride-2 max pool among them: [B, time, mel, 1] → [B, t, m, channels].

    t is ⌈⌈time/stride⌉/2⌉, and m likewise. The published trunk is the default, seven blocks of which three are before the pool.

    Attributes:
        channels: of every block.
        before: blocks before the pool, at least 1.
        after: blocks behind it, at least 0.
        kernel: odd size of the blocks' convolutions.
        stride: of the first convolution, over time and mel alike.
        axis_name: the axis of the devices that share one global batch (of ``shard_map`` or ``pmap``), for BatchNorm.
        form: of the 3×3 convolutions, one of ``forms.CHOICES``; another form is another way to the same results. On CPUs "auto"
            trains with the compiled kernel of ``native`` where that is available.
    """

    channels: int = 13
    before: int = 3
    after: int = 4
    kernel: int = 3
    stride: int = 1
    axis_name: str | None = None
    form: str = "auto"

    def __post_init__(self) -> None:
        _check(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        way = self.form, self.kernel, self.stride, x.dtype, self.axis_name
        if train and not self.is_initializing() and trains_natively(*way):
            return self._train_natively(x)
        for block in list_blocks(self.before, self.after, self.stride):
            x = ConvBlock(self.channels, self.kernel, block.stride, self.axis_name, self.form, name=block.name)(x, train)
            if block.pool:
                x = max_pool(x)
        return x

    def _train_natively(self, x: Array) -> Array:
        """The whole trunk by the compiled kernel, with the parameters and running statistics of the blocks."""
        table = list_blocks(self.before, self.after, self.stride)
        params = [self.variables["params"][block.name] for block in table]
        kernels = [block["conv"]["kernel"] for block in params]
        gammas, betas = ([block["norm"][key] for block in params] for key in ("scale", "bias"))
        before_pool = 1 + [block.pool for block in table].index(True)
        x, means, variances = native.trunk(x, kernels, gammas, betas, before_pool, self.axis_name, EPSILON)
        for block, mean, variance in zip(table, means, variances, strict=True):
            running = self.variables["batch_stats"][block.name]["norm"]
            self.put_variable("batch_stats", block.name, {"norm": update_running_stats(running, mean, variance)})
        return x


class Wav2SmallStudent(nn.Module):
    """What both students share: front end and trunk.

    ``before``, ``after``, ``kernel``, ``stride`` and ``form`` are those of ``VGG``. ``dtype`` is that of the activations from
    the trunk's input to the pooling, "float32" or "bfloat16"; parameters, front end, sums and logits are float32 anyway.
    """

    source = "arXiv 2408.13920"

    dimensions: int = 3
    channels: int = 13
    n_fft: int = 64
    hop: int = 32
    n_mels: int = 26
    before: int = 3
    after: int = 4
    kernel: int = 3
    stride: int = 1
    axis_name: str | None = None
    form: str = "auto"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _check(self)  # here too, so that ``build`` refuses before anything is traced
        super().__post_init__()

    @property
    def minimum_samples(self) -> int:
        """The shortest input: one frame."""
        return self.n_fft

    @nn.nowrap
    def features(self, wave: Array, train: bool) -> Array:
        """Waveforms [B, T] → the trunk's image [B, time, mel, channels]; only to be called in ``__call__``."""
        wave = normalise(wave)
        if train and self.has_variable("jitter", "key"):
            wave = jitter(wave, *(self.get_variable("jitter", name) for name in ("key", "deviation")))
        image = LogMel(self.n_fft, self.hop, self.n_mels, name="logmel")(wave)
        sizes = (self.channels, self.before, self.after, self.kernel, self.stride)
        return VGG(*sizes, self.axis_name, self.form, name="vgg7")(image[..., None].astype(self.dtype), train)

    @nn.nowrap
    def fold_features(self, variables: Mapping) -> list[plan.Layer]:
        """``features`` as layers of a plan."""
        layers, scale = plan.fold_log_mel(self, variables), plan.DECIBEL
        params, stats = variables["params"]["vgg7"], variables["batch_stats"]["vgg7"]
        for name, stride, pool in list_blocks(self.before, self.after, self.stride):
            norm = params[name]["norm"], stats[name]["norm"]
            layers.append(plan.fold_convolution(params[name]["conv"]["kernel"], *norm, stride, "relu", scale))
            layers += [plan.MaxPool()] if pool else []
            scale = 1.0
        return layers


class Wav2Small(Wav2SmallStudent):
    """Wav2Small 72K: float32 16 kHz waveforms [B, T], T ≥ n_fft → logits [B, dimensions].

    67,577 trained parameters and 5,082 fixed ones in the front end. Each utterance is normalised inside the network, so
    the level of a recording does not matter. The outputs are not clipped.

    ``pooling`` over time is "attention" as published, "mean", or "statistics" (mean and standard deviation).
    """

    pooling: str = "attention"

    def __post_init__(self) -> None:
        if self.pooling not in (known := ("attention", *POOLINGS)):
            raise UsageError(f"pooling is {self.pooling!r}; expected one of {', '.join(known)}")
        super().__post_init__()

    @nn.compact
    def __call__(self, wave: Array, train: bool = False) -> Array:
        x = Dense(self.channels, axes=2, name="mix")(self.features(wave, train)).astype(self.dtype)
        batch, time, mel, channels = x.shape
        # features are ordered (channel, mel), as in the PyTorch original, so that weights carry over unchanged
        tokens = x.transpose(0, 1, 3, 2).reshape(batch, time, channels * mel)
        pool = AttentionPooling(name="pool") if self.pooling == "attention" else POOLINGS[self.pooling][0]
        return nn.Dense(self.dimensions, name="adv")(pool(tokens))

    @nn.nowrap
    def fold(self, variables: Mapping) -> plan.Plan:
        """The plan of this student; see ``models.plan``."""
        params = variables["params"]
        mix, adv = params["mix"], params["adv"]
        layers = [
            *self.fold_features(variables),
            plan.Convolution(mix["kernel"].transpose(3, 2, 1, 0), mix["bias"]),
            plan.Tokens(),
            fold_pooling(self.pooling, params),
            plan.Dense(adv["kernel"], adv["bias"]),
        ]
        return plan.Plan(tuple(layers), self.minimum_samples)


class Wav2Small17K(Wav2SmallStudent):
    """Wav2Small 2.0, 17K: float32 16 kHz waveforms [B, T], T ≥ n_fft → logits [B, dimensions].

    The same trunk; attention pooling keeps a matrix X (channels × mel), and the output layer sees [X, X·Xᵀ]. 10,806 trained
    parameters and 5,082 fixed ones with three dimensions.
    """

    @nn.compact
    def __call__(self, wave: Array, train: bool = False) -> Array:
        x = AttentionPooling(name="pool")(self.features(wave, train)).transpose(0, 2, 1)  # [B, channels, mel]
        gram = x @ x.transpose(0, 2, 1)
        features = jnp.concatenate([x, gram], axis=2).reshape(x.shape[0], -1)
        return nn.Dense(self.dimensions, name="adv")(features)

    @nn.nowrap
    def fold(self, variables: Mapping) -> plan.Plan:
        """The plan of this student; see ``models.plan``."""
        pool, adv = variables["params"]["pool"], variables["params"]["adv"]
        layers = *self.fold_features(variables), plan.fold_attention(pool), plan.Gram(), plan.Dense(adv["kernel"], adv["bias"])
        return plan.Plan(layers, self.minimum_samples)
