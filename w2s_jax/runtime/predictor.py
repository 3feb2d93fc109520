"""Named values from a waveform, whole or in windows, by a model directory or any ONNX file with the same two ends."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from w2s_jax import NORM_EPSILON, SAMPLING_RATE
from w2s_jax.errors import MismatchError, UsageError, W2SError
from w2s_jax.kinds import FILES, has_parts, size_of
from w2s_jax.names import check_dimensions, line
from w2s_jax.runtime.session import onnxruntime_errors, open_session, shrinking
from w2s_jax.runtime.stream import SAMPLES_AT_ONCE, Ring, Stream, check_samples

SIGNAL, LOGITS = "signal", "logits"
#: The other inputs and the other output of the kind "chunked".
CARRIED, NEXT = ("state", "first", "last"), "next"
#: The largest state of the kind "chunked" that a file may ask for, in features; the students here have some hundred.
MOST_FEATURES = 1 << 16
#: Calls of more samples than these (30 s) free their memory at the end; shorter ones keep it for the next call.
LONG = 30 * SAMPLING_RATE
#: The shortest input of a file without such metadata: one STFT frame of Wav2Small.
MINIMUM_SAMPLES = 64
#: Rates in Hz that a file may ask for.
RATES = 1000, 384_000
#: The largest ``minimum_samples`` that a file may ask for: 10 minutes.
LONGEST_MINIMUM = 600 * SAMPLING_RATE


class Predictor:
    """An exported model, ready to run: ``predictor(wave, sampling_rate)`` → ``{"arousal": 0.61, ...}``.

    One predictor may be called from several threads at once. Memory does not grow from call to call, whatever the lengths;
    a call needs about 2 MB per second of audio. For hours there are :meth:`windows`, and the kind "chunked", which computes the
    values of a whole recording in a few MB (of a memory-mapped array, too).

    A file is checked before it runs: one that is damaged, loops, reads other files or asks for absurd sizes is refused. Files
    of a model directory are compared with the checksums in its export.json, if there is one. A predictor can be pickled: the
    pickle has the path, and the file is opened again.

    Args:
        path: a model directory, or a file (.onnx, .tflite) with input ``signal`` float32 [1, time], output ``logits`` [1, D];
            further outputs, such as ``hidden_states``, are left alone.
        kind: which file of a directory, a key of ``FILES``: "fp32" (the default), "int8", …
        threads: CPU threads per call.
        dimensions: names of the D outputs, for a file whose metadata has none.

    Attributes:
        dimensions: tuple of names, in output order.
        metadata: that of the file, a dict of strings.
        sampling_rate: of the network's input, in Hz.
        minimum_samples: the shortest input at that rate.
        path: the .onnx file.

    Raises:
        UsageError: nothing at that path, no such kind, another kind of network, or 8-bit weights on a processor whose sums of
            them overflow.
        MismatchError: the names given are not as many as the outputs, or not those in the file.
        W2SError: the file is damaged or is refused; gives the reason.

    Example:
        >>> predictor = Predictor("model", kind="int8")  # doctest: +SKIP
        >>> predictor(wave, 16000)  # doctest: +SKIP
        {'arousal': 0.61, 'dominance': 0.58, 'valence': 0.40}
    """

    def __init__(
        self,
        path: str | os.PathLike,
        kind: str | None = None,
        threads: int = 1,
        dimensions: Sequence[str] | None = None,
    ):
        self.path = _model_file(Path(path), kind)
        self._made = threads, None if dimensions is None or isinstance(dimensions, str) else tuple(dimensions)
        self._session, _ = open_session(self.path, threads)
        outputs = self._check_ends()
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self.dimensions = self._names(dimensions, outputs)
        self.sampling_rate = self._number("sampling_rate", SAMPLING_RATE, *RATES)
        self.minimum_samples = self._number("minimum_samples", MINIMUM_SAMPLES, 1, LONGEST_MINIMUM)
        self._chunks = ChunkRunner(self._session, self.path) if len(self._session.get_inputs()) > 1 else None

    def __reduce__(self) -> tuple:
        threads, dimensions = self._made
        return type(self), (str(self.path.absolute()), None, threads, dimensions)

    def __call__(self, wave: np.ndarray, sampling_rate: int = SAMPLING_RATE) -> dict[str, float]:
        """Predict the values of one recording.

        Silence is an input like any other: the network maps every silent (or constant) recording to the same finite values,
        which mean nothing.

        Args:
            wave: floating point [T], [1, T], or [2, T], whose two channels are averaged. More rows may be a batch, which is
                refused: call for each clip, or average the channels before (``wave.mean(axis=0)``). The level does
                not matter to the students here, unless it is close to silence (root mean square below about 0.005).
            sampling_rate: of ``wave``, in Hz; other rates than the network's are resampled (needs soxr).

        Returns:
            A float for each name in ``dimensions``; not clipped.

        Raises:
            UsageError: another shape or type, or fewer than ``minimum_samples``.
            W2SError: a sample is not finite (names the first), or so large that the network overflows.
        """
        return self._run(self._prepare(wave, sampling_rate))

    def windows(
        self,
        wave: np.ndarray | Iterable[np.ndarray],
        sampling_rate: int = SAMPLING_RATE,
        window: float = 5.0,
        hop: float = 1.0,
    ) -> Iterator[tuple[float, float, dict[str, float]]]:
        """Predict values over time, for each window on its own.

        Windows begin at 0, hop, 2·hop, ... as long as they fit. If the last of them ends before the audio does, one more is
        aligned with the end of the audio: every sample is in a window (unless ``hop`` is larger than ``window``). Audio that is
        shorter than a window is one shorter window.

        Args:
            wave: floating point [T], [1, T] or [2, T], as for a call; or an iterable of blocks [T] of any lengths at the
                network's rate, such as ``w2s_jax.audio.blocks`` gives, of which no more than two windows and one block are
                ever held.
            sampling_rate: of ``wave``, in Hz; blocks must be at the network's.
            window, hop: in seconds; ``w2s predict`` has the window for a hop unless told otherwise.

        Returns:
            An iterator of (start, end, values), start and end in seconds.

        Raises:
            UsageError: a window shorter than ``minimum_samples``, a hop of less than a sample, blocks at another rate; and,
                when the iterator gets there, as for a call.
            W2SError: as for a call, when the iterator gets there; positions count from the start of the audio.
        """
        if not (math.isfinite(window) and math.isfinite(hop)):
            raise UsageError(f"window and hop are seconds, got {window} and {hop}")
        size, step = round(window * self.sampling_rate), round(hop * self.sampling_rate)
        if size < self.minimum_samples:
            raise UsageError(f"a window needs at least {self.minimum_samples} samples, got {window} s = {size}")
        if step < 1:
            raise UsageError(f"hop must be at least one sample, got {hop} s")
        if isinstance(wave, np.ndarray):
            return self._slide([self._prepare(wave, sampling_rate)], size, step)
        if sampling_rate != self.sampling_rate:
            raise UsageError(f"blocks must be at {self.sampling_rate} Hz, got {sampling_rate}; resample them, or give an array")
        return self._slide(self._blocks(wave), size, step)

    def stream(self, window: float = 5.0, hop: float = 0.25, normalisation: str = "window") -> Stream:
        """Start a stream: samples go in as they come, and values of the last seconds come out at any moment.

        Args:
            window, hop: in seconds. Values are of the last window; a hop of it is forgotten at once.
            normalisation: what the level of the samples is measured on. "window": each window on its own, so that values are
                those of :meth:`windows`, for which every reading computes the whole window. "running": on all samples so far,
                from one window on with exponential forgetting, so that nothing is computed twice; the kinds "c" and "c-int8"
                have it. Values then are not those of the window alone, and before a window has been heard they follow the
                first sounds.

        Raises:
            UsageError: another normalisation, one that this kind does not have, or settings that fit no stream.
        """
        return Stream(self, window, hop, normalisation)

    def __str__(self) -> str:
        about = {key: line(value) for key, value in self.metadata.items()}
        kind = about.get("kind")
        parameters = f"{int(about['parameters']):,} parameters" if _whole(about.get("parameters", "")) else None
        size = f"{size_of(self.path) / 1000:.0f} kB" if self.path.exists() else None
        teacher = about.get("teacher", "not recorded")
        if about.get("teacher_fingerprint"):
            teacher += f" ({about['teacher_fingerprint']})"
        lines = {
            "file": ", ".join(part for part in (str(self.path), kind, size) if part),
            "student": ", ".join(part for part in (about.get("student", "not recorded"), parameters) if part),
            "dimensions": ", ".join(self.dimensions),
            "input": f"mono, {self.sampling_rate} Hz, at least {self.minimum_samples} samples",
            "teacher": teacher,
            "licence": about.get("licence", "not recorded"),
            "made with": f"w2s_jax {about['w2s_jax']}" if "w2s_jax" in about else "not recorded",
        }
        text = "\n".join(f"{name:<11} {value}" for name, value in lines.items())
        if about.get("stand_in") == "true":
            text += (
                "\nSTAND-IN    the teacher only imitates a real one; these values show that the pipeline works, nothing else"
            )
        second = f', kind="{kind}"' if self.path.name == FILES.get(kind) and kind != "fp32" else ""
        place = self.path.parent if self.path.name in FILES.values() else self.path
        return f'{text}\n\npredictor = Predictor("{place}"{second})\npredictor(wave, sampling_rate)  # wave: float [T]'

    def __repr__(self) -> str:
        return f"Predictor({str(self.path)!r}: {', '.join(self.dimensions)})"

    def _check_ends(self) -> int:
        """The number of outputs D, once the session has the input and the output that every model here has."""
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        ends = [(end.name, end.type, end.shape) for end in (*inputs, *outputs)]
        names = [tuple(end.name for end in part) for part in (inputs, outputs)]
        signal, logits = inputs[0] if inputs else None, next((end for end in outputs if end.name == LOGITS), None)
        fits = (
            signal is not None
            and logits is not None
            and (names[0] == (SIGNAL,) or names == [(SIGNAL, *CARRIED), (LOGITS, NEXT)])
            and [end.type for end in (signal, logits)] == ["tensor(float)"] * 2
            and [len(end.shape) for end in (signal, logits)] == [2, 2]
            and isinstance(logits.shape[1], int)
            and logits.shape[1] > 0
        )
        if not fits:
            got = line(", ".join(f"{name} {shape} {kind}" for name, kind, shape in ends))
            raise UsageError(
                f"{self.path}: expected float inputs and outputs {SIGNAL} [1, time] and {LOGITS} [1, D], got {got}"
            )
        return logits.shape[1]

    def _names(self, given: Sequence[str] | None, outputs: int) -> tuple[str, ...]:
        recorded = tuple(name for name in self.metadata.get("dimensions", "").split(",") if name)
        check_dimensions(recorded, f"the metadata of {self.path}")
        if isinstance(given, str):
            raise UsageError(f"dimensions is a list of names, got the string {given!r}")
        if given is not None and recorded and tuple(given) != recorded:
            raise MismatchError(f"{self.path} has the dimensions {', '.join(recorded)}, not {', '.join(given)}")
        names = recorded or check_dimensions(given or (), "the caller")
        if not names:
            raise UsageError(
                f"the metadata of {self.path} does not name its {outputs} outputs; give them: Predictor(path, dimensions=[...])"
            )
        if len(names) != outputs:
            raise MismatchError(f"{self.path} has {outputs} outputs, but {len(names)} names: {', '.join(names)}")
        return names

    def _number(self, key: str, default: int, least: int, most: int) -> int:
        value = self.metadata.get(key, str(default))
        if not _whole(value) or not least <= int(value) <= most:
            raise W2SError(
                f"{self.path}: metadata {key} is {line(repr(value), 40)}, expected a whole number from {least} to {most}"
            )
        return int(value)

    def _prepare(self, wave: np.ndarray, sampling_rate: int) -> np.ndarray:
        """Check, mix down, resample: → float32 [T] at the network's rate."""
        path = isinstance(wave, str | os.PathLike)
        wave = np.asarray(wave)
        if wave.ndim == 2 and wave.shape[0] in (1, 2) and wave.shape[0] <= wave.shape[1]:
            wave = check_samples(wave.reshape(-1), 0, wave.shape[1]).reshape(wave.shape).mean(axis=0)
        elif wave.ndim == 1:
            wave = check_samples(wave, 0)
        elif wave.ndim == 2:
            ways = "turn it round (wave.T)" if wave.shape[1] <= 2 else "average its channels (wave.mean(axis=0))"
            raise UsageError(
                f"expected one recording, [T] or [2, T], got {list(wave.shape)}: {ways}, or call for each clip of a batch"
            )
        else:
            given = "a path: read the file first (w2s_jax.audio.load, soundfile.read)" if path else list(wave.shape)
            raise UsageError(f"expected a waveform [T], [1, T] or [2, T], got {given}")
        if sampling_rate != self.sampling_rate:
            if not sampling_rate > 0:
                raise UsageError(f"expected a sampling rate in Hz, got {sampling_rate}")
            import soxr

            wave = soxr.resample(wave, sampling_rate, self.sampling_rate)
        return wave

    def _blocks(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        position = 0
        for block in blocks:
            block = np.asarray(block)
            if block.ndim != 1:
                raise UsageError(f"expected blocks [T], got one of shape {list(block.shape)}")
            yield check_samples(block, position)
            position += len(block)

    def _slide(self, blocks: Iterable[np.ndarray], size: int, step: int) -> Iterator[tuple[float, float, dict[str, float]]]:
        ring = Ring(size)
        due = size  # where the next window ends
        end = 0  # of the last window
        for block in blocks:
            while ring.end + len(block) >= due:
                head, block = np.split(block, [due - ring.end])
                ring.push(head)
                yield self._predict_last(ring)
                end, due = due, due + step
            ring.push(block)
        if end < ring.end or end == 0:
            yield self._predict_last(ring)

    def _predict_last(self, ring: Ring) -> tuple[float, float, dict[str, float]]:
        wave = ring.last()
        values = self._run(wave)
        return (ring.end - len(wave)) / self.sampling_rate, ring.end / self.sampling_rate, values

    def _run(self, wave: np.ndarray) -> dict[str, float]:
        if len(wave) < self.minimum_samples:
            raise UsageError(f"expected at least {self.minimum_samples} samples at {self.sampling_rate} Hz, got {len(wave)}")
        too_long = (
            f"{self.path} needs too much memory for {len(wave)} samples; judge it in windows (Predictor.windows, --window)"
        )
        with onnxruntime_errors(f"{self.path} failed on {len(wave)} samples", too_long):
            if self._chunks is not None:
                logits = self._chunks(wave)
            else:
                (logits,) = self._session.run([LOGITS], {SIGNAL: wave[None]}, shrinking() if len(wave) > LONG else None)
        if logits.shape != (1, len(self.dimensions)):
            raise W2SError(f"{self.path} gave values of the shape {list(logits.shape)}, expected [1, {len(self.dimensions)}]")
        if not np.isfinite(logits).all():
            raise W2SError(
                f"{self.path} gave values that are not finite; the largest sample is {np.abs(wave).max():.3g}, expected about 1"
            )
        return dict(zip(self.dimensions, logits[0].tolist(), strict=True))


def is_chunked(names: Sequence[str]) -> bool:
    """Whether a model with inputs of these names is of the kind "chunked"."""
    return tuple(names) == (SIGNAL, *CARRIED)


class ChunkRunner:
    """Runs a model of the kind "chunked" over a recording chunk by chunk; the result is that of the whole recording.

    Args:
        session: of the kind "chunked"; its metadata says how to cut.
        path: for messages.

    Raises:
        W2SError: the metadata does not say how to cut, or the state has another shape.
    """

    def __init__(self, session, path: str | os.PathLike):
        self._session = session
        try:
            said = session.get_modelmeta().custom_metadata_map["chunk"]
            cut = json.loads(said)
            numbers = [cut[key] for key in ("stride", "halo", "tokens", "hop", "n_fft")]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise W2SError(f"{path}: its metadata does not say how to cut a recording: {line(error, 300)}") from error
        self._stride, self._halo, self._tokens, self._hop, self._n_fft = numbers
        whole = all(type(number) is int and 0 <= number <= LONGEST_MINIMUM for number in numbers)
        if not whole or not self._stride * self._tokens * self._hop * self._n_fft or self._halo % self._stride:
            raise W2SError(
                f"{path}: its metadata says to cut a recording by {line(said, 100)}; expected whole numbers from 1 to "
                f"{LONGEST_MINIMUM}, the halo a multiple of the stride"
            )
        shape = session.get_inputs()[1].shape
        if len(shape) != 2 or shape[0] != 3 or not isinstance(shape[1], int) or not 0 < shape[1] <= MOST_FEATURES:
            raise W2SError(f"{path}: expected a state [3, features], at most {MOST_FEATURES}, got {line(shape, 100)}")
        self._start = first_state(shape[1])

    def __call__(self, wave: np.ndarray) -> np.ndarray:
        """float32 [T] → logits [1, D]; the normalisation is that of the whole recording."""
        state = None
        for feed in self.feeds(wave):
            logits, state = self._session.run([LOGITS, NEXT], feed if state is None else feed | {CARRIED[0]: state})
        return logits

    def feeds(self, wave: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        """The model's inputs for each chunk of float32 [T]; ``state`` is the first one in all of them."""
        blocks = [slice(start, start + SAMPLES_AT_ONCE) for start in range(0, len(wave), SAMPLES_AT_ONCE)]
        mean = sum(wave[block].sum(dtype=np.float64) for block in blocks) / len(wave)
        power = sum(np.square(wave[block] - mean).sum(dtype=np.float64) for block in blocks) / len(wave)
        scale = 1 / np.sqrt(power + NORM_EPSILON)
        frames = 1 + (len(wave) - self._n_fft) // self._hop
        if frames < 1:
            raise UsageError(f"expected at least {self._n_fft} samples, got {len(wave)}")
        tokens = -(-frames // self._stride)
        for start in range(0, tokens, self._tokens):
            end = min(start + self._tokens, tokens)
            first = max(0, start * self._stride - self._halo)
            last = min(frames, end * self._stride + self._halo)
            chunk = wave[first * self._hop : (last - 1) * self._hop + self._n_fft]
            before = start - first // self._stride
            bounds = (np.array([bound], np.int64) for bound in (before, before + end - start))
            signal = ((chunk - mean) * scale).astype(np.float32)
            yield {SIGNAL: signal[None], **dict(zip(CARRIED, (self._start, *bounds), strict=True))}


def first_state(features: int) -> np.ndarray:
    """The state of the kind "chunked" before the first chunk, float32 [3, features].

    Its rows are the largest score so far (lower than any score), the sum of the weights, and the weighted sum.
    """
    return np.array([[-1e30], [0], [0]], np.float32).repeat(features, axis=1)


def _model_file(path: Path, kind: str | None) -> Path:
    if kind is not None and kind not in FILES:
        raise UsageError(f"unknown kind {kind!r}; there are: {', '.join(FILES)}")
    if path.is_dir():
        file = path / FILES[kind or "fp32"]
        if kind is None and has_parts(path):
            return path
        if not file.is_file() and not has_parts(file):
            there = [known for known, name in FILES.items() if (path / name).exists()]
            instead = f"; its kinds are: {', '.join(there)}" if there else ""
            if (path / "student").is_dir() or (path / "model.safetensors").is_file() and not there:
                instead = f"; it is a run or a student: w2s export {path} --out MODEL makes a model of it"
            raise UsageError(f"no model in {path} (it has no {file.name}){instead}")
        return file
    if not path.exists():
        raise UsageError(f"no model at {path}")
    if kind is not None:
        raise UsageError(f"kind chooses a file in a model directory, but {path} is a file")
    return path


def _whole(text: str) -> bool:
    """Whether it is a number in plain digits, not too long to be read."""
    return text.isascii() and text.isdecimal() and len(text) <= 15
