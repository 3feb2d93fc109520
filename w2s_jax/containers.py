"""What libsndfile does not see in a file: recordings joined end to end, headers without a length, MP3 without a frame count.

:func:`layout` says where in a file the recordings lie, and :func:`foreign` which formats are ffmpeg's. Nothing is decoded here,
and no bytes lead to an error: what is not understood is left to the decoder.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

#: More recordings than this in one file are not told apart.
LARGEST_NUMBER = 10_000

_WINDOW = 2**20  # bytes read at a time
_JUNK = 2**24  # bytes between two MP3 frames that are searched for the second


@dataclass(frozen=True)
class Part:
    """One recording in a file.

    Attributes:
        pieces: what a decoder should see in place of the file: bytes, or (start, end) in the file.
        frames: no more samples per channel than this are to be read (None: as the decoder says).
    """

    pieces: tuple[bytes | tuple[int, int], ...]
    frames: int | None = None


@dataclass(frozen=True)
class Layout:
    """The recordings in a file.

    Attributes:
        parts: in their order; none where the file is one recording whose header can be believed.
        lost: what cannot be read, as the rest of a sentence that begins with the file's name ("": nothing).
        unsized: how the header fails to give the length, likewise.
        end: where the audio ends, in bytes (None: not known).
    """

    parts: tuple[Part, ...] = ()
    lost: str = ""
    unsized: str = ""
    end: int | None = None


def most_unread(size: int) -> int:
    """How many bytes may be left behind in a file without a word: tags, padding."""
    return max(2**16, size // 20)


class View(io.RawIOBase):
    """A :class:`Part` as a file to read. It never raises: libsndfile could not pass the error on."""

    def __init__(self, file: BinaryIO, pieces: tuple[bytes | tuple[int, int], ...]) -> None:
        super().__init__()
        self._file = file
        self._pieces = pieces
        lengths = [len(piece) if isinstance(piece, bytes) else piece[1] - piece[0] for piece in pieces]
        self._ends = list(itertools.accumulate(lengths))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = max(0, offset + (0, self._position, self._ends[-1])[whence])  # a damaged header leads anywhere
        return self._position

    def readinto(self, buffer) -> int:
        buffer = memoryview(buffer).cast("B")
        filled, start = 0, 0
        for piece, end in zip(self._pieces, self._ends, strict=True):
            if start <= self._position < end and filled < len(buffer):
                count = min(end - self._position, len(buffer) - filled)
                offset = self._position - start
                data = piece[offset : offset + count] if isinstance(piece, bytes) else self._read(piece[0] + offset, count)
                buffer[filled : filled + len(data)] = data
                filled += len(data)
                self._position += len(data)
            start = end
        return filled

    def _read(self, start: int, count: int) -> bytes:
        try:
            self._file.seek(start)
            return self._file.read(count)
        except OSError:
            return b""


_SEEN: dict[tuple, Layout] = {}


def layout(file: BinaryIO) -> Layout:
    """Find the recordings in a file that is open for reading in binary. A file that did not change is looked through once."""
    status = os.fstat(file.fileno())
    reader = _Reader(file, status.st_size)
    ends = reader(0, 256) + reader(max(0, status.st_size - 256), 256)  # clocks are coarse, and inodes are used again
    key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, ends)
    found = _SEEN.get(key)
    if found is None:
        start = _after_id3(reader, 0)
        magic = reader(start, 12)
        function = next((function for pattern, function in _CONTAINERS if pattern.match(magic)), None)
        found = function(reader, start) if function else Layout()
        if len(_SEEN) >= 256:
            _SEEN.clear()
        _SEEN[key] = found
    return found


class _Reader:
    """Bytes of a file by position, through a window; fewer or none beyond the end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self._start, self._data = 0, b""

    def __call__(self, position: int, count: int) -> bytes:
        at = position - self._start
        if at < 0 or at + count > len(self._data):
            try:
                self.file.seek(position)
                self._data = self.file.read(max(count, 2**16))
            except (OSError, ValueError, OverflowError):
                return b""
            self._start, at = position, 0
        return self._data[at : at + count]

    def number(self, position: int, count: int, order: str = "big") -> int:
        return int.from_bytes(self(position, count), order)

    def search(self, pattern: re.Pattern[bytes], overlap: int) -> Iterator[int]:
        """Where a pattern occurs that is at most ``overlap`` bytes long."""
        position = 0
        while data := self(position, _WINDOW):
            for match in pattern.finditer(data):
                if match.start() < len(data) - overlap or len(data) < _WINDOW:
                    yield position + match.start()
            if len(data) < _WINDOW:
                return
            position += len(data) - overlap


