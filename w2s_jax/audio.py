"""Audio files to 16 kHz mono: everything that libsndfile reads, in bounded memory, with typed errors.

- Mixdown is the mean of the channels, before resampling. :class:`AudioWarning` says when channels cancel each other.
- Resampling is band-limited (soxr HQ): ``n`` samples become ``round(n * new_rate / old_rate)``.
- Levels are kept: nothing is normalised or clipped, and lossy decoders overshoot 1.0.
- The content decides on the format, never the extension; headerless formats are therefore refused.
- What is left of a truncated or damaged file is read, with a warning. (Only Ogg does not show that its end is missing.)
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import stat
import warnings
from collections.abc import Iterator

import numpy as np
import soundfile
import soxr

from w2s_jax import SAMPLING_RATE
from w2s_jax.artifacts import UsageError, W2SError

#: Sampling rates outside of this, in Hz, are taken for a damaged header (or a slip of the caller's).
RATES = (1_000, 1_000_000)

#: Full scale is 1.0; a sample beyond this (+60 dB) is damage, or integers written as floating point without scaling.
LARGEST = 1000.0

_CHUNK = 2**18  # values (frames x channels, before or after resampling) held at a time: 1 MB
_UNKNOWN = 2**62  # libsndfile reports at least so many frames for a stream whose header does not give its length


class AudioError(W2SError):
    """This file cannot be used as audio."""


class EmptyAudioError(AudioError):
    """There is not one sample in the file, or in the part of it that was asked for."""


class NonFiniteAudioError(AudioError):
    """A sample is NaN, infinite, or absurdly large."""


class UnreadableAudioError(AudioError):
    """Not a regular file, not audio, or a header that makes no sense."""


class AudioWarning(UserWarning):
    """The audio was read, but is probably not what its owner thinks."""


def printable(path: str | bytes | os.PathLike) -> str:
    r"""A file name for a message: one line that any UTF-8 terminal takes (``"a\nb"`` and stray bytes are escaped)."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in os.fsdecode(path))


def blocks(
    path: str | bytes | os.PathLike,
    start: float | None = None,
    end: float | None = None,
    sampling_rate: int = SAMPLING_RATE,
    block_seconds: float = 10.0,
) -> Iterator[np.ndarray]:
    """Read a file of any length, piece by piece.

    Memory is bounded by the block, whatever the file's length, rate or header; the samples do not depend on the block.
    Errors come when the iterator reaches them, so the first ones at the first block.

    Args:
        path: any name that the operating system takes.
        start: where to begin, in seconds (None: at the beginning).
        end: where to stop, in seconds (None, or beyond the end: at the end).
        sampling_rate: of the result, in Hz.
        block_seconds: length of the blocks.

    Yields:
        float32 [block_seconds * sampling_rate], the last one shorter; mono, full scale is 1.0.

    Raises:
        UsageError: no such file, or a time or a rate that makes no sense.
        EmptyAudioError: nothing to read in the file, or between start and end.
        NonFiniteAudioError: a sample is NaN, infinite or absurdly large; names its place.
        UnreadableAudioError: not audio that libsndfile reads, or not a regular file.
    """
    if not block_seconds > 0 or math.isinf(block_seconds):
        raise UsageError(f"block_seconds must be a positive number, got {block_seconds}")
    block = np.empty(max(1, round(block_seconds * sampling_rate)), np.float32)
    filled = 0
    for piece in _pieces(path, start, end, sampling_rate):
        while len(piece):
            n = min(len(piece), len(block) - filled)
            block[filled : filled + n] = piece[:n]
            filled, piece = filled + n, piece[n:]
            if filled == len(block):
                yield block
                block, filled = np.empty_like(block), 0
    if filled:
        yield block[:filled]


def load(
    path: str | bytes | os.PathLike,
    start: float | None = None,
    end: float | None = None,
    sampling_rate: int = SAMPLING_RATE,
) -> np.ndarray:
    """Read a file, or a part of it, into memory: float32 [T], mono. Arguments and errors: see :func:`blocks`."""
    return np.concatenate(list(blocks(path, start, end, sampling_rate)))


