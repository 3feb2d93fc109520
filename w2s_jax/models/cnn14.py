"""CNN14 of PANNs (Kong et al. 2020, arXiv 1912.10211), the paper's conventional baseline: large and plain."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from w2s_jax.models import plan
from w2s_jax.models.forms import check_running
from w2s_jax.models.frontend import LogMel, normalise
from w2s_jax.models.norm import BatchNorm

#: Convolutions by name, their channels as a multiple of the first ones', and whether an average pool follows.
BLOCKS = [(f"{block + 1}_{layer}", 1 << block, layer == 2 and block < 5) for block in range(6) for layer in (1, 2)]


class CNN14(nn.Module):
    """CNN14: float32 16 kHz waveforms [B, T], T ≥ ``minimum_samples`` → logits [B, dimensions].

    Six blocks of two 3×3 convolutions, an average pool after each of the first five, the mean over mel bands, maximum plus mean
    over time, a dense layer and the output. With 527 outputs it has the 80,753,615 parameters of the published one; 79,679,939
    with three. The front end is that of the published 16 kHz variant, except that utterances are normalised as in every
    student here. Dropout is left out: a student of a teacher's outputs sees new mixtures all the time.
    """

    source = "arXiv 1912.10211"

    dimensions: int = 3
    channels: int = 64
    n_fft: int = 512
    hop: int = 160
    n_mels: int = 64
    axis_name: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_running(self)
        super().__post_init__()

    @property
    def minimum_samples(self) -> int:
        """The shortest input: five pools halve the frames, and one has to be left."""
        return self.n_fft + 31 * self.hop

    @nn.compact
    def __call__(self, wave: Array, train: bool = False) -> Array:
        image = LogMel(self.n_fft, self.hop, self.n_mels, name="logmel")(normalise(wave))
        x = BatchNorm(axis_name=self.axis_name, name="norm")(image[:, :, None], train)  # per mel band
        x = x.swapaxes(2, 3).astype(self.dtype)
        for name, widening, pool in BLOCKS:
            channels = self.channels * widening
            x = nn.Conv(channels, (3, 3), padding=1, use_bias=False, dtype=self.dtype, name=f"conv{name}")(x)
            x = BatchNorm(True, self.axis_name, name=f"norm{name}")(x, train)
            if pool:
                x = nn.avg_pool(x, (2, 2), (2, 2))
        x = x.mean(axis=2, dtype=jnp.float32)
        x = x.max(axis=1) + x.mean(axis=1)
        return nn.Dense(self.dimensions, name="adv")(nn.relu(nn.Dense(x.shape[-1], name="dense")(x)))

    @nn.nowrap
    def fold(self, variables: Mapping) -> plan.Plan:
        """The plan of this student; see ``models.plan``."""
        params, stats = variables["params"], variables["batch_stats"]
        # per mel band, and the zeros of the padding come after it: the first convolution cannot take it over
        scale, shift = plan.fold_batch_norm(params["norm"], stats["norm"])
        layers = [*plan.fold_log_mel(self, variables), plan.Affine(scale * plan.DECIBEL, shift)]
        for name, _, pool in BLOCKS:
            norm = params[f"norm{name}"], stats[f"norm{name}"]
            layers.append(plan.fold_convolution(params[f"conv{name}"]["kernel"], *norm, 1, "relu"))
            layers += [plan.AveragePool()] if pool else []
        dense, adv = params["dense"], params["adv"]
        layers += [plan.PeakPooling(), plan.Dense(dense["kernel"], dense["bias"], "relu")]
        return plan.Plan((*layers, plan.Dense(adv["kernel"], adv["bias"])), self.minimum_samples)