def _after_id3(reader: _Reader, position: int) -> int:
    while length := _id3v2(reader(position, 10)):
        position += length
    return position


def _id3v2(head: bytes) -> int:
    """Length of an ID3v2 tag, 0 if this is none."""
    if len(head) < 10 or head[:3] != b"ID3" or head[3] == 0xFF or max(head[6:10]) > 127:
        return 0
    footer = 10 if head[5] & 0x10 else 0
    return 10 + footer + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9])


def _joined(starts: list[int], size: int, lost: str = "") -> Layout:
    """Recordings that begin at these places, each up to the next."""
    if len(starts) > LARGEST_NUMBER:
        lost = f"is more than {LARGEST_NUMBER} recordings joined; those after are left out"
    if len(starts) < 2:
        return Layout(lost=lost)
    return Layout(tuple(Part((place,)) for place in itertools.pairwise([*starts, size]))[:LARGEST_NUMBER], lost)


# --- Ogg (RFC 3533) ----------------------------------------------------------------------------------------------------

_FIRST_PAGE = re.compile(rb"OggS\0[\x02\x06]")  # header types: beginning of a stream, or beginning and end


def _ogg(reader: _Reader, start: int) -> Layout:
    starts, after = [], -1
    for position in reader.search(_FIRST_PAGE, 8):
        length = _ogg_page(reader, position)
        # one packet of a hundred bytes or so; the checksum tells it from a recording within a picture, or from chance
        if not length or length > 1024 or _ogg_checksum(reader(position, length)) != reader(position + 22, 4):
            continue
        if position != after:  # streams that are multiplexed begin page upon page
            starts.append(position)
        after = position + length
        if len(starts) > LARGEST_NUMBER:
            break
    lost = ""
    for index, (begin, end) in enumerate(itertools.pairwise([*(starts or [start]), reader.size])):
        tail_start = max(begin, end - 2**17)
        last = reader(tail_start, end - tail_start).rfind(b"OggS")
        if last < 0:
            continue
        length = _ogg_page(reader, tail_start + last)
        which = f"the last page of recording {index + 1} in it" if len(starts) > 1 else "its last page"
        if not length or tail_start + last + length > end:
            lost = lost or f"is truncated: {which} is not whole"
        elif not reader.number(tail_start + last + 5, 1) & 4:
            lost = lost or f"is truncated: {which} does not end the stream"
    return _joined(starts, reader.size, lost)


def _ogg_page(reader: _Reader, position: int) -> int:
    """Length of a page, 0 if its header is not whole."""
    segments = reader.number(position + 26, 1)
    table = reader(position + 27, segments)
    return 27 + segments + sum(table) if len(table) == segments and position + 27 <= reader.size else 0


@functools.cache
def _ogg_table() -> list[int]:
    table = []
    for value in range(256):
        value <<= 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value & 0x80000000 else 0)) & 0xFFFFFFFF
        table.append(value)
    return table


def _ogg_checksum(page: bytes) -> bytes:
    value, table = 0, _ogg_table()
    for byte in page[:22] + bytes(4) + page[26:]:
        value = (value << 8 ^ table[value >> 24 ^ byte]) & 0xFFFFFFFF
    return value.to_bytes(4, "little")


# --- FLAC (RFC 9639) ---------------------------------------------------------------------------------------------------

_STREAMINFO = re.compile(rb"fLaC[\0\x80]\0\0\x22", re.DOTALL)


def _flac(reader: _Reader, start: int) -> Layout:
    starts, metadata = [], 0
    for position in reader.search(_STREAMINFO, 8):
        smallest, largest = reader.number(position + 8, 2), reader.number(position + 10, 2)
        if position < metadata or not 16 <= smallest <= largest:  # in a picture, or not the format
            continue
        starts.append(position)
        metadata, last = position + 4, False
        while not last and metadata < reader.size:
            last = reader.number(metadata, 1) >= 128
            metadata += 4 + reader.number(metadata + 1, 3)
        if len(starts) > LARGEST_NUMBER:
            break
    return _joined(starts, reader.size)


