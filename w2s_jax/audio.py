"""Audio files to 16 kHz mono: what libsndfile reads, and with ffmpeg the rest, in bounded memory, with typed errors.

- Mixdown is the mean of the channels, before resampling. :class:`AudioWarning` says when channels cancel each other.
- Resampling is band-limited (soxr HQ): ``n`` samples become ``round(n * new_rate / old_rate)``.
- Levels are kept: nothing is normalised or clipped, and lossy decoders overshoot 1.0.
- The content decides on the format, never the extension; headerless formats are therefore refused.
- What is left of a truncated or damaged file is read, with a :class:`TruncatedAudioWarning`. (Only Ogg does not show that its
  end is missing, unless a page is cut.)
- Recordings joined end to end (Ogg, FLAC, MP3, WAV) are read one after the other, at the rate of the first.
- M4A, WebM, WMA, AMR and other formats that libsndfile does not know are decoded by ffmpeg, where it is installed.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import math
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import threading
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from w2s_jax import SAMPLING_RATE, containers
from w2s_jax.errors import UsageError, W2SError

#: Sampling rates outside of this, in Hz, are taken for a damaged header (or a slip of the caller's).
RATES = (1_000, 1_000_000)

#: Samples of 16 bits, at 1.0.
FULL_SCALE = 32768

#: Full scale is 1.0; a sample beyond this (+60 dB) is damage, or integers written as floating point without scaling.
LARGEST = 1000.0

_CHUNK = 2**18  # values (frames x channels, before or after resampling) held at a time: 1 MB
_UNKNOWN = 2**62  # libsndfile reports at least so many frames for a stream whose header does not give its length

_PATIENCE = 60.0  # seconds that ffmpeg may take for its next megabyte
_BOMB = 3600.0, 10.0  # more than this many seconds, plus as many bytes a second, come from no honest file


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


class TruncatedAudioWarning(AudioWarning):
    """What was read is not the whole recording: the file is truncated or damaged, or a part of it cannot be decoded."""


_COLLECTED: contextvars.ContextVar[list[AudioWarning] | None] = contextvars.ContextVar("collected", default=None)


@contextlib.contextmanager
def collected() -> Iterator[list[AudioWarning]]:
    """Collect this thread's audio warnings in a list instead of showing them, which ``warnings`` cannot do by thread.

    Example:
        >>> with collected() as noticed:
        ...     wave = load("voice.mp3")
        >>> whole = not any(isinstance(warning, TruncatedAudioWarning) for warning in noticed)
    """
    noticed: list[AudioWarning] = []
    token = _COLLECTED.set(noticed)
    try:
        yield noticed
    finally:
        _COLLECTED.reset(token)


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
        UnreadableAudioError: not audio, not a regular file, or a format that needs ffmpeg, which is missing or fails.
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
    """Length of a file in seconds, as its header says (a truncated file may hold less); counted if it does not say, and where
    ffmpeg decodes.

    Raises:
        UsageError, EmptyAudioError, UnreadableAudioError: as :func:`blocks`.
    """
    with _opened(path) as file:
        frames = file.frames
        if frames >= _UNKNOWN:
            frames = sum(len(chunk) for chunk in file.chunks(_CHUNK // file.channels, 0, math.inf))
        if not frames:
            raise EmptyAudioError(f"{printable(path)} has a header ({file.format}), but no samples")
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
            # an MP3 frame needs bits of those before it (up to 511 bytes, so 22 frames of the smallest), and their overlap
            before = min(frames, 2**15 if self.format == "MP3" else 0)
            self.seek(frames - before)
            frames = before
        while frames > 0 and (n := len(self.read(min(frames, _CHUNK // self.channels), "float32"))):
            frames -= n

    def position(self, otherwise: int) -> int:
        try:
            return self.tell()
        except soundfile.SoundFileError:  # GSM 6.10 cannot even tell
            return otherwise


@contextlib.contextmanager
def _opened(path: str | bytes | os.PathLike) -> Iterator[_Recordings | _Ffmpeg]:
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
            source = _Recordings(raw, name)
        except soundfile.SoundFileError as error:
            kind = containers.foreign(raw)
            if kind is None:
                raise UnreadableAudioError(
                    f"cannot read {name} as audio: {_reason(error)} Expected WAV, FLAC, Ogg, MP3, AIFF or the like."
                ) from error
            source = _Ffmpeg(path, *kind)
        with source:
            if not RATES[0] <= source.samplerate <= RATES[1]:
                raise UnreadableAudioError(
                    f"{name} claims a sampling rate of {source.samplerate} Hz; expected {RATES[0]} to {RATES[1]} Hz"
                )
            if not source.frames:
                raise EmptyAudioError(f"{name} has a header ({source.format}), but no samples")
            yield source


class _Recordings:
    """What libsndfile reads: a file, or the recordings in it one after the other, at the first one's rate and channels."""

    def __init__(self, raw: BinaryIO, name: str) -> None:
        self._raw, self._name = raw, name
        self.layout = containers.layout(raw)
        self._parts = self.layout.parts or (containers.Part(((0, os.fstat(raw.fileno()).st_size),)),)
        self._first = self._open(0)
        self.samplerate, self.channels, self.format = self._first.samplerate, self._first.channels, self._first.format
        self._first_subtype = self._first.subtype
        self._frames: list[int] = []  # of each part, at the first one's rate; 0: it cannot be read
        try:
            for index in range(len(self._parts)):
                self._frames.append(self._count(index))
        except BaseException:
            self._first.close()
            raise
        self.frames = _UNKNOWN if max(self._frames) >= _UNKNOWN else sum(self._frames)

    def __enter__(self) -> _Recordings:
        return self

    def __exit__(self, *_) -> None:
        self._first.close()

    def _open(self, index: int) -> _SoundFile:
        # Windows: libsndfile.dll does not know Python's descriptors
        if not self.layout.parts and os.name != "nt":
            os.lseek(self._raw.fileno(), 0, os.SEEK_SET)
            return _SoundFile(self._raw.fileno(), closefd=False)
        return _SoundFile(containers.View(self._raw, self._parts[index].pieces))

    def _count(self, index: int) -> int:
        try:
            file = self._open(index) if index else self._first
        except soundfile.SoundFileError:
            return 0
        frames, rate = file.frames, file.samplerate
        if index:
            file.close()
        if not RATES[0] <= rate <= RATES[1]:
            return 0 if index else frames  # the caller refuses the first one's
        limit = self._parts[index].frames
        frames = frames if limit is None else min(frames, limit)
        return frames if frames >= _UNKNOWN or rate == self.samplerate else round(frames * self.samplerate / rate)

    def warn(self) -> None:
        """Say what the headers show, before anything is decoded."""
        if self.layout.unsized:
            _warn(f"{self._name} {self.layout.unsized}")
        # libsndfile corrects a length to what the file has; its log tells: "data : 99 (should be 9)"
        for claimed, found in re.findall(r"(\d+) \(should be (\d+)\)", self._first.extra_info):
            if int(claimed) > int(found) + 1:  # 1: a missing pad byte
                _warn(
                    f"{self._name} is truncated or its header wrong: {claimed} bytes promised, {found} found and read",
                    TruncatedAudioWarning,
                )
                break
        if self.layout.lost:
            _warn(f"{self._name} {self.layout.lost}", TruncatedAudioWarning)
        if bad := [index for index, frames in enumerate(self._frames) if not frames and index]:
            _warn(f"{self._name}: recording {bad[0] + 1} of {len(self._parts)} in it cannot be read", TruncatedAudioWarning)

    def chunks(self, size: int, first: int, wanted: float) -> Iterator[np.ndarray]:
        """float32 [up to size, channels] from frame ``first`` on: ``wanted`` frames, or up to the end or to a damage."""
        done = 0
        for index, frames in enumerate(self._frames):
            if done >= wanted:
                return
            if first and first >= frames:  # frames may be unknown: then all of it is here
                first -= frames
                continue
            if not frames:
                continue
            file = self._open(index) if index else self._first
            with file:
                try:
                    for chunk in self._part(file, index, size, first, wanted - done):
                        done += len(chunk)
                        yield chunk
                except UnreadableAudioError as error:
                    if not done and len(self._parts) == 1:
                        raise
                    _warn(str(error), TruncatedAudioWarning)
            first = 0

    def _part(self, file: _SoundFile, index: int, size: int, first: int, wanted: float) -> Iterator[np.ndarray]:
        if file.samplerate == self.samplerate:
            limit = self._parts[index].frames
            try:
                file.skip(first)
            except soundfile.SoundFileError as error:
                at = first / self.samplerate
                raise UnreadableAudioError(f"{self._name} is damaged: nothing at {at:g} s: {_reason(error)}") from error
            # never more than the header counts: libsndfile would decode what follows, and drop it
            there = (file.frames if limit is None else min(limit, file.frames)) - first
            for chunk in _chunks(file, self._name, size, first, min(wanted, there)):
                yield self._mixed(chunk)
            if wanted > there and not self.layout.parts:
                self._check_end()
            return
        resampler = soxr.ResampleStream(file.samplerate, self.samplerate, self.channels, dtype="float32", quality="HQ")
        size = max(1, size * file.samplerate // max(file.samplerate, self.samplerate))
        for chunk in itertools.chain(_chunks(file, self._name, size, 0, math.inf), [None]):
            last = chunk is None
            given = np.empty((0, self.channels), np.float32) if last else self._mixed(chunk)
            piece = resampler.resample_chunk(np.ascontiguousarray(given), last=last).reshape(-1, self.channels)
            first, piece = max(0, first - len(piece)), piece[first:]
            piece = piece[: int(min(wanted, len(piece)))]
            wanted -= len(piece)
            if len(piece):
                yield piece
            if wanted <= 0:
                return

    def _check_end(self) -> None:
        """A decoder that ends without a word, though much of the file is left, has lost its way."""
        if os.name == "nt" or self.format in ("WAV", "WAVEX", "RF64", "AIFF"):  # their chunks have been looked at
            return
        size = os.fstat(self._raw.fileno()).st_size
        width = _WIDTHS.get(self._first_subtype) if self.format != "FLAC" else None
        if width:
            left = size - self.frames * self.channels * width
        else:  # how far the decoder came
            left = (self.layout.end or size) - os.lseek(self._raw.fileno(), 0, os.SEEK_CUR)
        if left > containers.most_unread(size):
            found = f"{left} of {size} bytes are not read"
            _warn(f"{self._name} is damaged, or not one recording: {found}", TruncatedAudioWarning)

    def _mixed(self, chunk: np.ndarray) -> np.ndarray:
        """A part with other channels than the first one's: its mean in every channel, so that the mixdown is its own."""
        if chunk.shape[1] == self.channels:
            return chunk
        return np.repeat(chunk.mean(axis=1, keepdims=True), self.channels, axis=1)


class _Ffmpeg:
    """What ffmpeg decodes, through a pipe: the first audio stream at its own rate, as AU, whose header is simple."""

    frames = _UNKNOWN

    def __init__(self, path: str | bytes | os.PathLike, kind: str, demuxer: str) -> None:
        self._name, self.format = printable(path), kind
        program = shutil.which("ffmpeg")
        if program is None:
            given = self._name if re.fullmatch(r"[^-:][^:]*", self._name) else f"file:{self._name}"
            line = f"ffmpeg -i {shlex.quote(given)} {shlex.quote(os.path.splitext(given)[0].removeprefix('file:') + '.wav')}"
            raise UnreadableAudioError(
                f"cannot read {self._name}: it is {kind}, which takes ffmpeg, and there is none on this machine; "
                f"install ffmpeg, or convert the file elsewhere: {line}"
            )
        # file: and its protocol alone, so that neither the name nor the content leads to the network or to another protocol;
        # the demuxer is given, as a playlist would lead to other files
        command = [program, "-nostdin", "-hide_banner", "-v", "error", "-max_alloc", str(2**28), "-threads", "1"]
        command += ["-protocol_whitelist", "file", "-f", demuxer, "-i", "file:" + os.fsdecode(path)]
        command += ["-map", "0:a:0", "-vn", "-sn", "-dn", "-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
        size = os.stat(path).st_size
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=os.name != "nt",  # to end it with all that it started
            )
        except OSError as error:
            raise UnreadableAudioError(f"cannot read {self._name} ({kind}): {program}: {error.strerror}") from error
        self._said = b""
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        try:
            header = self._read(24)
            if len(header) < 24 or header[:4] != b".snd" or header[12:16] != b"\0\0\0\x06":
                raise UnreadableAudioError(f"cannot read {self._name} ({kind}): {self._ending()}")
            offset, _, _, self.samplerate, self.channels = np.frombuffer(header, ">u4")[1:].tolist()
            if not 24 <= offset <= 2**16 or not 1 <= self.channels <= 1024:
                raise UnreadableAudioError(f"cannot read {self._name} ({kind}): ffmpeg gave a header that makes no sense")
            self._read(offset - 24)
        except BaseException:
            self.__exit__()
            raise
        self._most = self.samplerate * (_BOMB[0] + size / _BOMB[1])

    def __enter__(self) -> _Ffmpeg:
        return self

    def __exit__(self, *_) -> None:
        self._kill()
        self._process.wait()
        self._process.stdout.close()

    def warn(self) -> None:
        """Nothing to say before anything is decoded."""

    def chunks(self, size: int, first: int, wanted: float) -> Iterator[np.ndarray]:
        """float32 [up to size, channels] from frame ``first`` on; always decoded from the beginning, so that the samples are
        those of the whole.
        """
        done, stop = 0, first + wanted
        while done < stop:
            data = self._read(4 * self.channels * int(min(size, stop - done)))
            chunk = np.frombuffer(data[: len(data) // (4 * self.channels) * 4 * self.channels], ">f4").astype(np.float32)
            chunk = chunk.reshape(-1, self.channels)
            if not len(chunk):
                break
            done += len(chunk)
            if done > self._most:
                raise UnreadableAudioError(
                    f"cannot read {self._name} ({self.format}): ffmpeg makes more than {done / self.samplerate:.0f} s of it, "
                    "far too much for its size"
                )
            if len(chunk := chunk[max(0, len(chunk) - (done - first)) :]):
                yield chunk
        else:
            return
        ending = self._ending()
        if ending and not done:
            raise UnreadableAudioError(f"cannot read {self._name} ({self.format}): {ending}")
        if ending:
            at = done / self.samplerate
            _warn(f"{self._name} is truncated or damaged: {at:g} s could be read: {ending}", TruncatedAudioWarning)

    def _listen(self) -> None:
        with self._process.stderr as stderr:
            while data := stderr.read1(4096):
                self._said = (self._said + data)[:2000]  # the rest is read as well: a full pipe would stop ffmpeg

    def _kill(self) -> None:
        if self._process.returncode is not None:
            return  # somebody else's by now
        with contextlib.suppress(OSError):
            if os.name == "nt":
                self._process.kill()
            else:
                os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self, count: int) -> bytes:
        late = threading.Event()

        def end() -> None:
            late.set()
            self._kill()

        timer = threading.Timer(_PATIENCE, end)
        timer.daemon = True
        timer.start()
        try:
            data = self._process.stdout.read(count)
        finally:
            timer.cancel()
        if late.is_set():
            raise UnreadableAudioError(
                f"cannot read {self._name} ({self.format}): ffmpeg gave nothing more for {_PATIENCE:g} s and was ended"
            )
        return data

    def _ending(self) -> str:
        """What went wrong ("": nothing); waits for the end of ffmpeg, which closed its output."""
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._kill()
            code = self._process.wait()
        self._listener.join(5)
        said = [line.strip() for line in self._said.decode(errors="replace").splitlines() if line.strip()]
        said = [re.sub(r"^\[[^]]*\] *", "", line) for line in said]  # "[mov,mp4 @ 0x55…]"
        if not code and not said:
            return ""
        return printable(f"ffmpeg says: {said[0]}" if said else f"ffmpeg ended with code {code}")


_WIDTHS = {"PCM_S8": 1, "PCM_U8": 1, "ULAW": 1, "ALAW": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}


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
        file.warn()
        resampler = soxr.ResampleStream(rate, sampling_rate, 1, dtype="float32", quality="HQ")
        size = max(1, _CHUNK // (channels * math.ceil(sampling_rate / rate)))
        frames = samples = 0
        power_in = power_out = 0.0  # sums of squares of the channels and of the mixdown, to see a cancellation
        for chunk in file.chunks(size, first, wanted):
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
        if not frames and first:
            raise EmptyAudioError(f"{name} has nothing after {start:g} s")
        if not samples:
            raise EmptyAudioError(f"{name} is too short: {frames} samples at {rate} Hz from {start:g} s")
        expected = min(wanted, file.frames - first)
        if file.frames < _UNKNOWN and frames < expected:
            _warn(f"{name} is truncated or damaged: {frames} of {expected} samples could be read", TruncatedAudioWarning)
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
            _warn(
                f"{name} is truncated or damaged: it ends after {first + done} samples: {_reason(broken)}",
                TruncatedAudioWarning,
            )
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


def _warn(message: str, category: type[AudioWarning] = AudioWarning) -> None:
    noticed = _COLLECTED.get()
    if noticed is None:
        warnings.warn(message, category, stacklevel=3)
    else:
        noticed.append(category(message))
