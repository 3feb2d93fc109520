"""The second teacher of the paper: WavLM-large with attentive statistics pooling (Chen et al. 2022, Goncalves et al. 2024).

transformers has no WavLM in Flax. What it shares with wav2vec2 (convolutions, projection, positional convolution,
feed-forward) is Hugging Face's; the attention with its gated relative position bias, the encoder around it, pooling and head
are here.
"""

from __future__ import annotations

import math
import os

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from transformers import WavLMConfig
from transformers.models.wav2vec2.modeling_flax_wav2vec2 import (
    FlaxWav2Vec2FeatureEncoder,
    FlaxWav2Vec2FeatureProjection,
    FlaxWav2Vec2FeedForward,
    FlaxWav2Vec2PositionalConvEmbedding,
)

from w2s_jax import DIMENSIONS
from w2s_jax.errors import UsageError
from w2s_jax.teachers import weights
from w2s_jax.teachers.neural import BUILD, NeuralTeacher, frames, valid

REPOSITORY = "3loi/SER-Odyssey-Baseline-WavLM-Multi-Attributes"
LICENCE = f"MIT ({REPOSITORY})"
PARAMETERS = 318_607_043
NORMALISATIONS = ("official", "paper")

#: The geometry of microsoft/wavlm-large, which the published config.json does not repeat; one that does say, is believed.
LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "conv_dim": (512,) * 7,
    "conv_kernel": (10, 3, 3, 3, 3, 2, 2),
    "conv_stride": (5, 2, 2, 2, 2, 2, 2),
    "conv_bias": False,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "num_buckets": 320,
    "max_bucket_distance": 800,
    **BUILD,
}


def buckets(length: int, count: int, max_distance: int) -> np.ndarray:
    """The bucket of each (query, key) pair: int32 [length, length] in 0..count − 1.

    Half of the buckets are for keys after the query; of each half, half are single distances and the rest grow
    logarithmically up to ``max_distance`` (as in T5, Raffel et al. 2020).
    """
    half, exact = count // 2, count // 4
    distance = np.arange(length)
    far = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    far = np.minimum((exact + far * np.float32(half - exact)).astype(np.int64), half - 1)
    single = np.where(distance < exact, distance, far)  # of the distances, before the direction is told apart
    relative = distance[None, :] - distance[:, None]
    return (single[np.abs(relative)] + half * (relative > 0)).astype(np.int32)


class GatedAttention(nn.Module):
    """Self-attention whose scores get a relative position bias, gated by the query; [B, frames, H] → the same.

    ``gate = a · (b · const − 1) + 2`` with ``a, b = sigmoid(…)`` of each head's part of the input (Chen et al. 2022, eq. 3).
    """

    config: WavLMConfig
    owns_bias: bool
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        config = self.config
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Dense(config.hidden_size, dtype=self.dtype) for _ in range(4)
        )
        self.gru_rel_pos_linear = nn.Dense(8)
        self.gru_rel_pos_const = self.param(
            "gru_rel_pos_const", nn.initializers.ones, (1, config.num_attention_heads, 1, 1), jnp.float32
        )
        if self.owns_bias:
            self.rel_attn_embed = nn.Embed(config.num_buckets, config.num_attention_heads)

    def bias(self, length: int) -> Array:
        """The position bias that all layers share, float32 [heads, length, length]."""
        config = self.config
        return self.rel_attn_embed(buckets(length, config.num_buckets, config.max_bucket_distance)).transpose(2, 0, 1)

    def __call__(self, x: Array, bias: Array, mask: Array | None) -> Array:
        heads = x.reshape(*x.shape[:2], self.config.num_attention_heads, -1)
        gates = self.gru_rel_pos_linear(heads.astype(jnp.float32)).reshape(*heads.shape[:3], 2, 4).sum(axis=-1)
        a, b = nn.sigmoid(gates).transpose(3, 0, 2, 1)[..., None]  # each [B, heads, frames, 1]
        gated = (a * (b * self.gru_rel_pos_const - 1.0) + 2.0) * bias
        query, key, value = (projection(x).reshape(heads.shape) for projection in (self.q_proj, self.k_proj, self.v_proj))
        query = query * np.asarray(1 / math.sqrt(heads.shape[-1]), self.dtype)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) + gated
        if mask is not None:
            scores = jnp.where(mask[:, None, None, :], scores, -jnp.inf)
        attended = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores).astype(self.dtype), value)
        return self.out_proj(attended.reshape(x.shape))


class Layer(nn.Module):
    """One Transformer layer with the norms in front, [B, frames, H] → the same."""

    config: WavLMConfig
    owns_bias: bool
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.attention = GatedAttention(self.config, self.owns_bias, self.dtype)
        self.layer_norm = nn.LayerNorm(self.config.layer_norm_eps, dtype=self.dtype)
        self.feed_forward = FlaxWav2Vec2FeedForward(self.config, dtype=self.dtype)
        self.final_layer_norm = nn.LayerNorm(self.config.layer_norm_eps, dtype=self.dtype)

    def __call__(self, x: Array, bias: Array, mask: Array | None) -> Array:
        x = x + self.attention(self.layer_norm(x), bias, mask)
        return x + self.feed_forward(self.final_layer_norm(x))


class Layers(nn.Module):
    """The stack of layers, named by their numbers as in the checkpoint."""

    config: WavLMConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.layers = [
            Layer(self.config, number == 0, self.dtype, name=str(number)) for number in range(self.config.num_hidden_layers)
        ]

    def __call__(self, x: Array, mask: Array | None) -> Array:
        bias = self.layers[0].attention.bias(x.shape[1])
        for layer in self.layers:
            x = layer(x, bias, mask)
        return x


