"""A .tflite file behind the few methods of onnxruntime's session that this package uses."""

from __future__ import annotations

import functools
import importlib
import io
import json
import math
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np

from w2s_jax.errors import W2SError, missing_extra

#: The file with the metadata, in a zip archive behind the network, as TensorFlow Lite's "associated files" are.
MEMBER = "w2s_jax.json"
#: The key of the metadata with the network's checksum.
CHECKSUM = "crc32"
#: Bytes 4 to 8 of every TensorFlow Lite network.
_IDENTIFIER = b"TFL3"
#: Limits in bytes: of the metadata, and of a tensor of the network at the input length that is in the file.
_LARGEST_METADATA, _LARGEST_TENSOR = 1 << 20, 1 << 29

#: An interpreter keeps the memory of its longest input (7 MB per second of audio for a Wav2Small). It is replaced for an input
#: that is this many times shorter.
_SHRINK = 8


class Session:
    """A .tflite file on the CPU, with the methods of ``onnxruntime.InferenceSession`` that ``Predictor`` calls.

    It may be called from several threads, which take turns.

    Args:
        source: a file with one float input [1, time], or its content.
        threads: CPU threads per call.

    Raises:
        UsageError: no interpreter is installed; names the extra.
        W2SError: the file is damaged, no network of TensorFlow Lite, or refused: it has control flow or giant tensors.
    """

    def __init__(self, source: str | os.PathLike | bytes, threads: int = 1):
        name = "the model" if isinstance(source, bytes) else str(source)
        network, self._metadata = read(source if isinstance(source, bytes) else _content(source), name)
        _check_subgraphs(network, name)
        self._make = functools.partial(_interpreter(), model_content=network, num_threads=threads)
        try:
            self._interpreter = self._make()
            self._inputs = self._interpreter.get_input_details()
            self._outputs = self._interpreter.get_output_details()
            for tensor in self._interpreter.get_tensor_details():
                size = math.prod(int(length) for length in tensor["shape"]) * np.dtype(tensor["dtype"]).itemsize
                if size > _LARGEST_TENSOR:
                    raise W2SError(f"{name} is refused: a tensor of {size} bytes, at most {_LARGEST_TENSOR} are allowed")
        except W2SError:
            raise
        except (ValueError, RuntimeError) as error:
            raise W2SError(f"{name} is damaged: {' '.join(str(error).split())[:300]}") from error
        self._shape: tuple[int, ...] | None = None
        self._largest = 0
        self._lock = threading.Lock()

    def get_inputs(self) -> list[SimpleNamespace]:
        """Name, type ("tensor(float)") and shape (None where it is dynamic) of each input."""
        return [_end(details) for details in self._inputs]

    def get_outputs(self) -> list[SimpleNamespace]:
        """The same of each output."""
        return [_end(details) for details in self._outputs]

    def get_modelmeta(self) -> SimpleNamespace:
        """An object whose ``custom_metadata_map`` is the file's metadata, a dict of strings."""
        return SimpleNamespace(custom_metadata_map=self._metadata)

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, np.ndarray], options: object = None) -> list[np.ndarray]:
        """Compute the outputs for one input.

        Args:
            names: of the wanted outputs; None for all.
            feeds: the input's name → float32 [1, T].
            options: those of onnxruntime; they change nothing here.

        Raises:
            KeyError: no such input or output.
            ValueError, RuntimeError: the interpreter's, as for an input that is too short.
        """
        (inward,) = self._inputs
        wave = np.asarray(feeds[inward["name"]], np.float32)
        places = {details["name"]: details["index"] for details in self._outputs}
        wanted = [places[name] for name in (places if names is None else names)]
        with self._lock:
            if wave.shape != self._shape:
                self._allocate(wave.shape)
            self._interpreter.set_tensor(inward["index"], wave)
            self._interpreter.invoke()
            return [self._interpreter.get_tensor(place) for place in wanted]  # copies

    def _allocate(self, shape: tuple[int, ...]) -> None:
        size = math.prod(shape)
        renew = self._shape is None or _SHRINK * size < self._largest
        self._shape = None  # until all of it has succeeded: a failure leaves the interpreter in no known state
        if renew:
            self._interpreter = None  # gives its memory back first
            self._interpreter, self._largest = self._make(), 0
        self._interpreter.resize_tensor_input(self._inputs[0]["index"], shape)
        self._interpreter.allocate_tensors()
        self._shape, self._largest = shape, max(size, self._largest)


