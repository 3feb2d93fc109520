"""A student as WebAssembly: its C, compiled by the clang in the wheel ziglang, and an ES module that calls it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from string import Template

from w2s_jax import compiled
from w2s_jax.errors import W2SError, missing_extra
from w2s_jax.kinds import HEADER, MODULE, SOURCE, WASM

PLACE = Path(__file__).parent
#: Functions that JavaScript calls, of w2s_model.h and wasm.c.
_CALLS = (
    *("w2s_predict", "w2s_predict_int16", "w2s_stream_bytes", "w2s_stream_init", "w2s_stream_reset"),
    *("w2s_stream_push", "w2s_stream_push_int16", "w2s_stream_read", "w2s_constant", "w2s_unpack"),
)
#: Vectors of 128 bits are in every browser since 2023; there is no library to link.
_FLAGS = (
    *("-target", "wasm32-freestanding", "-mcpu=generic+simd128", "-std=gnu99", "-O3", "-ffp-contract=off", "-nostdlib"),
    *("-Wl,--no-entry", "-Wl,--strip-all", "-Wl,-z,stack-size=32768", "-Wl,--export=__heap_base"),
    *(f"-Wl,--export={name}" for name in _CALLS),
)


def compile_module(files: Mapping[str, bytes], facts: Mapping[str, str]) -> dict[str, bytes]:
    """The files of the kind "wasm".

    Args:
        files: a student in C, ``packed``: name → content.
        facts: what the file says of itself.

    Returns:
        name → content.

    Raises:
        UsageError: ziglang is not installed.
        W2SError: it fails.
    """
    if importlib.util.find_spec("ziglang") is None:
        raise missing_extra("ziglang", "wasm")
    with tempfile.TemporaryDirectory() as place:
        for name in (HEADER, SOURCE):
            (Path(place) / name).write_bytes(files[name])
        sources, module = [Path(place) / SOURCE, PLACE / "wasm.c"], Path(place) / WASM
        command = [sys.executable, "-m", "ziglang", "cc", *_FLAGS, "-I", place, *map(str, sources), "-o", str(module)]
        try:
            compiled.run(command, compiled.COMPILE_SECONDS)
        except subprocess.CalledProcessError as error:
            raise W2SError(f"cannot compile WebAssembly: {compiled.describe_failure(error)}") from error
        except (subprocess.TimeoutExpired, OSError) as error:
            raise W2SError(f"cannot compile WebAssembly: {error}") from error
        content = module.read_bytes()
    names = facts["dimensions"].split(",")
    texts = {
        "title": " ".join(f"{facts.get('student', 'a student')}: 16 kHz mono speech in, {', '.join(names)} out.".split()),
        "values": ", ".join(f"{name}: …" for name in names),
        "kilobytes": f"{len(content) / 1000:.0f}",
        "teacher": facts.get("teacher", "not known"),
        "licence": facts.get("licence", "not known"),
    }
    written = {MODULE: "model.mjs", "README.md": "wasm.template.md"}
    return {WASM: content} | {
        name: Template((PLACE / template).read_text("utf-8")).substitute(texts).encode() for name, template in written.items()
    }
