"""Speech emotion on tiny hardware: distil large teachers into Wav2Small with JAX, run it as a small ONNX.

The package has layers, which pyproject.toml lists. The lowest import least: ``w2s_jax.runtime`` needs numpy and onnxruntime
only, so nothing heavy is imported here.
"""

__version__ = "0.1.0"

#: The outputs of an emotion model, in this order, everywhere.
DIMENSIONS = ("arousal", "dominance", "valence")

#: Every network here takes 16 kHz mono.
SAMPLING_RATE = 16_000

#: Added to the variance where an utterance is normalised, so that silence stays zero.
NORM_EPSILON = 1e-7
