"""A compiled CPU kernel for training a trunk of 3×3 convolution blocks; optional, the XLA form is always there.

``native.cc`` is compiled on first use with the machine's own C++ compiler for the machine's own CPU, and kept in a private
cache directory. Where that is not possible, ``unavailable`` says why and nothing else changes. W2S_NATIVE=0 turns it off.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import Array, lax

from w2s_jax import compiled
from w2s_jax.models.norm import EPSILON

#: What ``native.cc`` offers to XLA, each with the prefix ``w2s_``.
TARGETS = ("forward", "backward", "pool", "pool_backward", "finish", "finish_backward")
SOURCE = Path(__file__).with_suffix(".cc")
#: Not -ffast-math: a NaN must stay visible in the loss, and sums must keep their order.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
VERSION_SECONDS = compiled.VERSION_SECONDS
#: Rows of time are padded to a multiple of this many floats, two of the longest vectors there are.
STEP = 32


def unavailable() -> str | None:
    """Why the kernel cannot be used in this process, or None where it can; the first call may compile it (seconds)."""
    if os.environ.get("W2S_NATIVE", "1") == "0":
        return "W2S_NATIVE=0 turns it off"
    if jax.default_backend() != "cpu":
        return f"it is for CPUs, and JAX runs on {jax.default_backend()}"
    return _load()


@functools.cache
def _load() -> str | None:
    """Compile or find the library and make it known to XLA: None, or why that did not work."""
    if platform.system() != "Linux":
        return f"it was only tried on Linux, and this is {platform.system()}"
    if not hasattr(jax, "ffi"):
        return f"JAX {jax.__version__} has no jax.ffi"
    try:
        library = load(compiler())
        for target in TARGETS:
            jax.ffi.register_ffi_target(f"w2s_{target}", jax.ffi.pycapsule(getattr(library, f"w2s_{target}")), platform="cpu")
    # whatever is wrong with a compiler, a disk or a library, training goes on without the kernel and can say why
    except subprocess.CalledProcessError as error:
        return compiled.describe_failure(error)
    except subprocess.TimeoutExpired as error:
        return f"{error.cmd[0]} did not end within {error.timeout:g} s"
    except (OSError, AttributeError) as error:
        return str(error)
    return None


def compiler() -> list[str]:
    """The C++ compiler as the first words of a command: the variable CXX, or the first of c++, g++, clang++ that is there."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise FileNotFoundError("no C++ compiler: none of c++, g++, clang++ is on the PATH, and CXX is not set")


def load(command: list[str]) -> ctypes.CDLL:
    """The library compiled from ``native.cc`` for this CPU, from a cache directory where it is there already.

    Args:
        command: the compiler's first words, as ``compiler`` gives them.

    Raises:
        OSError, subprocess.SubprocessError: the compiler, the headers or every directory do not work.
    """
    parts = [SOURCE.read_text(), jaxlib.__version__]
    return compiled.load("native", command, _flags(), [SOURCE], parts, VERSION_SECONDS)


def _flags() -> list[str]:
    # as a system's header: warnings about it are not ours
    return [*FLAGS, "-isystem", jax.ffi.include_dir()]


def trunk(
    image: Array,
    kernels: Sequence[Array],
    gammas: Sequence[Array],
    betas: Sequence[Array],
    before: int,
    axis_name: str | None = None,
    epsilon: float = EPSILON,
) -> tuple[Array, list[Array], list[Array]]:
    """Blocks of convolution, BatchNorm with the batch's moments and ReLU, with one 3×3 stride-2 max pool among them.

    Convolutions are 3×3 with stride 1 and one zero of padding, without bias. The pool is PyTorch's ``MaxPool2d(3, 2, 1)``,
    and of equal values the first in (time, mel) order gets the gradient, as in PyTorch. Differentiable in reverse, once.

    Args:
        image: float32 [B, time, mel, C₀].
        kernels: of the blocks, float32 [3, 3, Cᵢ₋₁, Cᵢ], at least one.
        gammas, betas: of the BatchNorms, float32 [Cᵢ].
        before: blocks before the pool, 1 to all.
        axis_name: the axis of the devices that share one global batch (of ``shard_map`` or ``pmap``), for the moments.
        epsilon: of BatchNorm.

    Returns:
        Features [B, ⌈time/2⌉, ⌈mel/2⌉, C], and each block's mean [Cᵢ] and population variance [Cᵢ] over the global batch.
    """
    time = image.shape[1]
    x = jnp.pad(image.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), (0, _stride(time) - time)))
    norm, first, means, variances = None, True, [], []
    for layer, (kernel, gamma, beta) in enumerate(zip(kernels, gammas, betas, strict=True), start=1):
        if norm is None:  # the image, or what comes out of the pool: no BatchNorm is left to do
            x, mean, variance = _convolve_plain(x, kernel, time, first)
        else:
            x, mean, variance = _convolve(x, *norm, kernel, time)
        first = False
        if axis_name is not None:
            # devices have as many values each: the global variance is that within them and that of their means
            own, mean = mean, lax.pmean(mean, axis_name)
            variance = lax.pmean(variance + jnp.square(own - mean), axis_name)
        means.append(mean)
        variances.append(variance)
        norm = mean, gamma * lax.rsqrt(variance + epsilon), beta
        if layer == before:
            x, norm, time = _pool(x, *norm, time), None, (time + 1) // 2
    if norm is None:
        return x[..., :time].transpose(0, 3, 1, 2), means, variances
    return _finish(x, *norm, time), means, variances