def resample(wave: np.ndarray, sampling_rate: int, new_sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
    """Change the sampling rate of a waveform, band-limited.

    Args:
        wave: floating point [T].
        sampling_rate: of ``wave``, in Hz.
        new_sampling_rate: of the result, in Hz.

    Returns:
        float32 [round(T * new_sampling_rate / sampling_rate)].

    Raises:
        UsageError: not one-dimensional, not floating point, or a sampling rate outside ``RATES``.
    """
    wave = np.asarray(wave)
    if wave.ndim != 1 or not np.issubdtype(wave.dtype, np.floating):
        raise UsageError(f"expected a waveform, floating point [T] with full scale 1.0, got {wave.dtype} {wave.shape}")
    _check_rate(sampling_rate)
    _check_rate(new_sampling_rate)
    wave = np.ascontiguousarray(wave, np.float32)
    if sampling_rate == new_sampling_rate or not len(wave):
        return wave
    return soxr.resample(wave, sampling_rate, new_sampling_rate, quality="HQ")


def duration(path: str | bytes | os.PathLike) -> float:
    """Length of a file in seconds, as its header says (a truncated file may hold less); counted if it does not say.

    Raises:
        UsageError, EmptyAudioError, UnreadableAudioError: as :func:`blocks`.
    """
    with _opened(path) as file:
        frames = file.frames
        if frames >= _UNKNOWN:
            frames = sum(len(chunk) for chunk in _chunks(file, printable(path), _CHUNK // file.channels, 0, math.inf))
        return frames / file.samplerate


def _check_rate(sampling_rate: float) -> None:
    if not RATES[0] <= sampling_rate <= RATES[1]:
        raise UsageError(f"a sampling rate must be between {RATES[0]} and {RATES[1]} Hz, got {sampling_rate}")


class _SoundFile(soundfile.SoundFile):
    """soundfile seeks after each read, which fails at the end of a FLAC stream of unknown length and loses its tail."""

    def seekable(self) -> bool:
        return False

    def skip(self, frames: int) -> None:
        if frames and super().seekable():
            self.seek(frames)
            return
        while frames > 0 and (n := len(self.read(min(frames, _CHUNK // self.channels), "float32"))):
            frames -= n

    def position(self, otherwise: int) -> int:
        try:
            return self.tell()
        except soundfile.SoundFileError:  # GSM 6.10 cannot even tell
            return otherwise


@contextlib.contextmanager
def _opened(path: str | bytes | os.PathLike) -> Iterator[_SoundFile]:
    name = printable(path)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # before opening: to open a FIFO waits for its writer
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise UnreadableAudioError(f"{name} is {kind}; expected an audio file")
        if not status.st_size:
            raise EmptyAudioError(f"{name} is empty (0 bytes); expected an audio file")
        # By descriptor, as libsndfile must not see the name: it would guess by the extension, and take "-" for stdin.
        raw = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)), "rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"no such audio file: {name}") from error
    except OSError as error:
        raise UnreadableAudioError(f"cannot read {name}: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, W2SError):
            raise
        raise UsageError(f"no such audio file: {name} ({error})") from error  # a NUL in the name
    with raw:
        try:
            # Windows: libsndfile.dll does not know Python's descriptors; the detour over Python's file prints a traceback
            # where a damaged header leads out of the file.
            file = _SoundFile(raw if os.name == "nt" else raw.fileno(), closefd=False)
        except soundfile.SoundFileError as error:
            raise UnreadableAudioError(
                f"cannot read {name} as audio: {_reason(error)} Expected WAV, FLAC, Ogg, MP3, AIFF or the like."
            ) from error
        with file:
            if not RATES[0] <= file.samplerate <= RATES[1]:
                raise UnreadableAudioError(
                    f"{name} claims a sampling rate of {file.samplerate} Hz; expected {RATES[0]} to {RATES[1]} Hz"
                )
            if not file.frames:
                raise EmptyAudioError(f"{name} has a header ({file.format}), but no samples")
            yield file


def _reason(error: Exception) -> str:
    return getattr(error, "error_string", str(error)).strip().rstrip(".") + "."


def _pieces(path, start: float | None, end: float | None, sampling_rate: int) -> Iterator[np.ndarray]:
    """Mono float32 pieces of any length, resampled."""
    _check_rate(sampling_rate)
    start = 0.0 if start is None else start
    if not 0 <= start < math.inf or (end is not None and not end > start):
        raise UsageError(f"expected 0 <= start < end in seconds, got start {start}, end {end}")
    name = printable(path)
    with _opened(path) as file:
        rate, channels = file.samplerate, file.channels
        first = round(start * rate)
        wanted = math.inf if end is None or math.isinf(end) else max(1, round(end * rate) - first)
        if first >= file.frames:
            raise EmptyAudioError(f"{name} has nothing after {start:g} s: it ends at {file.frames / rate:g} s")
        _warn_of_header(file, name)
        try:
            file.skip(first)
        except soundfile.SoundFileError as error:
            raise UnreadableAudioError(f"{name} is damaged: nothing at {start:g} s: {_reason(error)}") from error

        resampler = soxr.ResampleStream(rate, sampling_rate, 1, dtype="float32", quality="HQ")
        size = max(1, _CHUNK // (channels * math.ceil(sampling_rate / rate)))
        frames = samples = 0
        power_in = power_out = 0.0  # sums of squares of the channels and of the mixdown, to see a cancellation
        for chunk in _chunks(file, name, size, first, wanted):
            _check_values(chunk, first + frames, rate, name)
            mono = chunk[:, 0] if channels == 1 else chunk.mean(axis=1)
            if channels > 1:
                power_in += float(np.square(chunk, dtype=np.float64).sum())
                power_out += float(np.square(mono, dtype=np.float64).sum())
            frames += len(chunk)
            piece = mono if rate == sampling_rate else resampler.resample_chunk(np.ascontiguousarray(mono))
            samples += len(piece)
            yield piece
        if rate != sampling_rate:
            piece = resampler.resample_chunk(np.empty(0, np.float32), last=True)
            samples += len(piece)
            yield piece
        if not samples:
            raise EmptyAudioError(f"{name} is too short: {frames} samples at {rate} Hz from {start:g} s")
        expected = min(wanted, file.frames - first)
        if file.frames < _UNKNOWN and frames < expected:
            _warn(f"{name} is truncated or damaged: {frames} of {expected} samples could be read")
        # Channels without correlation keep 1/channels of the mean power; 20 dB less than that is cancellation.
        if power_out * channels**2 < 0.01 * power_in:
            _warn(f"the {channels} channels of {name} cancel: their mean is at least 20 dB too quiet (opposite phase?)")


def _chunks(file: _SoundFile, name: str, size: int, first: int, wanted: float) -> Iterator[np.ndarray]:
    """float32 [up to size, channels] from frame ``first`` on: ``wanted`` frames, or up to the end or to a damage."""
    done = 0
    while done < wanted:
        chunk = np.empty((int(min(size, wanted - done)), file.channels), np.float32)
        try:
            chunk, broken = file.read(out=chunk), None
        except soundfile.SoundFileError as error:  # the frames before the damage are good
            chunk, broken = chunk[: max(0, file.position(first + done) - first - done)], error
        done += len(chunk)
        if broken and not done:
            raise UnreadableAudioError(f"{name} is damaged: nothing can be decoded: {_reason(broken)}") from broken
        if broken and file.frames >= _UNKNOWN:  # otherwise the caller sees that frames are missing
            _warn(f"{name} is truncated or damaged: it ends after {first + done} samples: {_reason(broken)}")
        if len(chunk):
            yield chunk
        if broken or not len(chunk):
            return


def _check_values(chunk: np.ndarray, first: int, rate: int, name: str) -> None:
    bad = ~(np.abs(chunk) <= LARGEST)  # written so that NaN is bad
    if bad.any():
        frame, channel = np.argwhere(bad)[0]
        raise NonFiniteAudioError(
            f"{name} has the value {chunk[frame, channel]:g} at {(first + frame) / rate:.6g} s "
            f"(sample {first + frame}, channel {channel + 1} of {chunk.shape[1]}); expected -1 to 1"
        )


def _warn_of_header(file: _SoundFile, name: str) -> None:
    """libsndfile corrects a length in the header to what the file has; its log tells: ``data : 99 (should be 9)``."""
    for claimed, found in re.findall(r"(\d+) \(should be (\d+)\)", file.extra_info):
        if int(claimed) > int(found) + 1:  # 1: a missing pad byte
            _warn(f"{name} is truncated or its header wrong: {claimed} bytes promised, {found} found and read")
            return


def _warn(message: str) -> None:
    warnings.warn(message, AudioWarning, stacklevel=3)
