"""A student in C, compiled on first use, behind the few methods of onnxruntime's session that this package uses."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from w2s_jax import compiled
from w2s_jax.errors import UsageError, W2SError
from w2s_jax.install import pip_install
from w2s_jax.kinds import HEADER, SOURCE

#: Flags of every library; those for this very processor, which a compiler may not know, come first where they are taken.
FLAGS = ("-std=gnu99", "-O3", "-fno-math-errno", "-fPIC", "-shared")
#: Products of float32 may be added unrounded; the integer kind says the same on every machine, so there they may not.
CONTRACT = {True: "-ffp-contract=fast", False: "-ffp-contract=off"}
NATIVE = {"x86_64": ("-march=native", "-mprefer-vector-width=512"), "aarch64": ("-mcpu=native",), "arm64": ("-mcpu=native",)}
#: The error codes of w2s_model.h that a caller of this module can meet.
_ERRORS = {
    -3: "too few samples, or too many",
    -4: "a sample is not finite, or beyond 1e15",
    -6: "no state of a stream of this model",
}
OK, EARLY = 0, -7
#: Bytes at the beginning of a state that name model, normalisation, window and hop.
ABOUT = 16
#: The values of w2s_model.h for the normalisation of a stream.
NORMALISATIONS = {"running": 0, "window": 1}


class Session:
    """A directory of C code, with the methods of ``onnxruntime.InferenceSession`` that ``Predictor`` calls, and streams.

    It may be called from several threads at once.

    Args:
        directory: with w2s_model.h and w2s_model.c.

    Raises:
        UsageError: no compiler; says how to get one.
        W2SError: the code does not compile, or is none of this package's.
    """

    def __init__(self, directory: str | os.PathLike):
        directory = Path(directory)
        library = _load(directory)
        try:
            self._library = library
            self._metadata = json.loads(ctypes.c_char_p.in_dll(library, "w2s_metadata").value.decode())
            for name in ("w2s_predict_bytes", "w2s_scratch_bytes", "w2s_stream_bytes"):
                getattr(library, name).restype = ctypes.c_size_t
            self._bytes, self._scratch_bytes = library.w2s_predict_bytes(), library.w2s_scratch_bytes()
            self._dimensions = len(self._metadata["dimensions"].split(","))
        except (AttributeError, ValueError, KeyError) as error:
            raise W2SError(f"{directory} has no code of this package: {error}") from error

    def get_inputs(self) -> list[SimpleNamespace]:
        """Name, type and shape of the input."""
        return [SimpleNamespace(name="signal", type="tensor(float)", shape=[1, None])]

    def get_outputs(self) -> list[SimpleNamespace]:
        """The same of the output."""
        return [SimpleNamespace(name="logits", type="tensor(float)", shape=[1, self._dimensions])]

    def get_modelmeta(self) -> SimpleNamespace:
        """An object whose ``custom_metadata_map`` is the metadata, a dict of strings."""
        return SimpleNamespace(custom_metadata_map=self._metadata)

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, np.ndarray], options: object = None) -> list[np.ndarray]:
        """The values [1, D] of ``feeds["signal"]``, float32 [1, T].

        Raises:
            RuntimeError: too few samples, or samples that are not finite.
        """
        wave = np.ascontiguousarray(feeds["signal"], np.float32).reshape(-1)
        memory, values = np.empty(self._bytes, np.uint8), np.empty((1, self._dimensions), np.float32)
        check(self._library.w2s_predict(*_sized(memory), *_counted(wave), _place(values)))
        return [values]

    def stream(self, normalisation: str, window: int, hop: int) -> Stream:
        """A new stream; ``window`` and ``hop`` in samples.

        Raises:
            UsageError: settings that the code refuses.
        """
        kind = NORMALISATIONS[normalisation]
        size = self._library.w2s_stream_bytes(kind, ctypes.c_uint32(window), ctypes.c_uint32(hop))
        if not size:
            raise UsageError(
                f"no stream with a window of {window} samples and a hop of {hop}: expected a window that is a multiple of the "
                f"hop, and a hop of at least {self._metadata['token_samples']}"
            )
        scratch = self._scratch_bytes if normalisation == "running" else self._bytes
        return Stream(self._library, self._dimensions, np.zeros(size, np.uint8), scratch, (kind, window, hop))


class Stream:
    """The state of a stream in memory of its own; calls take turns."""

    def __init__(self, library: ctypes.CDLL, dimensions: int, memory: np.ndarray, scratch: int, settings: tuple[int, int, int]):
        self._library, self._dimensions, self._memory = library, dimensions, memory
        self._scratch, self._lock = np.empty(scratch, np.uint8), threading.Lock()
        kind, window, hop = settings
        check(library.w2s_stream_init(*_sized(memory), kind, ctypes.c_uint32(window), ctypes.c_uint32(hop)))

    def push(self, samples: np.ndarray) -> None:
        """Samples [T], float32 or int16."""
        samples = np.ascontiguousarray(samples)
        call = self._library.w2s_stream_push_int16 if samples.dtype == np.int16 else self._library.w2s_stream_push
        with self._lock:
            check(call(_place(self._memory), *_sized(self._scratch), *_counted(samples)))

    def read(self) -> np.ndarray | None:
        """The values [D], None as long as there are none."""
        values = np.empty(self._dimensions, np.float32)
        with self._lock:
            code = self._library.w2s_stream_read(_place(self._memory), *_sized(self._scratch), _place(values))
        return None if code == EARLY else (check(code), values)[1]

    def reset(self) -> None:
        """Forget all samples."""
        check(self._library.w2s_stream_reset(_place(self._memory)))

    @property
    def state(self) -> bytes:
        """All that it remembers."""
        return self._memory.tobytes()

    @state.setter
    def state(self, state: bytes) -> None:
        if len(state) != len(self._memory) or state[:ABOUT] != self._memory[:ABOUT].tobytes():
            raise UsageError(f"expected a state of {len(self._memory)} bytes of a stream with the same model and settings")
        self._memory[:] = np.frombuffer(state, np.uint8)


def is_code(path: str | os.PathLike) -> bool:
    """Whether it is a directory with a student in C."""
    return (Path(path) / SOURCE).is_file() and (Path(path) / HEADER).is_file()


def compiler() -> list[str]:
    """The C compiler as the first words of a command: the variable CC; the first of cc, gcc, clang that is there; or ziglang's.

    Raises:
        UsageError: none of them.
    """
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise UsageError(
        "the kinds c and c-int8 are compiled on first use, and there is no C compiler: none of cc, gcc, clang is on the PATH, "
        f"and CC is not set; get one with {pip_install('c')}, or take another kind"
    )


def _load(directory: Path) -> ctypes.CDLL:
    command, texts = compiler(), [(directory / name).read_bytes() for name in (SOURCE, HEADER)]
    contents = [hashlib.sha256(text).hexdigest() for text in texts]
    exact = b"typedef float cell;" in texts[0]
    flags, failure = [*FLAGS, CONTRACT[exact]], None
    del texts
    for native in (NATIVE.get(platform.machine(), ()), ()):
        try:
            return compiled.load("c", command, [*flags, *native], [directory / SOURCE], contents)
        except subprocess.CalledProcessError as error:  # perhaps it does not know the flags for this processor
            failure = failure or compiled.describe_failure(error)
        except subprocess.TimeoutExpired as error:
            raise W2SError(f"compiling {directory / SOURCE} took more than {error.timeout:g} s") from error
        except OSError as error:
            raise UsageError(f"cannot compile {directory / SOURCE}: {error}; take another kind") from error
    raise W2SError(f"cannot compile {directory / SOURCE}: {failure}; {' '.join(command)} has to know C99")


def _place(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _sized(memory: np.ndarray) -> tuple[ctypes.c_void_p, ctypes.c_size_t]:
    return _place(memory), ctypes.c_size_t(memory.nbytes)


def _counted(samples: np.ndarray) -> tuple[ctypes.c_void_p, ctypes.c_size_t]:
    return _place(samples), ctypes.c_size_t(samples.size)


def check(code: int) -> None:
    """Raise RuntimeError for an error code of w2s_model.h."""
    if code != OK:
        raise RuntimeError(_ERRORS.get(code, f"error {code} of w2s_model.h"))
