"""The kinds of file that a student can be exported as; ``export.build`` has the builder of each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        file: its name in a model directory; of a directory, where the kind consists of several files.
        purpose: what it is for, in the model card.
        exact: it computes what the student computes; other kinds round, and are judged by their CCC with fp32 on real audio.
        calibrated: it multiplies eight-bit numbers, whose ranges are measured on real audio.
        requires: what the student's plan must have, one of the values of ``export.direct.HEADS``, or "trunk": a chain of
            convolutions behind a log-mel front end; None where any student can have this kind.
        parts: names of the files in ``file``, where that is a directory.
    """

    file: str
    purpose: str
    exact: bool = False
    calibrated: bool = False
    requires: str | None = None
    parts: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Its files in a model directory, directories separated by "/"."""
        return tuple(f"{self.file}/{part}" for part in self.parts) or (self.file,)


#: The files of a student in C: code and weights, and what may be called of it.
SOURCE, HEADER = "w2s_model.c", "w2s_model.h"
_C = (HEADER, SOURCE, "example.c", "README.md")
#: The files of a student in WebAssembly.
WASM, MODULE = "w2s_model.wasm", "w2s_model.mjs"
KINDS = {
    "fp32": Kind("model.onnx", "everything that reads ONNX", exact=True),
    "fp16w": Kind("model.fp16w.onnx", "fp32 in half the bytes"),
    "int8w": Kind("model.int8w.onnx", "fp32 in a quarter of the bytes"),
    "int8": Kind("model.int8.onnx", "onnxruntime, small and fast", calibrated=True),
    "qdq": Kind("model.qdq.onnx", "8 bits in standard operators: OpenVINO and others", calibrated=True),
    "int8-int4": Kind("model.int8-int4.onnx", "onnxruntime, smallest", calibrated=True, requires="tokens"),
    "litert": Kind("model.tflite", "TensorFlow Lite", exact=True),
    "litert-int8": Kind("model.int8.tflite", "TensorFlow Lite, small and fast"),
    "chunked": Kind("model.chunked.onnx", "recordings of any length, piece by piece", exact=True, requires="attention"),
    "c": Kind("model_c", "C99: any CPU, streams, no runtime", exact=True, requires="trunk", parts=_C),
    "wasm": Kind("model_wasm", "web pages, workers, node", requires="trunk", parts=(WASM, MODULE, "README.md")),
    "c-int8": Kind("model_c_int8", "c in 8 bits: microcontrollers", calibrated=True, requires="trunk", parts=_C),
}
#: What is exported by default.
DEFAULT = ("fp32", "int8")
#: kind → file of a model directory.
FILES = {name: kind.file for name, kind in KINDS.items()}
#: Kinds that multiply unsigned 8-bit activations by signed weights with the operators of onnxruntime and other engines.
INTEGER_KINDS = tuple(name for name, kind in KINDS.items() if kind.calibrated and not kind.parts)


def has_parts(path: str | os.PathLike) -> bool:
    """Whether it is the directory of a kind that consists of several files."""
    return any(all((Path(path) / name).is_file() for name in names) for names in ((SOURCE, HEADER), (WASM,)))


def size_of(file: Path) -> int:
    """Bytes of a model: of a file, or of all files of a directory."""
    return sum(part.stat().st_size for part in file.iterdir()) if file.is_dir() else file.stat().st_size
