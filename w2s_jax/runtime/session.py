"""The one place where onnxruntime is imported and sessions are opened: checked, quiet, and within limits."""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
from pathlib import Path

from w2s_jax import machine
from w2s_jax.errors import UsageError, W2SError
from w2s_jax.files import read_json
from w2s_jax.kinds import FILES
from w2s_jax.names import line
from w2s_jax.runtime import onnxfile

# onnxruntime reports its use to Microsoft from release 1.31 on, and on being imported writes ~/.cache/Microsoft/DeveloperTools;
# its own function against it, which comes after the import, comes too late. Whoever wants it sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

if os.environ["ORT_DISABLE_TELEMETRY"].lower() not in ("", "0", "false"):
    onnxruntime.disable_telemetry_events()  # for one that was imported before

#: Bytes of the largest file: neither protobuf nor FlatBuffers hold more.
_LARGEST_FILE = (1 << 31) - 1
#: Of a model directory; names its files and their checksums.
REPORT = "export.json"


def open_session(source: str | os.PathLike | bytes, threads: int = 1) -> tuple[onnxruntime.InferenceSession, str]:
    """An onnxruntime session on the CPU whose memory does not grow with the lengths that it sees, and its name for messages.

    Before anything is run, the file is held against the checksum in the export.json beside it, if there is one, and checked
    (``onnxfile.check``). All sessions of a process together take at most
    ``memory_limit()`` for their tensors.

    Args:
        source: an .onnx file, or its content; or a .tflite file, of which it gives a ``litert.Session``.
        threads: CPU threads per call; 0 takes all cores.

    Raises:
        UsageError: no such file, no interpreter for it, or a file that would be wrong on this processor.
        W2SError: the file is damaged, or is refused; says why.
    """
    content = isinstance(source, bytes)
    name = "the model" if content else str(source)
    if not content and not Path(source).is_file():
        raise UsageError(f"no model at {name}: no such file")
    if not content and (size := Path(source).stat().st_size) > _LARGEST_FILE:
        raise W2SError(f"{name} is refused: it has {size:,} bytes; no model has more than {_LARGEST_FILE:,}")
    if not content:
        _check_sum(Path(source))
    if not content and Path(source).suffix == ".tflite":
        from w2s_jax.runtime import litert  # its interpreter is an extra

        return litert.Session(source, threads), name
    folded = onnxfile.check(source, name) if content else _check_file(source, name)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    # it keeps memory for every length it has seen; the arena does not, and without it the system hands out every page anew in
    # every call, which takes up to half as long as the network itself
    options.enable_mem_pattern = False
    options.log_severity_level = 4  # errors arrive as exceptions
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(folded))
    if _limited():
        options.add_session_config_entry("session.use_env_allocators", "1")
    try:
        session = onnxruntime.InferenceSession(source if content else name, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exception classes share no base and depend on the fault
        raise W2SError(f"{name} is damaged or not an ONNX model: {one_line(error)}") from error
    machine.require_exact_sums(name, session.get_modelmeta().custom_metadata_map)
    return session, name


def memory_limit() -> int:
    """Bytes that the tensors of all sessions may take together: half of this machine's memory."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):  # Windows
        return 8 << 30


def out_of_memory(error: Exception) -> bool:
    """Whether a session failed because of ``memory_limit``."""
    return "bfc_arena" in str(error) or "Failed to allocate memory" in str(error)


def shrinking() -> onnxruntime.RunOptions:
    """For a call after which the memory that it took is given back."""
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def one_line(error: Exception) -> str:
    """What an exception says, in one line without control characters."""
    return line(error, 300)


def _check_sum(path: Path) -> None:
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
    expected = sums.get(path.name) if isinstance(sums, dict) else None
    if expected is None:  # before 0.2
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        said = f"its SHA-256 begins with {found[:12]}, but {line(expected, 12)} in {REPORT}"
        raise W2SError(f"{path} is damaged: {said}; copy or export it again")


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
    """Give the process the one allocator that its sessions share and that has a limit; whether that worked."""
    state = onnxruntime.capi.onnxruntime_pybind11_state
    try:
        where = state.OrtMemoryInfo("Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT)
        settings = {
            "max_mem": memory_limit(),
            "arena_extend_strategy": -1,  # as a session's own has it, like the two that follow
            "initial_chunk_size_bytes": -1,
            "max_dead_bytes_per_chunk": -1,
        }
        onnxruntime.create_and_register_allocator(where, onnxruntime.OrtArenaCfg(settings))
    except Exception:  # somebody else in this process has done it, or this build cannot: then there is no limit of ours
        return False
    return True
