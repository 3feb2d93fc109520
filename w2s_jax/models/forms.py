"""How a network runs, which is not part of what it is: its dtype, and the form of its 3×3 convolutions.

Whatever is chosen here, parameters keep their names, shapes and float32, and results are the same up to rounding.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from w2s_jax.errors import UsageError
from w2s_jax.models import native

#: Fields of students that say how they run; no file of a student needs them.
RUNNING = ("axis_name", "form", "dtype")
#: What activations may be between layers. Parameters, front end, BatchNorm's sums, pooling over time and logits stay float32.
DTYPES = ("float32", "bfloat16")
#: What the field ``form`` of a Wav2Small may be.
CHOICES = ("auto", "direct", "blocks", "native")
#: What "auto" takes on each backend. cpu: measured (experiments/README.md). gpu, tpu: by arithmetic, not measured: on a GPU
#: both are bound by memory traffic, while 13 channels fill a tenth of each side of a TPU's 128 × 128 matrix unit. Training on a
#: CPU is ``trains_natively`` where it can be.
FORMS = {"cpu": "direct", "gpu": "direct", "tpu": "blocks"}
#: Mel bins of a block. With 13 channels, 7 of them are the most whose 91 outputs fit a matrix unit of 128.
ROWS = 7


def check_running(module: nn.Module) -> None:
    """Refuse a ``dtype``, or a ``form`` where the module has one, that does not exist.

    Raises:
        UsageError: names the choices.
    """
    for field, choices in (("dtype", DTYPES), ("form", CHOICES)):
        value = getattr(module, field, choices[0])
        if value not in choices:
            raise UsageError(f"{field} is {value!r}; expected one of {', '.join(choices)}")


def resolve(form: str) -> str:
    """The form itself, or what "auto" means on this backend."""
    return FORMS.get(jax.default_backend(), "direct") if form == "auto" else form


def trains_natively(form: str, kernel: int, stride: int, dtype, axis_name: str | None) -> bool:
    """Whether a trunk of such convolutions is trained by the compiled kernel (``native``).

    "native" demands it; "auto" takes it on a CPU where it can be had. XLA cannot divide a kernel of ours over devices, so on
    several of them "auto" takes it only where the step is written for one device: with an ``axis_name`` to reduce over.

    Raises:
        UsageError: the form is "native", and the kernel cannot be had, or has no such convolution.
    """
    if form not in ("auto", "native"):
        return False
    if (kernel, stride, dtype) != (3, 1, jnp.float32):
        reason = f"it has 3×3 kernels, stride 1 and float32 only; got {kernel}×{kernel}, stride {stride} and {dtype}"
    elif form == "auto" and jax.device_count() > 1 and axis_name is None:
        return False
    else:
        reason = native.unavailable()
    if form == "native" and reason:
        raise UsageError(f"form is 'native', and that is not available: {reason}; choose another form, or 'auto'")
    return reason is None


class FormedConvolution(nn.Module):
    """``nn.Conv`` without bias, as many zeros on both ends, in one of several forms.

    [B, time, mel, C] → [B, ⌈time/stride⌉, ⌈mel/stride⌉, channels], of the input's dtype. ``form`` is as in ``CHOICES``;
    "native" trains a whole trunk, and a single convolution of it is direct, as all are that are not 3×3 with stride 1.
    """

    channels: int
    kernel: int = 3
    stride: int = 1
    form: str = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.kernel, self.kernel, x.shape[-1], self.channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        form = resolve(self.form) if (self.kernel, self.stride) == (3, 1) else "direct"
        return convolve_in_blocks(x, kernel) if form == "blocks" else convolve(x, kernel, self.stride)


class Dense(nn.Module):
    """``nn.Dense``, or with ``axes=2`` the 1×1 ``nn.Conv``, whose bias is added in float32: [..., C] → float32 [..., features].

    The product has the input's dtype. A bias added in bfloat16 would have a gradient summed in bfloat16, over all places of all
    images: after 256 equal terms such a sum stands still. With ``adds=False`` the bias is kept as a parameter and not added.
    """

    features: int
    axes: int = 0
    adds: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inputs = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (1,) * self.axes + (inputs, self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        y = x.reshape(-1, inputs) @ kernel.reshape(inputs, self.features).astype(x.dtype)
        y = y.reshape(*x.shape[:-1], self.features).astype(jnp.float32)
        return y + bias if self.adds else y


def convolve(x: Array, kernel: Array, stride: int = 1) -> Array:
    """The convolution as XLA's own operator: [B, time, mel, C] with [k, k, C, channels]."""
    # not "SAME", which would pad less before than after where the stride is even
    return _convolve(x, kernel, (stride, stride), len(kernel) // 2)


def convolve_in_blocks(x: Array, kernel: Array) -> Array:
    """The same for 3×3 and stride 1: blocks of 7 mel bins, overlapping by the 2 that a kernel needs, are channels.

    What is left is a convolution of three taps over time, from 9·C to 7·channels; blocks do not see each other.
    """
    batch, time, mel, inputs = x.shape
    blocks = -(-mel // ROWS)
    grid = jnp.pad(x, ((0, 0), (0, 0), (1, (blocks + 1) * ROWS - mel - 1), (0, 0)))
    grid = grid.reshape(batch, time, blocks + 1, ROWS, inputs)
    seen = jnp.concatenate([grid[:, :, :-1], grid[:, :, 1:, :2]], axis=3).reshape(batch, time, blocks, -1)
    out = _convolve(seen, _band_matrices(kernel, ROWS + 2, ROWS)[:, None], (1, 1), (1, 0))
    return out.reshape(batch, time, blocks * ROWS, -1)[:, :, :mel]


def _convolve(x: Array, kernel: Array, stride: tuple[int, int], padding: int | tuple[int, int]) -> Array:
    high, wide = (padding, padding) if isinstance(padding, int) else padding
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel.astype(x.dtype), stride, ((high, high), (wide, wide)), dimension_numbers=dimensions
    )


def _band_matrices(kernel: Array, inputs: int, outputs: int) -> Array:
    """A kernel [3, 3, C, channels] as matrices [3, inputs · C, outputs · channels] from mel bins to mel bins.

    Output bin j sees the input bins j, j + 1 and j + 2.
    """
    i, j, k = np.ogrid[:inputs, :outputs, :3]
    place = (i - j == k).astype(np.float32)
    # exact: accelerators would round the float32 parameters, and the sums of their gradients
    matrices = jnp.einsum("ijk,tkco->ticjo", place, kernel, precision=lax.Precision.HIGHEST)
    return matrices.reshape(3, inputs * kernel.shape[2], outputs * kernel.shape[3])
