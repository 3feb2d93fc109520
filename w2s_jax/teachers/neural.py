"""The base of the Transformer teachers: masks, and batches of equal length over all devices of this machine."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from w2s_jax import DIMENSIONS, SAMPLING_RATE, models
from w2s_jax.devices import computing, free_memory
from w2s_jax.errors import UsageError, W2SError
from w2s_jax.files import fingerprint
from w2s_jax.teachers import weights

#: Configuration that both models have in common. transformers' Flax modules have no other normalisation, and take the epsilon
#: of the convolutions' norms from the configuration, where its PyTorch modules use 1e-5.
BUILD = {
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
}

#: Below 25 ms the convolutions have no output frame.
SHORTEST = 400


def valid(lengths: Array, size: int) -> Array:
    """A mask of the first ``lengths`` of ``size`` steps: int [B] → bool [B, size]."""
    return jnp.arange(size) < lengths[:, None]


def frames(samples, config):
    """Output frames of the convolutions for a number of samples, int or int array."""
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        samples = (samples - kernel) // stride + 1
    return samples


class NeuralTeacher:
    """A Transformer teacher with published weights, on all local devices.

    Calling it labels waveforms, float32 [B, T] at 16 kHz → float32 [B, 3], as a JAX array that accelerators compute in the
    background. The batch is sharded over the devices, after it was filled up with copies to a power of two times their number;
    each such size and length is compiled once. A row's values do not depend on the rest of its batch (1e-5 in float32).

    Args:
        name: as given to ``teachers.load``.
        module: linen module [B, T] → [B, 3], with a field ``dtype``.
        checkpoint: its weights.
        licence: of the published weights.
        published: number of parameters of the published weights.
        options: what else changes the labels (normalisation), for provenance.

    Attributes:
        parameters: number of weights.
        doubt: why its labels cannot be trusted, or None; ``label`` refuses a teacher with a doubt.
        golden: largest difference to the published golden value, where there is one for these weights.
    """

    dimensions = DIMENSIONS
    stand_in = False
    masks = True

    @computing()
    def __init__(
        self, name: str, module: nn.Module, checkpoint: weights.Checkpoint, licence: str, published: int, options: dict
    ) -> None:
        self.name, self.licence, self.module, self.checkpoint = name, licence, module, checkpoint
        self.golden, self.doubt = None, None
        self._mesh = Mesh(np.array(jax.local_devices()), ("views",))
        half = module.dtype == jnp.bfloat16
        everywhere = NamedSharding(self._mesh, PartitionSpec())

        def place(path: tuple[str, ...], array: np.ndarray) -> Array:
            # only the trunk's matrices, nearly all of the weights, are rounded; norms, gates and the head are not
            trunk = path[0] in ("wav2vec2", "ssl_model") and "gru_rel_pos_linear" not in path
            low = half and trunk and path[-1] == "kernel"
            return jax.device_put(array.astype(jnp.bfloat16) if low else array, everywhere)

        shapes = models.shapes(module)["params"]
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        self.params = weights.read(checkpoint, shapes, place)
        self.about = {
            "checkpoint": checkpoint.repository,
            "revision": checkpoint.revision,
            "published": None if self.parameters == published else False,  # None: it may be the published model
            "dtype": jnp.dtype(module.dtype).name,
            **options,
        }
        # settings that do not show in the shapes of the weights
        unseen = ("conv_kernel", "conv_stride", "num_attention_heads", "num_conv_pos_embedding_groups", "max_bucket_distance")
        geometry = {key: getattr(module.config, key, None) for key in unseen}
        self.fingerprint = fingerprint(name, checkpoint.fingerprint, {**options, "dtype": self.about["dtype"]}, geometry)
        self._compiled = {}

    @property
    def devices(self) -> int:
        """The number of devices that share a batch."""
        return self._mesh.size

    @computing()
    def __call__(self, waves: np.ndarray, lengths: np.ndarray | None = None) -> Array:
        """Label waveforms.

        Args:
            waves: float32 [B, T] at 16 kHz, T at least 400.
            lengths: int [B], how many samples of each row count, where rows are filled up to T; the result is that of the row
                cut to its length. Default: all.

        Returns:
            float32 [B, 3].

        Raises:
            UsageError: another shape, too short, lengths that do not fit, or samples that are not finite.
            W2SError: not enough memory; names the batch size to try.
        """
        waves = np.asarray(waves, np.float32)
        if waves.ndim != 2 or not len(waves) or waves.shape[1] < SHORTEST:
            raise UsageError(
                f"teacher {self.name} got waves of shape {waves.shape}; expected [B, T] with T ≥ {SHORTEST} samples"
            )
        if not np.isfinite(waves).all():
            raise UsageError(f"teacher {self.name} got samples that are not finite; check the audio")
        rows = len(waves)
        size = self.devices
        while size < rows:
            size *= 2
        filled = np.resize(np.arange(rows), size)
        sharding = NamedSharding(self._mesh, PartitionSpec("views"))
        inputs = [jax.device_put(waves[filled], sharding)]
        if lengths is not None:
            lengths = np.asarray(lengths, np.int32)
            if lengths.shape != (rows,) or lengths.min() < SHORTEST or lengths.max() > waves.shape[1]:
                raise UsageError(
                    f"teacher {self.name} got lengths {lengths.tolist()} for waves of shape {waves.shape}; "
                    f"expected one for each row, {SHORTEST} to {waves.shape[1]} samples"
                )
            inputs.append(jax.device_put(lengths[filled], sharding))
        key = (size, waves.shape[1], len(inputs))
        if key not in self._compiled:
            self._compiled[key] = self._compile(inputs)
        try:
            return self._compiled[key](self.params, *inputs)[:rows]
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise self._too_large(*inputs[0].shape, "more memory than there is", 0.5) from error

    def _compile(self, inputs: list[Array]):
        # on TPU and GPU the default multiplies float32 in fewer bits
        precision = "float32" if self.module.dtype == jnp.float32 else None
        with jax.default_matmul_precision(precision):
            run = jax.jit(lambda params, *inputs: self.module.apply({"params": params}, *inputs))
            compiled = run.lower(self.params, *inputs).compile()
        free, needed = free_memory(jax.local_devices()[0]), getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)
        if jax.local_devices()[0].platform == "cpu":
            needed *= self.devices  # they share one memory
        if free is not None and needed > free:
            need = f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
            raise self._too_large(*inputs[0].shape, need, free / needed)
        return compiled

    def _too_large(self, rows: int, samples: int, need: str, fraction: float) -> W2SError:
        fits = int(rows / self.devices * fraction)
        fits = 1 << fits.bit_length() - 1 if fits else 0
        advice = f"try --batch-size {fits}" if fits else "use shorter views, or a machine with more memory"
        views = f"{rows // self.devices} views of {samples / SAMPLING_RATE:.3g} s at once"
        return W2SError(f"teacher {self.name} needs {need} for {views}; {advice}")
