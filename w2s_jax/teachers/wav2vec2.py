"""The first teacher of the paper: wav2vec2-large-robust with 12 layers and a regression head (Wagner et al. 2023)."""

from __future__ import annotations

import os

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from transformers import Wav2Vec2Config
from transformers.models.wav2vec2.modeling_flax_wav2vec2 import FlaxWav2Vec2Module

from w2s_jax import DIMENSIONS, SAMPLING_RATE
from w2s_jax.teachers import weights
from w2s_jax.teachers.neural import BUILD, NeuralTeacher, frames, valid

REPOSITORY = "audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim"
LICENCE = f"CC-BY-NC-SA-4.0 ({REPOSITORY})"

#: How many parameters the published model has.
PARAMETERS = 165_336_707

#: What the published weights say of 16,000 zeros (the repository's model card).
GOLDEN = (0.5460754, 0.6062266, 0.40431657)

#: How far from that the computation may be: rounding in float32; in bfloat16 about eight bits.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


class Head(nn.Module):
    """Two dense layers with a tanh between them, [B, H] → [B, outputs]."""

    outputs: int

    @nn.compact
    def __call__(self, pooled: Array) -> Array:
        hidden = nn.tanh(nn.Dense(pooled.shape[-1], name="dense")(pooled))
        return nn.Dense(self.outputs, name="out_proj")(hidden)


class Wav2Vec2(nn.Module):
    """wav2vec2 as Hugging Face has it in Flax, the mean over time, and a regression head.

    Attributes:
        config: a Wav2Vec2Config with feat_extract_norm "layer" and do_stable_layer_norm.
        dtype: what the Transformer computes in; the normalisation of the waveform, the mean and the head are float32.
    """

    config: Wav2Vec2Config
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.wav2vec2 = FlaxWav2Vec2Module(self.config, dtype=self.dtype)
        self.classifier = Head(len(DIMENSIONS))

    def hidden(self, waves: Array, lengths: Array | None = None) -> Array:
        """Last hidden states: float32 [B, T] (of which ``lengths`` int [B] count) → [B, frames, H]."""
        mask = jnp.ones(waves.shape, bool) if lengths is None else valid(lengths, waves.shape[1])
        mean = jnp.mean(waves, axis=1, keepdims=True, where=mask)
        deviation = jnp.where(mask, waves - mean, 0.0)
        variance = jnp.mean(deviation**2, axis=1, keepdims=True, where=mask)
        # no mask where every sample counts: it would only cost time
        return self.wav2vec2(deviation / jnp.sqrt(variance + 1e-7), None if lengths is None else mask.astype(jnp.int32))[0]

    def __call__(self, waves: Array, lengths: Array | None = None) -> Array:
        """float32 [B, T] at 16 kHz (of which ``lengths`` int [B] count) → float32 [B, 3]."""
        hidden = self.hidden(waves, lengths).astype(jnp.float32)
        if lengths is None:
            pooled = hidden.mean(axis=1)
        else:
            pooled = hidden.mean(axis=1, where=valid(frames(lengths, self.config), hidden.shape[1])[:, :, None])
        return self.classifier(pooled)


def load(
    checkpoint_dir: str | os.PathLike | None = None, *, dtype: str = "float32", revision: str | None = None
) -> NeuralTeacher:
    """The teacher, from a directory or the hub; see ``teachers.load``.

    Weights of the published size must give the published golden value, or the teacher has a ``doubt``; with ``revision`` the
    caller says that other weights are meant.
    """
    checkpoint = weights.find(REPOSITORY, "wav2vec2", checkpoint_dir, revision)
    settings = {**checkpoint.config, "vocab_size": checkpoint.config.get("vocab_size") or 32}  # published as null
    config = Wav2Vec2Config.from_dict(settings)
    weights.expect(checkpoint, config, {**BUILD, "add_adapter": False})
    module = Wav2Vec2(config, jnp.dtype(dtype))
    teacher = NeuralTeacher("wav2vec2", module, checkpoint, LICENCE, PARAMETERS, {"normalisation": "utterance"})
    if teacher.parameters == PARAMETERS:
        value = np.asarray(teacher(np.zeros((1, SAMPLING_RATE), np.float32)))[0]
        teacher.golden = float(np.abs(value - GOLDEN).max())
        teacher.about["published"] = teacher.golden <= TOLERANCE[dtype]
        if not teacher.about["published"] and revision is None:
            teacher.doubt = (
                f"the weights at {checkpoint.directory} give {np.round(value, 7).tolist()} for 16,000 zeros, the published "
                f"{REPOSITORY} gives {list(GOLDEN)}: damaged, or another model; if that is meant, name it with --revision"
            )
    return teacher
