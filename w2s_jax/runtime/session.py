"""The one place where onnxruntime is imported and sessions are opened: checked, quiet, and within limits."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from w2s_jax import machine
from w2s_jax.errors import UsageError, W2SError
from w2s_jax.files import read_json
from w2s_jax.kinds import FILES, KINDS
from w2s_jax.names import line
from w2s_jax.runtime import c, onnxfile, wasm

# From release 1.31 on onnxruntime reports its use to Microsoft, and writes ~/.cache/Microsoft/DeveloperTools when imported; its
# own function that turns this off can be called only afterwards. To allow it, set the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

if os.environ["ORT_DISABLE_TELEMETRY"].lower() not in ("", "0", "false"):
    onnxruntime.disable_telemetry_events()  # for one that was imported before

#: Bytes of the largest file: neither protobuf nor FlatBuffers hold more.
_LARGEST_FILE = (1 << 31) - 1
#: Of a model directory; names its files and their checksums.
REPORT = "export.json"


def open_session(source: str | os.PathLike | bytes, threads: int = 1) -> tuple[onnxruntime.InferenceSession, str]:
    """Open a model on the CPU: a session whose memory does not grow with the lengths of its inputs, and its name for messages.

    Before anything is run, the file is held against the checksum in the export.json beside it, if there is one, and checked
    (``onnxfile.check``). All sessions of a process together take at most
    ``memory_limit()`` for their tensors.

    Args:
        source: an .onnx file, or its content; or a .tflite file, of which it gives a ``litert.Session``; or a directory with a
            student in C, which is compiled, or in WebAssembly, of which it gives a ``c.Session`` or a ``wasm.Session``.
        threads: CPU threads per call; 0 takes all cores.

    Raises:
        UsageError: no such file, no interpreter for it, or a file that would be wrong on this processor.
        W2SError: the file is damaged, or is refused; gives the reason.
    """
    content = isinstance(source, bytes)
    name = "the model" if content else str(source)
    if not content and c.is_code(source):
        _check_checksum(Path(source))
        return c.Session(source), name
    if not content and wasm.is_module(source):
        _check_checksum(Path(source))
        return wasm.Session(source), name
    if not content and not Path(source).is_file():
        raise UsageError(f"no model at {name}: no such file")
    if not content and (size := Path(source).stat().st_size) > _LARGEST_FILE:
        raise W2SError(f"{name} is refused: it has {size:,} bytes; no model has more than {_LARGEST_FILE:,}")
    if not content:
        _check_checksum(Path(source))
    if not content and Path(source).suffix == ".tflite":
        from w2s_jax.runtime import litert  # its interpreter is an extra

        return litert.Session(source, threads), name
    folded = onnxfile.check(source, name) if content else _check_file(source, name)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    # a pattern is kept for every length that was seen. The arena stays: without it the system provides every page again in
    # every call, which takes up to half as long as the network itself
    options.enable_mem_pattern = False
    options.log_severity_level = 4  # errors arrive as exceptions
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(folded))
    if _limited():
        options.add_session_config_entry("session.use_env_allocators", "1")
    with onnxruntime_errors(f"{name} is damaged or not an ONNX model"):
        session = onnxruntime.InferenceSession(source if content else name, options, providers=["CPUExecutionProvider"])
    machine.require_exact_sums(name, session.get_modelmeta().custom_metadata_map)
    return session, name


@contextlib.contextmanager
def onnxruntime_errors(failure: str, out_of_memory: str | None = None) -> Iterator[None]:
    """Turn every error of an interpreter into a ``W2SError``: its exception classes share no base and depend on the fault.

    Args:
        failure: what has failed; the reason is put behind it.
        out_of_memory: the whole message if the reason is ``memory_limit``.
    """
    try:
        yield
    except Exception as error:
        if out_of_memory and ("bfc_arena" in str(error) or "Failed to allocate memory" in str(error)):
            raise W2SError(out_of_memory) from error
        raise W2SError(f"{failure}: {line(error, 300)}") from error


def memory_limit() -> int:
    """Bytes that the tensors of all sessions may take together: half of this machine's memory."""
    return (machine.total_memory() or 16 << 30) // 2


def shrinking() -> onnxruntime.RunOptions:
    """Options of a call that gives its memory back at its end."""
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _check_checksum(path: Path) -> None:
    """Refuse a file that is not the one that the export.json beside it was written for; without one, or a sum in it, take it.

    Raises:
        W2SError: names the file, and what to do.
    """
    report = path.parent / REPORT
    if path.name not in FILES.values() or not os.path.lexists(report):
        return
    if not report.exists():
        raise W2SError(f"cannot check {path}: the {REPORT} beside it is a link to nothing; copy or export the directory again")
    sums = read_json(report, "model").get("sha256")
    for name in next(kind.names for kind in KINDS.values() if kind.file == path.name):
        expected, part = sums.get(name) if isinstance(sums, dict) else None, path.parent / name
        if expected is None:  # before 0.2
            continue
        try:
            with open(part, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError as error:
            raise W2SError(f"{path} is damaged: {part.name} is missing; copy or export it again") from error
        if found != expected:
            said = f"its SHA-256 begins with {found[:12]}, but {line(expected, 12)} in {REPORT}"
            raise W2SError(f"{part} is damaged: {said}; copy or export it again")


def _check_file(path: str | os.PathLike, name: str) -> int:
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise W2SError(f"{name} is damaged or not an ONNX model: it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return onnxfile.check(content, name)
    except OSError as error:
        raise W2SError(f"cannot read {name}: {error.strerror or error}") from error


@functools.cache
def _limited() -> bool:
    """Register one allocator with a limit for all sessions of this process; returns whether that worked."""
    state = onnxruntime.capi.onnxruntime_pybind11_state
    try:
        where = state.OrtMemoryInfo("Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT)
        settings = {
            "max_mem": memory_limit(),
            "arena_extend_strategy": -1,  # this and the next two as in a session's own allocator
            "initial_chunk_size_bytes": -1,
            "max_dead_bytes_per_chunk": -1,
        }
        onnxruntime.create_and_register_allocator(where, onnxruntime.OrtArenaCfg(settings))
    except Exception:  # other code in this process has registered one, or this build cannot: then there is no limit of ours
        return False
    return True
