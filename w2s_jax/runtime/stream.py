"""Values of the last seconds of a stream, at any moment."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from w2s_jax.errors import UsageError, W2SError
from w2s_jax.runtime import c, wasm

#: Samples that are checked at once.
SAMPLES_AT_ONCE = 1 << 18
#: Larger samples are refused: the mean of their squares, which the network divides by, would overflow float32.
LOUDEST = 1e15


class Stream:
    """A stream of samples, made by ``Predictor.stream``: ``push(samples)`` as they come, ``read()`` at any moment.

    Samples may be pushed in any pieces; no value depends on that. With the normalisation "running" the state is some tens of
    kilobytes, with "window" the samples of a window.

    Attributes:
        normalisation: "window" or "running".
        incremental: whether every sample is computed once; otherwise each reading computes the whole window.
        window, hop: in samples.

    Example:
        >>> stream = Predictor("model", kind="c").stream(window=5, hop=0.25, normalisation="running")  # doctest: +SKIP
        >>> stream.push(samples)  # doctest: +SKIP
        >>> stream.read()  # doctest: +SKIP
        {'arousal': 0.61, 'dominance': 0.58, 'valence': 0.40}
    """

    def __init__(self, predictor, window: float, hop: float, normalisation: str):
        if normalisation not in c.NORMALISATIONS:
            raise UsageError(f"normalisation is {normalisation!r}; expected one of {', '.join(c.NORMALISATIONS)}")
        if not (math.isfinite(window) and math.isfinite(hop)):
            raise UsageError(f"window and hop are seconds, got {window} and {hop}")
        self.window, self.hop = round(window * predictor.sampling_rate), round(hop * predictor.sampling_rate)
        if self.window < predictor.minimum_samples:
            raise UsageError(f"a window needs at least {predictor.minimum_samples} samples, got {window} s = {self.window}")
        if self.hop < 1:
            raise UsageError(f"hop must be at least one sample, got {hop} s")
        self.normalisation = normalisation
        self.incremental = normalisation == "running"
        self._predictor, self._pushed = predictor, 0
        if not self.incremental:
            self._state = _Window(predictor, self.window)
        elif isinstance(predictor._session, c.Session | wasm.Session):
            self._state = predictor._session.stream(normalisation, self.window, self.hop)
        else:
            raise UsageError(
                f"{predictor.path} computes whole windows: only the kinds c, c-int8 and wasm carry a state from hop to hop, "
                'which the running normalisation needs; take one of them (w2s export --kind c), or normalisation="window"'
            )

    def push(self, samples: np.ndarray) -> None:
        """Take samples [T] at the model's rate: floating point of about -1..1, or int16.

        Raises:
            UsageError: another shape or type.
            W2SError: a sample is not finite, or beyond 1e15; then none of them is taken.
        """
        samples = np.asarray(samples)
        if samples.ndim != 1:
            raise UsageError(f"expected samples [T], got {list(samples.shape)}")
        if samples.dtype != np.int16:
            samples = check_samples(samples, self._pushed)
        self._state.push(samples)
        self._pushed += len(samples)

    def read(self) -> dict[str, float] | None:
        """The values of the last window, of what there is as long as that is less; None before there are any."""
        values = self._state.read()
        return None if values is None else dict(zip(self._predictor.dimensions, map(float, values), strict=True))

    def feed(self, samples: np.ndarray) -> Iterator[tuple[float, float, dict[str, float]]]:
        """Push samples and read after every hop from the first full window on: (start, end, values), in seconds.

        With the normalisation "window" that is what :meth:`Predictor.windows` gives, but for a last shorter hop.
        """
        rate, at = self._predictor.sampling_rate, 0
        while at < len(samples):
            due = (
                self.window - self._pushed if self._pushed < self.window else self.hop - (self._pushed - self.window) % self.hop
            )
            piece = samples[at : at + due]
            self.push(piece)
            at += len(piece)
            if len(piece) == due:
                yield (self._pushed - self.window) / rate, self._pushed / rate, self.read()

    def reset(self) -> None:
        """Forget all samples."""
        self._state.reset()
        self._pushed = 0

    def save(self) -> bytes:
        """All that the stream remembers."""
        return self._pushed.to_bytes(8, "little") + self._state.state

    def restore(self, state: bytes) -> None:
        """Go on from what ``save`` has returned, of a stream of the same model and settings.

        Raises:
            UsageError: the state of another stream.
        """
        self._state.state = state[8:]
        self._pushed = int.from_bytes(state[:8], "little")


class _Window:
    """The samples of a window, which is computed anew at every reading."""

    def __init__(self, predictor, size: int):
        self._predictor, self._size = predictor, size
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        self._ring = Ring(self._size)

    def push(self, samples: np.ndarray) -> None:
        """Samples [T], float32 or int16."""
        self._ring.push(samples * np.float32(1 / 32768) if samples.dtype == np.int16 else samples)

    def read(self) -> list[float] | None:
        """The values [D], None as long as there are none."""
        wave = self._ring.last()
        return None if len(wave) < self._predictor.minimum_samples else list(self._predictor._run(wave).values())

    @property
    def state(self) -> bytes:
        """All that it remembers."""
        return self._ring.last().tobytes()

    @state.setter
    def state(self, state: bytes) -> None:
        if len(state) % 4 or len(state) > 4 * self._size:
            raise UsageError(f"expected the state of a stream with a window of {self._size} samples, got {len(state)} bytes")
        self.reset()
        self._ring.push(np.frombuffer(state, np.float32))


class Ring:
    """The last ``size`` samples of a stream, contiguous, at a constant cost per sample."""

    def __init__(self, size: int):
        self.size = size
        self.end = 0  # samples pushed so far
        self._buffer = np.empty(2 * size, np.float32)
        self._filled = 0

    def push(self, block: np.ndarray) -> None:
        """Samples [T]."""
        self.end += len(block)
        block = block[-self.size :]
        if self._filled + len(block) > len(self._buffer):
            old = self.last()[len(block) :] if len(block) < self.size else block[:0]
            self._buffer[: len(old)] = old  # never overlaps: the last samples lie in the second half
            self._filled = len(old)
        self._buffer[self._filled : self._filled + len(block)] = block
        self._filled += len(block)

    def last(self) -> np.ndarray:
        """The last ``size`` samples, or all that there are; until the next push."""
        return self._buffer[max(0, self._filled - self.size) : self._filled]


def check_samples(wave: np.ndarray, position: int, row: int | None = None) -> np.ndarray:
    """Convert to float32, all of it finite; ``position`` is that of the first sample, ``row`` the length of a channel."""
    if not np.issubdtype(wave.dtype, np.floating):
        raise UsageError(f"expected floating-point samples of about -1..1, got {wave.dtype} (divide integers by full scale)")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
        wave = wave.astype(np.float32, copy=False)
    for start in range(0, len(wave), SAMPLES_AT_ONCE):
        finite = np.isfinite(wave[start : start + SAMPLES_AT_ONCE])
        if not finite.all():
            first = start + int(finite.argmin())
            raise W2SError(f"sample {position + (first % row if row else first)} is {wave[first]}, expected finite samples")
        if max(-wave[start : start + SAMPLES_AT_ONCE].min(), wave[start : start + SAMPLES_AT_ONCE].max()) > LOUDEST:
            raise W2SError(f"samples are larger than {LOUDEST:g}, whose squares overflow; expected about -1..1")
    return wave
