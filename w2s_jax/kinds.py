"""The kinds of file that a student can be exported as."""

from __future__ import annotations

#: kind → file of a model directory.
FILES = {
    "fp32": "model.onnx",
    "fp16w": "model.fp16w.onnx",
    "int8w": "model.int8w.onnx",
    "int8": "model.int8.onnx",
    "qdq": "model.qdq.onnx",
    "int8-int4": "model.int8-int4.onnx",
    "litert": "model.tflite",
    "litert-int8": "model.int8.tflite",
    "chunked": "model.chunked.onnx",
}
