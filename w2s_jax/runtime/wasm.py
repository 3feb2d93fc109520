"""A student in WebAssembly, run by wasmtime, behind the few methods of onnxruntime's session that this package uses."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from w2s_jax.errors import UsageError, W2SError, missing_extra
from w2s_jax.kinds import WASM
from w2s_jax.runtime import c


def is_module(path: str | os.PathLike) -> bool:
    """Whether it is a directory with a student in WebAssembly."""
    return (Path(path) / WASM).is_file()


class _Instance:
    """An instance of a module, with memory that is taken from behind its own."""

    def __init__(self, engine, module) -> None:
        import wasmtime

        self.store = wasmtime.Store(engine)
        self._exports = wasmtime.Instance(self.store, module, []).exports(self.store)
        self.memory = self._exports["memory"]
        self.end = self._exports["__heap_base"].value(self.store)
        self.call("w2s_unpack")

    def call(self, name: str, *arguments: int) -> int:
        return self._exports[name](self.store, *arguments)

    def take(self, size: int) -> int:
        place = self.end + 63 & ~63
        self.end = place + size
        missing = self.end - self.memory.data_len(self.store)
        if missing > 0:
            self.memory.grow(self.store, -(-missing // 65536))
        return place

    def read(self, place: int, size: int) -> bytes:
        return bytes(self.memory.read(self.store, place, place + size))

    def write(self, place: int, content: bytes) -> None:
        self.memory.write(self.store, content, place)

    def text(self, place: int) -> str:
        content = self.read(place, self.memory.data_len(self.store) - place)
        return content[: content.index(0)].decode()


class Session:
    """A directory with a module, with the methods of ``onnxruntime.InferenceSession`` that ``Predictor`` calls, and streams.

    Args:
        directory: with w2s_model.wasm.

    Raises:
        UsageError: wasmtime is not installed.
        W2SError: the file is no module of this package's.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        try:
            import wasmtime
        except ModuleNotFoundError as error:
            raise missing_extra("wasmtime", "wasm") from error
        path = Path(directory) / WASM
        self._lock = threading.Lock()
        try:
            self._engine = wasmtime.Engine()
            self._module = wasmtime.Module(self._engine, path.read_bytes())
            self._instance = instance = _Instance(self._engine, self._module)
            self._dimensions, self._bytes, self._scratch_bytes = (instance.call("w2s_constant", at) for at in (1, 2, 3))
            self._metadata = json.loads(instance.text(instance.call("w2s_constant", 4)))
            self._work, self._values = instance.take(self._bytes), instance.take(4 * self._dimensions)
            self._base = instance.end
        except (wasmtime.WasmtimeError, wasmtime.Trap, KeyError, ValueError, AttributeError) as error:
            raise W2SError(f"{path} is no module of this package: {str(error).splitlines()[0]}") from error

    get_inputs = c.Session.get_inputs
    get_outputs = c.Session.get_outputs
    get_modelmeta = c.Session.get_modelmeta

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, np.ndarray], options: object = None) -> list[np.ndarray]:
        """The values [1, D] of ``feeds["signal"]``, float32 [1, T].

        Raises:
            RuntimeError: too few samples, or samples that are not finite.
        """
        wave, instance = np.ascontiguousarray(feeds["signal"], np.float32).reshape(-1), self._instance
        with self._lock:
            instance.end = self._base
            place = instance.take(wave.nbytes)
            instance.write(place, wave.tobytes())
            c.check(instance.call("w2s_predict", self._work, self._bytes, place, wave.size, self._values))
            return [np.frombuffer(instance.read(self._values, 4 * self._dimensions), np.float32)[None]]

    def stream(self, normalisation: str, window: int, hop: int) -> Stream:
        """A new stream; ``window`` and ``hop`` in samples.

        Raises:
            UsageError: settings that the code refuses.
        """
        kind = c.NORMALISATIONS[normalisation]
        scratch = self._scratch_bytes if kind == 0 else self._bytes
        return Stream(_Instance(self._engine, self._module), self._dimensions, scratch, (kind, window, hop))


class Stream:
    """A stream in an instance of its own."""

    #: Samples that are pushed at once.
    PIECE = 1 << 16

    def __init__(self, instance: _Instance, dimensions: int, scratch: int, settings: tuple[int, int, int]) -> None:
        self._instance, self._dimensions = instance, dimensions
        self._size = instance.call("w2s_stream_bytes", *settings)
        if not self._size:
            _, window, hop = settings
            raise UsageError(
                f"no stream with a window of {window} samples and a hop of {hop}: expected a window that is a multiple of the "
                "hop, and a hop of at least a token"
            )
        sizes = (self._size, scratch, 4 * dimensions, 4 * self.PIECE)
        self._memory, self._scratch, self._values, self._piece = map(instance.take, sizes)
        self._work = self._scratch, scratch
        c.check(instance.call("w2s_stream_init", self._memory, self._size, *settings))

    def push(self, samples: np.ndarray) -> None:
        """Samples [T], float32 or int16."""
        name = "w2s_stream_push_int16" if samples.dtype == np.int16 else "w2s_stream_push"
        for at in range(0, len(samples), self.PIECE):
            piece = np.ascontiguousarray(samples[at : at + self.PIECE])
            self._instance.write(self._piece, piece.tobytes())
            c.check(self._instance.call(name, self._memory, *self._work, self._piece, piece.size))

    def read(self) -> np.ndarray | None:
        """The values [D], None as long as there are none."""
        code = self._instance.call("w2s_stream_read", self._memory, *self._work, self._values)
        if code == c.EARLY:
            return None
        c.check(code)
        return np.frombuffer(self._instance.read(self._values, 4 * self._dimensions), np.float32)

    def reset(self) -> None:
        """Forget all samples."""
        c.check(self._instance.call("w2s_stream_reset", self._memory))

    @property
    def state(self) -> bytes:
        """All that it remembers."""
        return self._instance.read(self._memory, self._size)

    @state.setter
    def state(self, state: bytes) -> None:
        if len(state) != self._size or state[: c.ABOUT] != self.state[: c.ABOUT]:
            raise UsageError(f"expected a state of {self._size} bytes of a stream with the same model and settings")
        self._instance.write(self._memory, state)
