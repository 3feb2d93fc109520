"""What this machine's processor makes of 8-bit numbers, where it would be another result than elsewhere."""

from __future__ import annotations

import base64
import functools
import os
from collections.abc import Mapping

import numpy as np

from w2s_jax.errors import UsageError
from w2s_jax.kinds import INTEGER_KINDS

#: The entry of a file's metadata that says where it is right, if that is not everywhere; and what it says of 8-bit weights.
NEEDS = "needs"
EXACT_SUMS = "ARM, or x86 with VNNI"
#: x [rows, 64], uint8, times a matrix [64, 16] of 127, int8, in int32; as ONNX.
PROBE = base64.b64decode(
    "CAgSADqNAQovCgFzEgF3Ig9Db25zdGFudE9mU2hhcGUqFgoFdmFsdWUqCggBEAMqAX9CAXagAQQKGAoBeAoBdxIBeSINTWF0TXVsSW50ZWdlchIBcCoLCAIQ"
    "BzoCQBBCAXNaFwoBeBISChAIAhIMCgYSBHJvd3MKAghAYhcKAXkSEgoQCAYSDAoGEgRyb3dzCgIIEEIECgAQEQ=="
)


@functools.cache
def saturates() -> bool:
    """Whether onnxruntime's sums of 8-bit products overflow on this processor.

    x86 without VNNI (AMD before Zen 4, Intel before Cascade Lake and Ice Lake) adds two products of an unsigned and a signed
    8-bit number in 16 bits, and what does not fit becomes the largest 16-bit number: 2 · 255 · 127 does not fit, 2 · 255 · 63
    does. The kernels themselves are asked, for they know more processors than any table of names, emulated ones too.
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
        metadata: what it says of itself. Files of 8 bits that this package made before it recorded ``weight_bits`` are taken
            for what they were unless asked otherwise: 8-bit weights.

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