# --- RIFF, AIFF, AU, CAF -----------------------------------------------------------------------------------------------


def _patched(start: int, end: int, changes: dict[int, bytes]) -> Part:
    pieces: list[bytes | tuple[int, int]] = []
    for place, value in sorted(changes.items()):
        pieces += [(start, place), value]
        start = place + len(value)
    return Part((*pieces, (start, end)))


def _chunks(reader: _Reader, position: int, order: str) -> Iterator[tuple[bytes, int, int]]:
    """Chunks as (name, start of the content, size as claimed), as long as they make sense."""
    for _ in range(10_000):
        name = reader(position, 4)
        if position + 8 > reader.size or len(name) < 4 or not all(32 <= c < 127 for c in name):
            return
        size = reader.number(position + 4, 4, order)
        yield name, position + 8, size
        position += 8 + size + size % 2


_RIFF = b"RIFF", b"RIFX", b"RF64"


def _end_of_chunks(reader: _Reader, position: int, order: str) -> int:
    for name, start, size in _chunks(reader, position, order):
        if name in (*_RIFF, b"FORM"):  # another file
            break
        position = start + size + size % 2
    return position


def _only_chunks(reader: _Reader, position: int, order: str) -> bool:
    """Whether nothing but whole chunks follows, one at least."""
    end = _end_of_chunks(reader, position, order)
    return end > position and abs(end - reader.size) <= 1


def _beyond(reader: _Reader, end: int) -> str:
    """What to say if much of the file lies after its end."""
    left = reader.size - end
    return f"goes on after its end: {left} of {reader.size} bytes are not read" if left > most_unread(reader.size) else ""


_NO_LENGTH = "has no length in its header ({}): everything up to the end of the file is taken for audio"


def _wav(reader: _Reader, start: int) -> Layout:
    starts, position = [], start
    while reader(position, 4) in _RIFF and reader(position + 8, 4) == b"WAVE":
        order = "big" if reader(position, 4) == b"RIFX" else "little"
        starts.append(position)
        ds64 = None
        for name, at, size in _chunks(reader, position + 12, order):  # noqa: B007
            if name == b"ds64":
                ds64 = at
            if name == b"data":
                break
        else:
            break
        rest = reader.size - at
        large = ds64 is not None and reader(position, 4) == b"RF64"
        claimed = reader.number(ds64 + 8, 8, "little") if large and size in (0, 2**32 - 1) else size
        if claimed in ((0, 2**64 - 1) if large else (0, 2**32 - 1)):
            if len(starts) > 1 or rest <= 0 or (claimed == 0 and _only_chunks(reader, at, order)):
                break
            if large:
                changes = {ds64: (reader.size - 8).to_bytes(8, "little") + rest.to_bytes(8, "little") + bytes(8)}
                changes[at - 4] = b"\xff" * 4
            else:
                shown = min(rest, 2**32 - 64).to_bytes(4, order)
                changes = {position + 4: min(reader.size - position - 8, 2**32 - 2).to_bytes(4, order), at - 4: shown}
            lost = "" if large or rest < 2**32 - 64 else "has more than 4 GB of audio, but WAV's length: the rest is not read"
            return Layout((_patched(position, reader.size, changes),), lost, _NO_LENGTH.format(f"data size {claimed}"))
        # a header that was not completed may give any length, so the next recording is looked for where the chunks end too
        ends = [position + 8 + reader.number(position + 4, 4, order), _end_of_chunks(reader, at + claimed + claimed % 2, order)]
        position = next((end for end in ends if reader(end, 4) in _RIFF), max(ends))
        if len(starts) > LARGEST_NUMBER:
            break
    else:
        return _joined(starts, reader.size, _beyond(reader, position) if starts else "")
    return _joined(starts, reader.size)


def _aiff(reader: _Reader, start: int) -> Layout:
    for name, at, size in _chunks(reader, start + 12, "big"):
        if name == b"SSND":
            rest = reader.size - at
            if size > 8:
                ends = start + 8 + reader.number(start + 4, 4), _end_of_chunks(reader, at + size + size % 2, "big")
                return Layout(lost=_beyond(reader, max(ends)))
            if size not in (0, 8) or rest <= 8 or _only_chunks(reader, at + size, "big"):
                break
            changes = {at - 4: min(rest, 2**32 - 1).to_bytes(4, "big")}
            return Layout((_patched(start, reader.size, changes),), "", _NO_LENGTH.format(f"SSND size {size}"))
    return Layout()