class Encoder(nn.Module):
    """Positional convolution, layers, norm; [B, frames, H] → the same."""

    config: WavLMConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.pos_conv_embed = FlaxWav2Vec2PositionalConvEmbedding(self.config, dtype=self.dtype)
        self.layers = Layers(self.config, self.dtype)
        self.layer_norm = nn.LayerNorm(self.config.layer_norm_eps, dtype=self.dtype)

    def __call__(self, x: Array, mask: Array | None) -> Array:
        if mask is not None:
            x = jnp.where(mask[:, :, None], x, 0)  # what the convolution would find beyond the end of a shorter wave
        return self.layer_norm(self.layers(x + self.pos_conv_embed(x), mask))


class WavLMTrunk(nn.Module):
    """WavLM (stable layer norm variant): waveform [B, T] → hidden states [B, frames, H]."""

    config: WavLMConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.feature_extractor = FlaxWav2Vec2FeatureEncoder(self.config, dtype=self.dtype)
        self.feature_projection = FlaxWav2Vec2FeatureProjection(self.config, dtype=self.dtype)
        self.encoder = Encoder(self.config, self.dtype)
        # only pre-training uses it; it is part of the checkpoint
        self.masked_spec_embed = self.param(
            "masked_spec_embed", nn.initializers.uniform(), (self.config.hidden_size,), jnp.float32
        )

    def __call__(self, waves: Array, lengths: Array | None = None) -> Array:
        features = self.feature_projection(self.feature_extractor(waves))[0]
        mask = None if lengths is None else valid(frames(lengths, self.config), features.shape[1])
        return self.encoder(features, mask)


class AttentiveStatistics(nn.Module):
    """Mean and standard deviation over time with learned weights (Okabe et al. 2018): [B, frames, H] → [B, 2 H]."""

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Array:
        size = x.shape[-1]
        attention = self.param("attention", nn.initializers.normal(1.0), (size, 1), jnp.float32)
        logits = nn.tanh(nn.Dense(size, name="sap_linear")(x)) @ attention
        weight = nn.softmax(logits, axis=1, where=None if mask is None else mask[:, :, None])
        mean = jnp.sum(weight * x, axis=1)
        variance = jnp.sum(weight * x**2, axis=1) - mean**2
        return jnp.concatenate([mean, jnp.sqrt(jnp.maximum(variance, 1e-5))], axis=-1)


class Head(nn.Module):
    """Dense, norm, ReLU, dense: [B, 2 H] → [B, outputs]; the names are the checkpoint's."""

    size: int
    outputs: int

    @nn.compact
    def __call__(self, pooled: Array) -> Array:
        hidden = nn.relu(nn.LayerNorm(1e-5, name="fc.0.1")(nn.Dense(self.size, name="fc.0.0")(pooled)))
        return nn.Dense(self.outputs, name="out.0")(hidden)


class WavLM(nn.Module):
    """WavLM, attentive statistics pooling and a regression head.

    Attributes:
        config: a WavLMConfig.
        mean, std: of the training corpus's samples, from config.json.
        normalisation: "official" is (x − mean) / (std + 1e-6), as the repository has it; "paper" is (x + mean) / std, as the
            authors of Wav2Small computed their labels.
        dtype: what the Transformer computes in; normalisation, gates, softmax, pooling and head are float32.
    """

    config: WavLMConfig
    mean: float
    std: float
    normalisation: str = "official"
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.ssl_model = WavLMTrunk(self.config, self.dtype)
        self.pool_model = AttentiveStatistics()
        self.ser_model = Head(self.config.hidden_size, len(DIMENSIONS))

    def hidden(self, waves: Array, lengths: Array | None = None) -> Array:
        """Last hidden states: float32 [B, T] (of which ``lengths`` int [B] count) → [B, frames, H]."""
        official = self.normalisation == "official"
        normalised = (waves - self.mean) / (self.std + 1e-6) if official else (waves + self.mean) / self.std
        return self.ssl_model(normalised, lengths)

    def __call__(self, waves: Array, lengths: Array | None = None) -> Array:
        """float32 [B, T] at 16 kHz (of which ``lengths`` int [B] count) → float32 [B, 3]."""
        hidden = self.hidden(waves, lengths).astype(jnp.float32)
        mask = None if lengths is None else valid(frames(lengths, self.config), hidden.shape[1])
        return self.ser_model(self.pool_model(hidden, mask))


def load(
    checkpoint_dir: str | os.PathLike | None = None,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    normalisation: str = "official",
) -> NeuralTeacher:
    """The teacher, from a directory or the hub; see ``teachers.load``."""
    if normalisation not in NORMALISATIONS:
        raise UsageError(f"unknown normalisation {normalisation!r}; there are: {', '.join(NORMALISATIONS)}")
    checkpoint = weights.find(REPOSITORY, "wavlm", checkpoint_dir, revision)
    found = checkpoint.config
    missing = [name for name in ("mean", "std") if not isinstance(found.get(name), int | float)]
    if missing:
        raise UsageError(f"{checkpoint.directory / weights.CONFIG} does not give {' and '.join(missing)} of {REPOSITORY}")
    config = WavLMConfig(**{name: found.get(name, default) for name, default in LARGE.items()})
    weights.expect(checkpoint, config, BUILD)
    module = WavLM(config, found["mean"], found["std"], normalisation, jnp.dtype(dtype))
    options = {"normalisation": normalisation, "mean": found["mean"], "std": found["std"]}
    return NeuralTeacher("wavlm", module, checkpoint, LICENCE, PARAMETERS, options)