def _stride(time: int) -> int:
    """Floats that a row of time takes; not a multiple of 4 KB, where rows of all channels would share cache lines."""
    stride = -(-time // STEP) * STEP
    return stride + STEP if stride % 1024 == 0 else stride


def _call(target: str, results: Sequence, *arguments: Array, **attributes) -> list[Array]:
    """One function of ``native.cc``; ``results`` are shapes, or arrays of the wanted shape and type."""
    like = (jax.ShapeDtypeStruct(r, jnp.float32) if isinstance(r, tuple) else r for r in results)
    shapes = [jax.ShapeDtypeStruct(r.shape, r.dtype) for r in like]
    attributes = {name: np.int64(value) if name != "affine" else value for name, value in attributes.items()}
    return jax.ffi.ffi_call(f"w2s_{target}", shapes)(*arguments, **attributes)


def _forward(x, centre, factor, beta, kernel, time: int, affine: bool) -> list[Array]:
    batch, mel, _, stride = x.shape
    channels = kernel.shape[3]
    shapes = [(batch, mel, channels, stride), (channels,), (channels,)]
    return _call("forward", shapes, x, centre, factor, beta, kernel, time=time, affine=affine)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _convolve(x: Array, centre: Array, factor: Array, beta: Array, kernel: Array, time: int):
    """Convolution of ``relu((x - centre) · factor + beta)``: y, its mean and its variance.

    x and y are [B, mel, C, stride] with ``time`` columns that count.
    """
    return tuple(_forward(x, centre, factor, beta, kernel, time, True))


def _convolve_forward(x, centre, factor, beta, kernel, time):
    y, mean, variance = _forward(x, centre, factor, beta, kernel, time, True)
    return (y, mean, variance), (x, centre, factor, beta, kernel, y, mean)


def _convolve_backward(time, residuals, cotangents):
    x, _, factor, beta, kernel, *_ = residuals
    gx, gfactor, gbeta, gkernel = _call(
        "backward", (x, factor, beta, kernel), *residuals, *cotangents, time=time, affine=True, parts=3
    )
    return gx, -factor * gbeta, gfactor, gbeta, gkernel


_convolve.defvjp(_convolve_forward, _convolve_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve_plain(x: Array, kernel: Array, time: int, image: bool):
    """``_convolve`` of x as it is; ``image`` where x is the network's input, whose gradient is rarely wanted."""
    nothing = jnp.zeros(x.shape[2], jnp.float32)
    return tuple(_forward(x, nothing, nothing, nothing, kernel, time, False))


def _convolve_plain_forward(x, kernel, time, image):
    y, mean, variance = _convolve_plain(x, kernel, time, image)
    return (y, mean, variance), (x, kernel, y, mean)


def _convolve_plain_backward(time, image, residuals, cotangents):
    x, kernel, y, mean = residuals
    nothing = jnp.zeros(x.shape[2], jnp.float32)

    def gradients(parts: int):
        arguments = (x, nothing, nothing, nothing, kernel, y, mean, *cotangents)
        # what is not asked for is not written, so it need not have its shape
        shapes = (x if parts & 2 else (1, 1, 1, 1), nothing, nothing, kernel if parts & 1 else (1, 1, 1, 1))
        gx, _, _, gkernel = _call("backward", shapes, *arguments, time=time, affine=False, parts=parts)
        return gx, gkernel

    if image:  # two calls, of which XLA drops the one that nobody reads
        return gradients(2)[0], gradients(1)[1]
    return gradients(3)


_convolve_plain.defvjp(_convolve_plain_forward, _convolve_plain_backward)


def _pool_call(x, centre, factor, beta, time: int) -> list[Array]:
    batch, mel, channels, _ = x.shape
    half = (batch, (mel + 1) // 2, channels, _stride((time + 1) // 2))
    return _call("pool", [half, jax.ShapeDtypeStruct(half, jnp.uint8)], x, centre, factor, beta, time=time)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _pool(x: Array, centre: Array, factor: Array, beta: Array, time: int) -> Array:
    """Max pool of ``relu((x - centre) · factor + beta)``: [B, mel, C, stride] → [B, ⌈mel/2⌉, C, stride of ⌈time/2⌉]."""
    return _pool_call(x, centre, factor, beta, time)[0]


def _pool_forward(x, centre, factor, beta, time):
    pooled, codes = _pool_call(x, centre, factor, beta, time)
    return pooled, (x, centre, factor, codes)


def _pool_backward(time, residuals, g):
    x, centre, factor, codes = residuals
    gx, gfactor, gbeta = _call("pool_backward", (x, factor, factor), x, centre, factor, codes, g, time=time)
    return gx, -factor * gbeta, gfactor, gbeta


_pool.defvjp(_pool_forward, _pool_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _finish(x: Array, centre: Array, factor: Array, beta: Array, time: int) -> Array:
    """``relu((x - centre) · factor + beta)`` of [B, mel, C, stride] as [B, time, mel, C]."""
    batch, mel, channels, _ = x.shape
    return _call("finish", [(batch, time, mel, channels)], x, centre, factor, beta, time=time)[0]


def _finish_forward(x, centre, factor, beta, time):
    return _finish(x, centre, factor, beta, time), (x, centre, factor, beta)


def _finish_backward(time, residuals, g):
    x, _, factor, beta = residuals
    gx, gfactor, gbeta = _call("finish_backward", (x, factor, beta), *residuals, g, time=time)
    return gx, -factor * gbeta, gfactor, gbeta


_finish.defvjp(_finish_forward, _finish_backward)
