"""The kinds of file that a student can be exported as; ``export.build`` has the builder of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        file: its name in a model directory.
        purpose: what it is for, in the model card.
        exact: it computes what the student computes; other kinds round, and are judged by their CCC with fp32 on real audio.
        calibrated: it multiplies eight-bit numbers, whose ranges are measured on real audio.
        requires: what the student's plan must have, one of the values of ``export.direct.HEADS``; None where any student can
            have this kind.
    """

    file: str
    purpose: str
    exact: bool = False
    calibrated: bool = False
    requires: str | None = None


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
}
#: What is exported by default.
DEFAULT = ("fp32", "int8")
#: kind → file of a model directory.
FILES = {name: kind.file for name, kind in KINDS.items()}
#: Kinds that multiply unsigned 8-bit activations by signed weights, in onnxruntime and in other engines.
INTEGER_KINDS = tuple(name for name, kind in KINDS.items() if kind.calibrated)
