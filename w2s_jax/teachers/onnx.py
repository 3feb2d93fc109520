"""Any ONNX network from waveform to values as a teacher, and DNSMOS as the one that a package carries."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np

from w2s_jax import SAMPLING_RATE
from w2s_jax.errors import UsageError, W2SError, missing_extra
from w2s_jax.files import fingerprint
from w2s_jax.names import check_dimensions, line
from w2s_jax.runtime.predictor import LOGITS
from w2s_jax.runtime.session import onnxruntime_errors, open_session


class OnnxTeacher:
    """An ONNX model of one waveform input and K values output, in one file.

    The input may be [time], [batch, time] or [batch, 1, time], float32 at 16 kHz; batch and time may be fixed or dynamic.
    For a model of fixed length, a shorter view is repeated until it fills the length; for a longer view the outputs of
    consecutive windows are averaged, the last one aligned to the view's end. The output is [batch, K] or [K]. Of several, it is
    the one that ``output`` names, else "logits", else the only one that is as wide as there are names.

    The file is checked before it runs, as for ``Predictor``. One whose weights are in a second file is refused: labels keep a
    fingerprint of the file, which would say nothing of them.

    Args:
        path: the .onnx file.
        dimensions: names of the K values; default: the model's own metadata (``dimensions``, comma separated).
        name, licence: for provenance.
        threads: of onnxruntime; 0 takes all cores.
        output: name of the output, for a model with several.

    Raises:
        UsageError: no such file or output, the file is damaged or is refused, or the model does not have that form; names what
            was found.
    """

    stand_in = False

    def __init__(
        self,
        path: str | os.PathLike,
        dimensions: tuple[str, ...] | None = None,
        name: str | None = None,
        licence: str | None = None,
        threads: int = 0,
        output: str | None = None,
    ) -> None:
        path = Path(path)
        if not path.is_file():
            raise UsageError(f"no teacher at {path}: no such file")
        try:
            self._session, _ = open_session(path, threads)
        except W2SError as error:
            raise UsageError(f"no teacher: {error}") from error
        inputs = self._session.get_inputs()
        form = [line(f"{node.name} {node.type} {node.shape}") for node in inputs]
        if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) not in (1, 2, 3):
            raise UsageError(f"{path}: a teacher has one float input [time], [batch, time] or [batch, 1, time]; got {form}")
        if len(inputs[0].shape) == 3 and inputs[0].shape[1] not in (1, None) and isinstance(inputs[0].shape[1], int):
            raise UsageError(f"{path}: a teacher's input has one channel; got {form}")
        self._input, self._rank = inputs[0].name, len(inputs[0].shape)
        length, batch = inputs[0].shape[-1], inputs[0].shape[0]
        self._length = length if isinstance(length, int) else None
        self._single = self._rank == 1 or batch == 1
        if isinstance(batch, int) and batch != 1 and self._rank > 1:
            raise UsageError(f"{path}: a teacher's batch is dynamic or 1; got {form}")
        metadata = self._session.get_modelmeta().custom_metadata_map
        if metadata.get("sampling_rate", str(SAMPLING_RATE)) != str(SAMPLING_RATE):
            raise UsageError(f"{path} expects {line(metadata['sampling_rate'], 40)} Hz; views have {SAMPLING_RATE} Hz")
        named = tuple(filter(None, metadata.get("dimensions", "").split(",")))
        self.dimensions = check_dimensions(dimensions or named, "the caller" if dimensions else f"the metadata of {path}")
        self._output = self._choose_output(path, output)
        outputs = self._run(np.zeros((1, self._length or SAMPLING_RATE), np.float32)).shape[1]
        # more waves than one tell [batch, K] from its transpose, unless they are K
        self._run(np.zeros((3 if outputs == 2 else 2, self._length or SAMPLING_RATE), np.float32))
        if not self.dimensions:
            raise UsageError(f"{path} does not name its {outputs} outputs; name them: --dimensions {','.join('abc'[:outputs])}")
        if outputs != len(self.dimensions):
            raise UsageError(f"{path} has {outputs} outputs, but the names are {', '.join(self.dimensions)}")
        self.name = line(name or f"onnx:{path.name}")
        self.licence = line(licence or metadata.get("licence") or "unknown: ask whoever made the teacher")
        self.stand_in = metadata.get("stand_in") == "true"
        several = len(self._session.get_outputs()) > 1
        self.fingerprint = fingerprint(path, list(self.dimensions), *([self._output] if several else []))

    def _choose_output(self, path: Path, wanted: str | None) -> str:
        """Name of the output to take."""
        there = {node.name: node.shape for node in self._session.get_outputs()}
        shown = line(", ".join(f"{name} {shape}" for name, shape in there.items()))
        if wanted is not None:
            if wanted not in there:
                raise UsageError(f"{path} has no output {wanted!r}; its outputs are: {shown}")
            return wanted
        if len(there) == 1 or LOGITS in there:
            return LOGITS if LOGITS in there else next(iter(there))
        wide = [name for name, shape in there.items() if len(shape) in (1, 2) and shape[-1] == len(self.dimensions)]
        if len(wide) != 1:
            raise UsageError(f"{path} has several outputs: {shown}; choose one: --output NAME")
        return wide[0]

    def _run(self, waves: np.ndarray) -> np.ndarray:
        if self._single and len(waves) > 1:
            return np.concatenate([self._run(wave[None]) for wave in waves])
        shaped = {1: waves[0], 2: waves, 3: waves[:, None]}[self._rank]
        with onnxruntime_errors(f"the teacher failed on {list(shaped.shape)}"):
            output = np.asarray(self._session.run([self._output], {self._input: shaped})[0], np.float32)
        if output.ndim == 1:  # [K] of one wave, or one value of each
            output = output.reshape((1, -1) if len(waves) == 1 else (-1, 1))
        if output.ndim != 2 or len(output) != len(waves):
            raise UsageError(f"a teacher's output is [batch, K]; got {list(output.shape)} for a batch of {len(waves)}")
        return output

    def __call__(self, waves: np.ndarray) -> np.ndarray:
        waves = np.ascontiguousarray(waves, np.float32)
        if self._length is None or waves.shape[1] == self._length:
            return self._run(waves)
        if waves.shape[1] < self._length:
            return self._run(np.take(waves, np.arange(self._length), axis=1, mode="wrap"))
        starts = [*range(0, waves.shape[1] - self._length, self._length), waves.shape[1] - self._length]
        return np.mean([self._run(waves[:, at : at + self._length]) for at in starts], axis=0, dtype=np.float32)


def dnsmos(checkpoint_dir: str | os.PathLike | None = None) -> OnnxTeacher:
    """DNSMOS P.835 (Reddy et al. 2022): signal, background and overall quality of noisy speech, about 1..5.

    The raw outputs of the network, without the polynomial that the package puts behind them. The file comes with the PyPI
    package speechmos, or lies in ``checkpoint_dir`` as sig_bak_ovr.onnx.
    """
    if checkpoint_dir is None:
        package = importlib.util.find_spec("speechmos")  # found, not imported: its import needs half a dozen packages
        if package is None:
            raise missing_extra("speechmos", "teacher")
        checkpoint_dir = Path(package.submodule_search_locations[0]) / "dnsmos_models"
    return OnnxTeacher(
        Path(checkpoint_dir) / "sig_bak_ovr.onnx",
        dimensions=("sig", "bak", "ovrl"),
        name="dnsmos",
        licence="MIT (speechmos)",
    )