def _au(reader: _Reader, start: int) -> Layout:
    offset, size = reader.number(start + 4, 4), reader.number(start + 8, 4)
    if size or not 24 <= offset < reader.size:
        return Layout()
    return Layout((_patched(start, reader.size, {start + 8: b"\xff" * 4}),), "", _NO_LENGTH.format("data size 0"))


def _caf(reader: _Reader, start: int) -> Layout:
    position = start + 8
    for _ in range(10_000):
        name, size = reader(position, 4), reader.number(position + 4, 8)
        if name == b"data":
            rest = reader.size - position - 12
            if size not in (0, 2**64 - 1) or rest <= 4:
                break
            part = _patched(start, reader.size, {position + 4: rest.to_bytes(8, "big")})
            return Layout((part,), "", "" if size else _NO_LENGTH.format("data size 0"))  # −1: "up to the end", says Apple
        if len(name) < 4 or position > reader.size:
            break
        position += 12 + size
    return Layout()


# --- MP3 (ISO 11172-3, 13818-3) ----------------------------------------------------------------------------------------

_BITRATES = {  # kbit/s by (MPEG 1, layer)
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


@dataclass(frozen=True)
class _Header:
    """What the four bytes before a frame say: its length in bytes and samples, where a frame count would be, and what does
    not change within a recording.
    """

    length: int
    samples: int
    tag: int
    kind: tuple


@functools.lru_cache(maxsize=4096)
def _mp3_header(head: bytes) -> _Header | None:
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    bitrate, rate, padding = head[2] >> 4, head[2] >> 2 & 3, head[2] >> 1 & 1
    if version == 1 or layer == 4 or bitrate in (0, 15) or rate == 3:  # reserved; 0: "free", the length is not known
        return None
    first, mono = version == 3, head[3] >> 6 == 3
    hertz = (44_100, 48_000, 32_000)[rate] // {3: 1, 2: 2, 0: 4}[version]
    bits = 1000 * _BITRATES[first, layer][bitrate]
    if layer == 1:
        length, samples = 4 * (12 * bits // hertz + padding), 384
    else:
        samples = 1152 if first or layer == 2 else 576
        length = samples // 8 * bits // hertz + padding
    side = (17 if mono else 32) if first else (9 if mono else 17)
    crc = 0 if head[1] & 1 else 2
    return _Header(length, samples, 4 + crc + side, (version, layer, hertz, mono))


@dataclass
class _Run:
    """MP3 frames without a gap, of one kind: from ``start`` (the frame that counts included) to ``end``."""

    start: int
    first: int
    head: bytes
    header: _Header
    claimed: int | None
    frames: int = 0
    end: int = 0
    last: bool = False


def _mp3(reader: _Reader, start: int) -> Layout:
    runs: list[_Run] = []
    run, position, end, junk, cut = None, start, start, 0, False
    while position + 4 <= reader.size and len(runs) <= LARGEST_NUMBER:
        head = reader(position, 4)
        header = _mp3_header(head)
        if header is None or (run is None and not _mp3_follows(reader, position, header)):
            run = None
            if length := _tag(reader, position):
                position += length
                end = max(end, min(position, reader.size))
                continue
            found, real = _mp3_search(reader, position + 1)
            if found is None:
                break
            junk += real if runs else 0
            position = found
            continue
        if position + header.length > reader.size:
            cut = run is not None and run.claimed is None
            break
        counted, claimed = _mp3_count(reader, position, header)
        if run is None or counted or header.kind != run.header.kind:
            run = _Run(position, position + header.length if counted else position, head, header, claimed)
            runs.append(run)
        if not counted:
            run.frames += 1
        position += header.length
        end = run.end = position
    lost = ""
    if junk:
        lost = f"is damaged: {junk} bytes in it are no MP3 frames" if junk > 1 else "is damaged: a byte in it is no MP3 frame"
    elif cut:
        lost = "is truncated: its last frame is not whole"
    elif runs and reader.size - end > most_unread(reader.size):
        lost = f"goes on after its last MP3 frame: {reader.size - end} of {reader.size} bytes are not read"
    if len(runs) > LARGEST_NUMBER:
        lost = f"is more than {LARGEST_NUMBER} recordings joined, or damaged; the rest is left out"
    runs = [run for run in runs if run.frames][:LARGEST_NUMBER]
    if not runs or (len(runs) == 1 and (not _synthetic(runs[0]))):
        return Layout((), lost, end=end if runs else None)
    parts = []
    for run in runs:
        pieces = (_mp3_counting(run), (run.first, run.end)) if _synthetic(run) else ((run.start, run.end),)
        parts.append(Part(pieces, None if run is runs[-1] else run.frames * run.header.samples))
    return Layout(tuple(parts), lost, end=end)


def _synthetic(run: _Run) -> bool:
    """Whether libsndfile would estimate the length, from the bitrate of the first frame, or take one that is too small."""
    return run.header.kind[1] == 3 and (not run.claimed or run.claimed + 1 < run.frames)


def _mp3_counting(run: _Run) -> bytes:
    """A frame as LAME's that gives the number of frames: libsndfile believes it, and does not play it."""
    head = bytearray(run.head)
    head[1] |= 1  # no checksum
    head[2] = (9 if run.header.kind[0] == 3 else 8) << 4 | head[2] & 0b1100  # 128 or 64 kbit/s: long enough
    header = _mp3_header(bytes(head))
    frame = bytes(head) + bytes(header.tag - 4) + b"Xing" + (1).to_bytes(4, "big") + run.frames.to_bytes(4, "big")
    return frame.ljust(header.length, b"\0")


def _mp3_count(reader: _Reader, position: int, header: _Header) -> tuple[bool, int | None]:
    """Whether a frame gives the number of frames instead of sound, and that number."""
    if header.kind[1] != 3:
        return False, None
    at = position + header.tag
    tag = reader(at, 4)
    if tag in (b"Xing", b"Info"):
        return True, reader.number(at + 8, 4) if reader.number(at + 4, 4) & 1 else None
    if reader(position + 36, 4) == b"VBRI":
        return True, reader.number(position + 50, 4)
    return False, None


def _mp3_follows(reader: _Reader, position: int, header: _Header) -> bool:
    """Whether two more frames of the same kind follow, or the end: four bytes look like a header by chance."""
    for _ in range(2):
        position += header.length
        if position >= reader.size or _tag(reader, position):
            return True
        following = _mp3_header(reader(position, 4))
        if following is None or following.kind[:2] != header.kind[:2]:
            return position + 4 > reader.size
        header = following
    return True


def _mp3_search(reader: _Reader, position: int) -> tuple[int | None, int]:
    """The next frame, and how many bytes other than zeros are before it."""
    end, real = min(reader.size, position + _JUNK), 1
    while position < end:
        window = reader(position, 2**16)
        found = window.find(b"\xff")
        if found < 0:
            real += len(window) - window.count(0)
            position += max(1, len(window))
            continue
        real += found - window[:found].count(0)
        position += found
        header = _mp3_header(reader(position, 4))
        if (header and _mp3_follows(reader, position, header)) or _tag(reader, position):
            return position, real
        real += 1
        position += 1
    return None, real


def _tag(reader: _Reader, position: int) -> int:
    """Length of a tag (ID3v1, ID3v2, APE, Lyrics3) at this place, 0 if there is none."""
    head = reader(position, 32)
    if head[:3] == b"TAG":
        return 227 if head[3:4] == b"+" else 128
    if head[:3] == b"ID3":
        return _id3v2(head)
    if head[:8] == b"APETAGEX" and len(head) == 32:
        size, flags = int.from_bytes(head[12:16], "little"), int.from_bytes(head[20:24], "little")
        return 32 + (size if flags & 0x20000000 else 0)  # a header; the footer is the end of the size
    if head[:11] == b"LYRICSBEGIN":
        at = reader(position, 2**16).find(b"LYRICS200")
        return at + 9 if at > 0 else 0
    return 0


_CONTAINERS = [
    (re.compile(rb"OggS"), _ogg),
    (re.compile(rb"fLaC"), _flac),
    (re.compile(rb"(RIFF|RIFX|RF64)....WAVE", re.DOTALL), _wav),
    (re.compile(rb"FORM....AIF[FC]", re.DOTALL), _aiff),
    (re.compile(rb"\.snd"), _au),
    (re.compile(rb"caff"), _caf),
    (re.compile(rb"\xff[\xe0-\xff]"), _mp3),
]


# --- formats of ffmpeg -------------------------------------------------------------------------------------------------

# name, ffmpeg's demuxer, magic
_FOREIGN = [
    ("3GP", "mov", rb".{4}ftyp3g"),
    ("M4A (MPEG-4)", "mov", rb".{4}ftypM4[AB]"),
    ("QuickTime", "mov", rb".{4}(ftypqt|moov|wide|mdat)"),
    ("MP4", "mov", rb".{4}ftyp"),
    ("WebM", "matroska", rb"\x1a\x45\xdf\xa3.{0,60}webm"),
    ("Matroska", "matroska", rb"\x1a\x45\xdf\xa3"),
    ("WMA (ASF)", "asf", rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),
    ("AMR", "amr", rb"#!AMR"),
    ("AAC (ADTS)", "aac", rb"\xff[\xf0\xf1\xf8\xf9]"),
    ("AVI", "avi", rb"RIFF.{4}AVI "),
    ("Flash video", "flv", rb"FLV\x01"),
    ("RealAudio", "rm", rb"\.RMF|\.ra\xfd"),
    ("Monkey's Audio", "ape", rb"MAC "),
    ("WavPack", "wv", rb"wvpk"),
    ("True Audio", "tta", rb"TTA[12]"),
    ("Musepack", "mpc8", rb"MPCK"),
    ("Musepack", "mpc", rb"MP\+"),
    ("DSD", "dsf", rb"DSD "),
    ("DSDIFF", "iff", rb"FRM8"),
    ("Enhanced AC-3", "eac3", rb"\x0b\x77.{3}[\x58-\xff]"),
    ("AC-3", "ac3", rb"\x0b\x77"),
    ("DTS", "dts", rb"\x7f\xfe\x80\x01"),
    ("TAK", "tak", rb"tBaK"),
    ("Shorten", "shn", rb"ajkg"),
    ("MPEG program stream", "mpeg", rb"\0\0\x01\xba"),
    ("MPEG transport stream", "mpegts", rb"\x47.{187}\x47.{187}\x47"),
]
_FOREIGN_PATTERNS = [(name, demuxer, re.compile(magic, re.DOTALL)) for name, demuxer, magic in _FOREIGN]


def foreign(file: BinaryIO) -> tuple[str, str] | None:
    """The format of a file that libsndfile cannot read and ffmpeg may, by its content: (name, ffmpeg's demuxer) or None.

    None also for formats of libsndfile: a damaged WAV is no task for ffmpeg, one with a codec of its own is.
    """
    reader = _Reader(file, os.fstat(file.fileno()).st_size)
    head = reader(_after_id3(reader, 0), 4096)
    for name, demuxer, pattern in _FOREIGN_PATTERNS:
        if pattern.match(head):
            return name, demuxer
    if head[:4] == b"OggS" and len(head) > 28:
        packet = head[27 + head[26] :]
        if packet.startswith(b"Speex   "):
            return "Ogg Speex", "ogg"
        if packet.startswith((b"\x80theora", b"fishead", b"BBCD", b"OVP80")):
            return "Ogg with video", "ogg"
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE" and 0 < (at := head.find(b"fmt ")) <= len(head) - 10:
        codec = int.from_bytes(head[at + 8 : at + 10], "little")
        if codec not in (0, 1, 2, 3, 6, 7, 0x11, 0x31, 0x64, 0xFFFE):
            return f"WAV with codec 0x{codec:04x}", "wav"
    if head[:4] == b"FORM" and head[8:12] == b"AIFC" and 0 < (at := head.find(b"COMM")) <= len(head) - 30:
        codec = head[at + 26 : at + 30]
        if codec.strip().isalnum() and codec.strip() not in _AIFC:
            return f"AIFF-C with codec {codec.decode().strip()}", "aiff"
    if head[:4] == b"caff" and len(head) > 32:
        codec = head[28:32]
        if codec.replace(b" ", b"").isalnum() and codec not in (b"lpcm", b"alac", b"ulaw", b"alaw", b"ima4"):
            return f"CAF with codec {codec.decode().strip()}", "caf"
    return None


_AIFC = b"NONE sowt twos raw fl32 FL32 fl64 FL64 ulaw ULAW alaw ALAW in24 in32 42ni 23ni DWVW GSM ima4".split()
