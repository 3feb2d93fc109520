"""This machine: its description, its memory, and whether its processor sums 8-bit products exactly."""

from __future__ import annotations

import base64
import contextlib
import functools
import importlib
import os
import platform
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from w2s_jax.errors import UsageError
from w2s_jax.kinds import INTEGER_KINDS

#: The key of a file's metadata with the processors on which it is right, if not on all; and its value for 8-bit weights.
NEEDS = "needs"
EXACT_SUMS = "ARM, or x86 with VNNI"
#: x [rows, 64], uint8, times a matrix [64, 16] of 127, int8, in int32; as ONNX.
PROBE = base64.b64decode(
    "CAgSADqNAQovCgFzEgF3Ig9Db25zdGFudE9mU2hhcGUqFgoFdmFsdWUqCggBEAMqAX9CAXagAQQKGAoBeAoBdxIBeSINTWF0TXVsSW50ZWdlchIBcCoLCAIQ"
    "BzoCQBBCAXNaFwoBeBISChAIAhIMCgYSBHJvd3MKAghAYhcKAXkSEgoQCAYSDAoGEgRyb3dzCgIIEEIECgAQEQ=="
)


def describe(engines: Collection[str] = ("onnxruntime",)) -> str:
    """This machine's processor, system and versions in one line; of ``engines``, those that have a version."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next((line.partition(":")[2].strip() for line in cpuinfo.open() if line.startswith("model name")), name)
    used = [engine for engine in ("onnxruntime", "openvino") if engine in engines]
    # "2026.4.1-22982-…": the rest is OpenVINO's build
    versions = [f"{engine} {importlib.import_module(engine).__version__.split('-')[0]}" for engine in used]
    return ", ".join([name, platform.system(), *versions, f"Python {platform.python_version()}"])


def total_memory() -> int | None:
    """Bytes of this machine's memory; None where the system does not tell: on Windows."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def free_memory() -> int | None:
    """Bytes that this process can still take, in a container too; None where the system does not tell: except on Linux."""
    try:
        meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(meminfo["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None
    with contextlib.suppress(OSError, ValueError):  # a container may have less than its machine
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free


def process_memory() -> dict[str, int]:
    """Bytes of this process's memory: resident, ``in_use`` and at its ``peak``; without what the system does not tell."""
    with contextlib.suppress(OSError, KeyError):  # Linux; ru_maxrss would include what this process was before it became Python
        status = Path("/proc/self/status").read_text()
        kib = {name: int(value) for name, value in re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", status, re.M)}
        return {"in_use": kib["VmRSS"] * 1024, "peak": kib["VmHWM"] * 1024}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}


@functools.cache
def saturates() -> bool:
    """Whether onnxruntime's sums of 8-bit products overflow on this processor.

    x86 without VNNI (AMD before Zen 4, Intel before Cascade Lake and Ice Lake) adds two products of an unsigned and a signed
    8-bit number in 16 bits, and what does not fit becomes the largest 16-bit number: 2 · 255 · 127 does not fit, 2 · 255 · 63
    does. Computed once by the kernels themselves, which know more processors than any table of names, emulated ones too.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(PROBE, options, providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"x": np.full((8, 64), 255, np.uint8)})
    return bool((sums != 64 * 255 * 127).any())


def require_exact_sums(file: str | os.PathLike, metadata: Mapping[str, str]) -> None:
    """Refuse a file whose values would be wrong on this processor.

    Args:
        file: for the message.
        metadata: of the file. Eight-bit files that this package wrote before it recorded ``weight_bits`` count as having
            8-bit weights, which was the default then.

    Raises:
        UsageError: its weights have 8 bits, and ``saturates``.
    """
    silent = metadata.get("kind") in INTEGER_KINDS and "w2s_jax" in metadata and "weight_bits" not in metadata
    if (NEEDS in metadata or silent) and saturates():
        has = f"needs {metadata[NEEDS]}" if NEEDS in metadata else "does not say that its weights have 7 bits"
        raise UsageError(
            f"{file} {has}: the sums of 8-bit weights overflow on this processor (x86 without VNNI), and its values would be "
            "wrong; export it again without --weight-bits 8, or take the kind fp32 or int8w"
        )