def _content(path: str | os.PathLike) -> bytes:
    """All of a file that has the mark; the first bytes of another, however large it is."""
    with open(path, "rb") as file:
        head = file.read(64)
        return head + file.read() if head[4:8] == _IDENTIFIER else head


def read(content: bytes, name: str = "the model") -> tuple[bytes, dict[str, str]]:
    """Split the content of a .tflite file into the network and its metadata (empty in a file that w2s_jax has not made).

    Raises:
        W2SError: the file is damaged, or something else; ``name`` is for the message.
    """
    if content[4:8] != _IDENTIFIER:
        raise W2SError(f"{name} is damaged or not a TensorFlow Lite model: it begins without its mark")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            network = content[: min(entry.header_offset for entry in archive.infolist())]
            metadata = {}
            if MEMBER in archive.namelist():
                with archive.open(MEMBER) as file:  # never read whole: a zip archive may hold a thousand times its size
                    text = file.read(_LARGEST_METADATA + 1)
                if len(text) > _LARGEST_METADATA:
                    raise ValueError(f"more than {_LARGEST_METADATA} bytes")
                metadata = json.loads(text)
    except Exception as error:  # zipfile's and zlib's exception classes share no base and depend on the fault
        if MEMBER.encode() in content:
            raise W2SError(f"{name} is damaged: its description cannot be read ({' '.join(str(error).split())})") from error
        return content, {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise W2SError(f"{name} is damaged: expected strings in {MEMBER}")
    if CHECKSUM in metadata and metadata[CHECKSUM] != checksum(network):
        raise W2SError(f"{name} is damaged: its checksum is {checksum(network)}, expected {metadata[CHECKSUM]}")
    return network, metadata


def _check_subgraphs(network: bytes, name: str) -> None:
    """Refuse loops and branches, which TensorFlow Lite keeps in subgraphs of their own.

    The layout is that of FlatBuffers: a table begins with the distance to its list of fields; ``subgraphs`` is the third.
    """
    try:
        (root,) = struct.unpack_from("<I", network, 0)
        fields = root - struct.unpack_from("<i", network, root)[0]
        (place,) = struct.unpack_from("<H", network, fields + 8) if fields >= 0 else (0,)
        vector = root + place + struct.unpack_from("<I", network, root + place)[0]
        (subgraphs,) = struct.unpack_from("<I", network, vector)
    except struct.error as error:
        raise W2SError(f"{name} is damaged: {error}") from error
    if not place:
        raise W2SError(f"{name} is damaged: it has no graph")
    if subgraphs != 1:
        raise W2SError(f"{name} is refused: expected one graph, without loops and branches, got {subgraphs}")


def checksum(network: bytes) -> str:
    """CRC-32 in hexadecimal digits."""
    return f"{zlib.crc32(network):08x}"


def _interpreter() -> type:
    """The class of the first interpreter that is installed; the small packages come before TensorFlow."""
    for module in ("ai_edge_litert.interpreter", "tflite_runtime.interpreter", "tensorflow.lite.python.interpreter"):
        try:
            return importlib.import_module(module).Interpreter
        except ImportError:
            continue
    raise missing_extra("ai-edge-litert", "litert")


def _end(details: dict) -> SimpleNamespace:
    kind = "float" if details["dtype"] is np.float32 else np.dtype(details["dtype"]).name
    shape = [None if size < 0 else int(size) for size in details["shape_signature"]]
    return SimpleNamespace(name=details["name"], type=f"tensor({kind})", shape=shape)
