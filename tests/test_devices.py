"""Limits of devices: arithmetic and memory."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest

from w2s_jax.devices import memory_use, peak_flops
from w2s_jax.errors import UsageError


# NVIDIA's and Google's data sheets: dense TFLOP/s, TF32 or float32, bfloat16
@pytest.mark.parametrize(
    ("kind", "float32", "bfloat16"),
    [
        ("NVIDIA H100 80GB HBM3", 494.5, 989),
        ("NVIDIA H100 PCIe", 378, 756),
        ("NVIDIA A100-SXM4-80GB", 156, 312),
        ("Tesla V100-SXM2-16GB", 15.7, None),
        ("NVIDIA L4", 60, 121),
        ("NVIDIA L40S", None, None),
        ("NVIDIA GeForce RTX 4090", 82.6, 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("TPU v4", 275, 275),
        ("TPU v5 lite", 197, 197),
        ("TPU v5", 459, 459),
        ("TPU v5p", 459, 459),
        ("TPU v6 lite", 918, 918),
        ("TPU v99", None, None),
    ],
)
def test_limits_of_accelerators(kind, float32, bfloat16):
    device = SimpleNamespace(platform="tpu" if kind.startswith("TPU") else "gpu", device_kind=kind)
    for dtype, expected in (("float32", float32), ("bfloat16", bfloat16)):
        found = peak_flops(device, dtype)
        assert found == (None if expected is None else pytest.approx(expected * 1e12)), dtype


def test_the_limit_of_this_cpu():
    # one slow core has 1e9 FLOP/s, the largest server some 1e14
    assert 1e9 < peak_flops(jax.devices("cpu")[0]) < 1e15
    with pytest.raises(UsageError, match="int8"):
        peak_flops(jax.devices("cpu")[0], "int8")


def test_memory_of_this_process_and_of_the_fullest_device():
    used = memory_use(jax.devices("cpu"))
    assert 1e6 < used["in_use"] <= used["peak"] < used["limit"]
    stats = [{"bytes_in_use": 3, "peak_bytes_in_use": 5, "bytes_limit": 9}, {"bytes_in_use": 4, "bytes_limit": 9}, None]
    devices = [SimpleNamespace(platform="gpu", memory_stats=lambda told=told: told) for told in stats]
    assert memory_use(devices) == {"in_use": 4, "peak": 5, "limit": 9}
    assert memory_use(devices[2:]) == {}
