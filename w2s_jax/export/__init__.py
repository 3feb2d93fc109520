"""From a trained student to a model directory: ONNX in fp32 and int8, a model card, and proof that they equal the student."""

from w2s_jax.export.package import export_student

__all__ = ["export_student"]
