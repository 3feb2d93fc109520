"""Devices: the state of JAX that this package computes in, and how much memory and arithmetic a device has."""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Iterator, Sequence

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np

from w2s_jax import machine
from w2s_jax.errors import UsageError

#: Peak dense FLOP/s of one JAX device: what ``device_kind`` matches, float32 as XLA computes it by default, bfloat16 (None: no
#: unit for it). By default XLA multiplies float32 in TF32 on NVIDIA's Ampere and later, in one bfloat16 pass on TPUs
#: (docs.jax.dev, jax.lax.Precision). NVIDIA: data sheets of H100, H200, A100, V100, T4, L4 and the whitepaper of Ada
#: (appendix A); where a sheet counts sparse products, half of it. TPU: cloud.google.com/tpu/docs/system-architecture, pages v2
#: to v6e; a JAX device is half a chip in v2 and v3.
PEAKS: tuple[tuple[str, float, float | None], ...] = (
    (r"\bH200 NVL\b", 417.5e12, 835.5e12),
    (r"\bH200\b", 494.5e12, 989e12),
    (r"\bH100 NVL\b", 417.5e12, 835.5e12),
    (r"\bH100 PCIe\b", 378e12, 756e12),
    (r"\bH100\b", 494.5e12, 989e12),
    (r"\bA100\b", 156e12, 312e12),
    (r"\bV100-PCIE\b", 14e12, None),
    (r"\bV100\b", 15.7e12, None),
    (r"\bT4\b", 8.1e12, None),
    (r"\bL4\b", 60e12, 121e12),
    (r"\bRTX 4090$", 82.6e12, 165.2e12),
    (r"^TPU v2\b", 22.5e12, 22.5e12),
    (r"^TPU v3\b", 61.5e12, 61.5e12),
    (r"^TPU v4$", 275e12, 275e12),
    (r"^TPU v5( lite|e)", 197e12, 197e12),
    (r"^TPU v5p?$", 459e12, 459e12),
    (r"^TPU v6( lite|e)", 918e12, 918e12),
)


@contextlib.contextmanager
def computing() -> Iterator[None]:
    """Decorate a public function that computes with JAX: it computes in float32, on a device that exists.

    Labels, students and files are float32 also where the user or another package has enabled 64 bits (``jax_enable_x64``).

    Raises:
        UsageError: there is no device of the kind that JAX was configured to use.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where the plugin of that kind is not installed
        wanted = jax.config.jax_platforms
        if not wanted:
            raise
        reason = str(error).strip().split("\n")[0][:200]
        raise UsageError(
            f"JAX finds no {wanted} device (JAX_PLATFORMS={wanted}{reason and ': '}{reason}); unset JAX_PLATFORMS, set it to "
            f"cpu, or install JAX for {wanted}"
        ) from error
    # its name before JAX 0.8
    with jax.enable_x64(False) if hasattr(jax, "enable_x64") else jax.experimental.disable_x64():
        yield


def total_memory(device: jax.Device) -> float:
    """Bytes of memory that a device has; the devices of a CPU share that of the machine."""
    stats = _accelerator_stats(device)
    return stats["bytes_limit"] if "bytes_limit" in stats else (machine.total_memory() or 0) / jax.local_device_count()


def free_memory(device: jax.Device) -> int | None:
    """Bytes that can still be allocated on a device; None if that is not known."""
    stats = _accelerator_stats(device)
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    # Linux grants memory that it does not have and kills the process that uses it
    return machine.free_memory() if device.platform == "cpu" else None


def memory_use(devices: Sequence[jax.Device]) -> dict[str, int]:
    """Bytes of memory of the fullest of ``devices``: ``in_use``, ``peak`` and ``limit``, as far as they are known.

    For CPUs these are the process's resident memory, its largest, and the machine's.
    """
    if all(device.platform == "cpu" for device in devices):
        limit = machine.total_memory()
        return machine.process_memory() | ({"limit": limit} if limit else {})
    all_stats = [_accelerator_stats(device) for device in devices]
    names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use", "limit": "bytes_limit"}
    fullest = {name: max(stats.get(key, 0) for stats in all_stats) for name, key in names.items()}
    return {name: value for name, value in fullest.items() if value}


def _accelerator_stats(device: jax.Device) -> dict[str, int]:
    return (device.memory_stats() if device.platform != "cpu" else None) or {}


def peak_flops(device: jax.Device, dtype: str = "float32") -> float | None:
    """The most that a device can compute, in FLOP/s.

    Args:
        device: of ``jax.devices()``. Accelerators are looked up (``PEAKS``); a CPU is measured once, 0.3 s of matrix products
            on all of its cores, with whatever else the machine does then.
        dtype: float32 (as XLA multiplies it by default: TF32 on NVIDIA's Ampere and later, bfloat16 on TPUs) or bfloat16.

    Returns:
        FLOP/s of dense products, or None: the device is not in the table, a part of one (MIG), or has no unit for ``dtype``.

    Raises:
        UsageError: another dtype.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UsageError(f"dtype is {dtype!r}; limits are known for float32 and bfloat16")
    if device.platform == "cpu":
        return _measure_flops(device, dtype)
    kind = device.device_kind
    if "MIG" in kind:
        return None
    return next((peaks[dtype == "bfloat16"] for pattern, *peaks in PEAKS if re.search(pattern, kind)), None)


@functools.cache
def _measure_flops(device: jax.Device, dtype: str) -> float:
    size = 1024
    with jax.default_device(device):
        matrix = jnp.ones((size, size), dtype)
        product = jax.jit(jnp.dot)
        product(matrix, matrix).block_until_ready()  # compiles
        fastest, began = np.inf, time.perf_counter()
        while time.perf_counter() - began < 0.3:
            start = time.perf_counter()
            product(matrix, matrix).block_until_ready()
            fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest
