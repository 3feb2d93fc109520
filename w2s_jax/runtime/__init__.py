"""Run an exported model with numpy and onnxruntime alone: no jax, no tensorflow, no torch."""

from w2s_jax.runtime.predictor import Predictor

__all__ = ["Predictor"]
