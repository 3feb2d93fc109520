"""The bank: a corpus decoded once into int16 16 kHz mono shards that are memory-mapped, and a table of its clips.

``BANK/bank.json`` says what it is, ``BANK/clips.parquet`` has a row per clip, ``BANK/shards/NNNNN.npy`` hold the samples of
up to 256 clips each, back to back, and ``BANK/failures.csv`` lists files that could not be read, or not to their end.
Clips have one global sample axis, int64, which may pass 2³¹.

Each clip is stored multiplied by the power of two (its ``scale``) that makes it fill 16 bits: a recording at -60 dB has as many
bits as one at full scale, and a recording of 16 bits loses none. ``Bank.wave`` and ``w2s_jax.render`` divide by the scale;
``Bank.clip`` and ``Bank.gather`` do not.

Checksums are verified: of bank.json and clips.parquet when a bank is opened, of a clip when a process first reads it (at
1.5 GB/s), of everything when ``build`` runs again.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    from w2s_jax.errors import missing_extra

    raise missing_extra("pyarrow", "train") from error

from w2s_jax import DIMENSIONS, SAMPLING_RATE, audio
from w2s_jax.corpora import SPLITS, Clip, check_decoded, check_splits, fault
from w2s_jax.errors import MismatchError, UsageError, W2SError
from w2s_jax.files import fingerprint, read_json, write_atomic, write_json
from w2s_jax.locks import locked

#: Of bank.json and of the shards' tables. Banks of version 1 have no checksums and no scales.
VERSION = 2

#: A shard ends with so many clips, or with the clip that brings it to so many samples (70 minutes, 134 MB).
SHARD_CLIPS, SHARD_SAMPLES = 256, 2**26

#: Samples that a clip may have, 37 hours: places within a clip are int32 on every device.
LONGEST = 2**31 - 2**17

#: A clip is stored at most so many times its level: below 2^-64 (-385 dB) is silence.
_LARGEST_SCALE = 2.0**64

#: Bytes of a clip that are kept in memory while it is decoded (30 s); a longer clip goes through a file of 4 bytes a sample.
_IN_MEMORY = 2**21
_SCHEMA = pa.schema(
    [
        ("clip", pa.int32()),
        ("name", pa.string()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("split", pa.string()),
        ("speaker", pa.string()),
        ("group", pa.string()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("samples", pa.int32()),
        ("scale", pa.float32()),
        ("sum", pa.string()),
        *((dimension, pa.float32()) for dimension in DIMENSIONS),
    ]
)


class BankError(W2SError):
    """The bank cannot be built or read."""


class BankWarning(UserWarning):
    """A part of a bank was damaged and has been rebuilt, or a split is empty."""


def to_int16(wave: np.ndarray) -> tuple[np.ndarray, float]:
    """float32 [T] → int16 [T] and the scale that it was multiplied by, a power of two: never clipped, 15 bits at least used.

    Example:
        >>> to_int16(np.array([0.001, -0.0005], np.float32))
        (array([16777, -8389], dtype=int16), 512.0)
    """
    scale = _scale(float(wave.min(initial=0.0)), float(wave.max(initial=0.0)))
    return _quantise(wave, scale), scale


def _scale(low: float, high: float) -> float:
    """The largest power of two that lets samples between ``low`` ≤ 0 and ``high`` ≥ 0 fit into 16 bits; 1 for silence."""
    peak = max(-low, high)
    if not peak:
        return 1.0
    scale = min(2.0 ** (1 - math.frexp(peak)[1]), _LARGEST_SCALE)  # the peak comes between 1 and 2
    while round(high * scale * audio.FULL_SCALE) > 32767 or round(low * scale * audio.FULL_SCALE) < -audio.FULL_SCALE:
        scale /= 2
    return scale


def _quantise(wave: np.ndarray, scale: float) -> np.ndarray:
    return np.rint(wave * np.float32(scale * audio.FULL_SCALE)).astype(np.int16)


def build(
    clips: Sequence[Clip],
    out: str | os.PathLike,
    *,
    corpus: str = "folder",
    origin: dict | None = None,
    force: bool = False,
    workers: int | None = None,
    max_failures: int | None = None,
    progress: Callable[..., None] | None = None,
) -> dict:
    """Decode clips into a bank, in bounded memory however long they are.

    Run again, it verifies and keeps what is there, and does the rest: after a kill, after damage (which it names in a
    ``BankWarning``), and after files of the same origin were added, changed or removed. A bank of another origin is left alone.

    Args:
        clips: what to decode; every clip has a split, no speaker or group is in two.
        out: the bank's directory.
        corpus: where the clips come from, kept in bank.json.
        origin: what makes this bank another one than that of other sources, JSON-like, kept in plan.json; default: the
            corpus and the folder that all files are in.
        force: build over a bank of another origin.
        workers: decoding threads (libsndfile and soxr release the interpreter lock); default: one a core.
        max_failures: stop with an error once more clips than this cannot be read; default: never.
        progress: called with (clips done, clips in all, minutes=decoded so far), twice a second and after each clip.

    Returns:
        bank.json as a dict.

    Raises:
        UsageError: ``out`` holds something that is not a bank.
        MismatchError: ``out`` holds a bank of another origin; names the differences.
        BankError: no clips, none readable, too many failures, or a split missing.
        CorpusError: a speaker, a group or a recording is in two splits.
    """
    out = Path(out)
    if not clips:
        raise BankError("there are no clips to put into the bank")
    without = [clip.name for clip in clips if clip.split not in SPLITS]
    if without:
        raise BankError(f"{len(without)} clips have no split (first: {without[0]}); expected one of {', '.join(SPLITS)}")
    check_splits(clips)
    origin = {"corpus": corpus} | (origin or {"folder": _folder(clips)})
    _check_place(out)
    with locked(out), _Decoder(clips, out, workers or os.cpu_count() or 1) as decoder:
        _claim(out, origin, force)
        report = progress or (lambda done, total, **figures: None)
        shards, problems, read, done = [], [], [], 0
        while done < len(clips):
            ahead = clips[done : done + SHARD_CLIPS]
            shard = _read_shard(out, len(shards), ahead)
            if shard is None:
                (out / "bank.json").unlink(missing_ok=True)  # while it is rebuilt, the bank cannot be opened

                def step(n: int, before: int = done) -> None:
                    report(before + n, len(clips), minutes=decoder.samples / SAMPLING_RATE / 60)

                shard = _write_shard(out, len(shards), ahead, decoder.start(done, step), step)
            shards.append(shard)
            problems += shard.problems
            missing = {problem.clip for problem in shard.problems if not problem.in_part}
            read += [clip for at, clip in enumerate(ahead[: shard.clips]) if at not in missing]
            done += shard.clips
            report(done, len(clips))
            unread = [problem for problem in problems if not problem.in_part]
            if max_failures is not None and len(unread) > max_failures:
                raise BankError(f"{len(unread)} clips cannot be read, {max_failures} are allowed; the first: {unread[0]}")
        decoder.stop()
        table = pa.concat_tables([shard.table for shard in shards])
        if not table.num_rows:
            raise BankError(f"none of {len(clips)} clips can be read; the first: {unread[0]}")
        check_decoded(read, table["sum"].to_pylist())
        for split in sorted({clip.split for clip in clips} - set(table["split"].to_pylist())):
            warnings.warn(
                f"no clip of the {split} split can be used, so it is empty: see failures.csv, or draw the splits anew without "
                "those clips",
                BankWarning,
                stacklevel=2,
            )
        table = table.set_column(0, _SCHEMA.field("clip"), pa.array(np.arange(table.num_rows, dtype=np.int32)))
        content = io.BytesIO()
        pq.write_table(table, content)
        about = {
            "format": "w2s-bank",
            "version": VERSION,
            "corpus": corpus,
            "sampling_rate": SAMPLING_RATE,
            "clips": table.num_rows,
            "failures": len(unread),
            "read_in_part": len({problem[:2] for problem in problems} - {problem[:2] for problem in unread}),
            "samples": int(np.sum(table["samples"].to_numpy(), dtype=np.int64)),
            "shards": len(shards),
            "fingerprint": fingerprint(table.drop(["shard", "offset"]).to_pydict()),
            "sums": {"clips.parquet": fingerprint(content.getvalue())},
        }
        about["sum"] = fingerprint(about)
        write_atomic(out / "failures.csv", lambda path: path.write_text(_failures_csv(problems), encoding="utf-8"))
        if not _is_bank(out, about):
            (out / "bank.json").unlink(missing_ok=True)
            write_atomic(out / "clips.parquet", lambda path: path.write_bytes(content.getbuffer()))
            write_json(out / "bank.json", about)
        for stale in (out / "shards").iterdir():  # of a longer bank before; other people's files stay
            number = re.fullmatch(r"(\d{5,})\.(npy|parquet)", stale.name)
            if number and int(number[1]) >= len(shards) and stale.is_file():
                stale.unlink()
        return about


def _is_bank(out: Path, about: dict) -> bool:
    """Whether exactly this bank is there already."""
    try:
        whole = fingerprint(out / "clips.parquet") == about["sums"]["clips.parquet"]
        return whole and read_json(out / "bank.json", "bank") == about
    except (OSError, W2SError):
        return False


def _folder(clips: Sequence[Clip]) -> str:
    try:
        folder = os.path.commonpath([os.path.dirname(os.path.abspath(clip.file)) for clip in clips])
    except ValueError:  # Windows: several drives
        folder = ""
    return os.fsencode(folder).decode("utf-8", "backslashreplace")


def _check_place(out: Path) -> None:
    """Refuse a directory that holds something else."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; expected a directory for the bank")
    if any((out / name).is_file() for name in ("plan.json", "bank.json")):
        return  # _claim reads them
    if out.exists() and any(path.name != ".lock" and not path.name.startswith(".w2s-") for path in out.iterdir()):
        raise UsageError(f"{out} is not empty and not a bank; choose another directory")


def _claim(out: Path, origin: dict, force: bool) -> None:
    """Record the origin of the bank before its first shard is written; refuse a bank of another origin."""
    plan, bank = out / "plan.json", out / "bank.json"
    now = {"format": "w2s-bank-plan", "version": VERSION, "origin": origin}
    now["sum"] = fingerprint(now)
    file = plan if plan.is_file() else bank  # version 1 had no plan.json
    if file.is_file():
        unknown = (
            f"so it is not known what bank {out} holds; choose another directory, or use --force to build here (what is whole "
            "is kept)"
        )
        try:
            try:
                before = read_json(file, "bank")
            except UsageError:
                raise
            except W2SError as error:
                raise MismatchError(f"{error}, {unknown}") from error
            if before.get("format") not in ("w2s-bank", "w2s-bank-plan"):
                raise UsageError(f"{out} holds something else ({before.get('format', file.name)}); choose another directory")
            if before.get("version") != VERSION:
                raise MismatchError(
                    f"{out} holds a bank of version {before.get('version')}, and this is version {VERSION}; choose another "
                    "directory, or use --force to build it anew (views and labels of the old one do not fit the new one)"
                )
            there = before.get("origin", {})
            if before.pop("sum", None) != fingerprint(before):
                raise MismatchError(f"{file} is damaged, {unknown}")
            differing = [
                f"{key.replace('_', ' ')}: {there.get(key)} there, {origin.get(key)} now"
                for key in sorted({*there, *origin})
                if there.get(key) != origin.get(key)
            ]
            if differing:
                raise MismatchError(
                    f"{out} holds a bank of something else ({'; '.join(differing)}); choose another directory, or use --force "
                    "to build over it"
                )
        except UsageError:
            raise
        except W2SError:
            if not force:
                raise
    if not plan.is_file() or force:
        write_json(plan, now)


def read_table(source: bytes | os.PathLike) -> pa.Table:
    """Read a parquet file, or the content of one, in this thread.

    Threads of pyarrow's (26.0) abort a process that ends right after it has read: one in twenty on a busy machine.
    """
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    with pq.ParquetFile(pa.BufferReader(content)) as file:
        return file.read(use_threads=False)


class _Problem(NamedTuple):
    """A clip that is missing in the bank, or cut short; ``clip`` is its index within the shard."""

    clip: int
    name: str
    reason: str
    in_part: bool

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass
class _Shard:
    """A shard on disk: its rows of clips.parquet, and the problems of the clips that it was made of."""

    table: pa.Table
    clips: int  # that it was made of
    problems: list[_Problem]

    def facts(self, plan: str) -> dict:
        facts = {"version": VERSION, "plan": plan, "clips": self.clips, "problems": [list(p) for p in self.problems]}
        return facts | {"sum": fingerprint(facts, self.table.to_pydict())}


def _files(out: Path, shard: int) -> tuple[Path, Path]:
    return out / "shards" / f"{shard:05d}.npy", out / "shards" / f"{shard:05d}.parquet"


def _read_shard(out: Path, number: int, clips: Sequence[Clip]) -> _Shard | None:
    """Read a shard; None unless it was made of exactly these files (the first of ``clips``) and is undamaged."""
    samples_path, table_path = _files(out, number)
    try:
        table = read_table(table_path)
        facts = json.loads((table.schema.metadata or {})[b"w2s"])
        table = table.replace_schema_metadata(None)
        shard = _Shard(table, facts["clips"], [_Problem(*problem) for problem in facts["problems"]])
        if shard.facts(facts["plan"]) != facts:
            raise BankError(f"{table_path} is damaged")
        if facts["plan"] != _plan(clips[: shard.clips]) or not shard.clips:
            return None
        sums = zip(_sums(samples_path, table["samples"].to_pylist()), table["sum"].to_pylist(), strict=True)
        wrong = [at for at, (actual, expected) in enumerate(sums) if actual != expected]
        if wrong:
            names = ", ".join(table["name"][at].as_py() for at in wrong[:3]) + ", …" * (len(wrong) > 3)
            raise BankError(f"{samples_path} is damaged in {len(wrong)} clips ({names})")
        return shard
    except BankError as error:
        fault = str(error)
    except (OSError, KeyError, TypeError, ValueError, RecursionError, pa.ArrowException):
        if not table_path.exists() or _is_old(table_path):
            return None
        fault = f"{table_path} is damaged"
    warnings.warn(f"{fault}; its clips are decoded again", BankWarning, stacklevel=3)
    return None


def _is_old(table_path: Path) -> bool:
    """Whether a shard's table is of version 1, which has no checksums."""
    try:
        return b"samples_sha" in (pq.read_schema(table_path).metadata or {})
    except (OSError, pa.ArrowException):
        return False


def _write_shard(out: Path, number: int, clips: Sequence[Clip], decoded: Iterator[_Decoded], step: Callable) -> _Shard:
    """Write the next shard, of as many of ``clips`` as fit."""
    samples_path, table_path = _files(out, number)
    rows, made_of, shard = [], [], _Shard(_SCHEMA.empty_table(), 0, [])

    def save(path: Path) -> None:
        offset = 0
        with open(path, "wb") as file:
            file.write(_header(0))
            for index, clip in enumerate(clips):
                wave = next(decoded)
                made_of.append(wave.source)
                read = wave.samples is not None
                shard.problems += [_Problem(index, clip.name, reason, read) for reason in wave.reasons]
                for warning in wave.warnings:
                    warnings.warn(warning, stacklevel=2)
                if read:
                    row = {key: value for key, value in asdict(clip).items() if key in _SCHEMA.names}
                    row |= {"clip": 0, "end": clip.start + wave.count / SAMPLING_RATE, "shard": number, "offset": offset}
                    rows.append(row | {"samples": wave.count, "scale": wave.scale, "sum": wave.sum})
                    with wave.samples as samples:
                        samples.seek(0)
                        shutil.copyfileobj(samples, file, 2**20)
                    offset += wave.count
                shard.clips += 1
                step(shard.clips)
                if offset >= SHARD_SAMPLES:
                    break
            file.seek(0)
            file.write(_header(offset))

    write_atomic(samples_path, save)
    shard.table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    facts = json.dumps(shard.facts(fingerprint(VERSION, made_of)), ensure_ascii=False)
    table = shard.table.replace_schema_metadata({"w2s": facts})
    write_atomic(table_path, lambda path: pq.write_table(table, path))  # last: a shard with a table is complete
    return shard


def _header(samples: int) -> bytes:
    """The beginning of an .npy file of int16 [samples]; NumPy leaves room for the length to grow."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i2", "fortran_order": False, "shape": (samples,)})
    return header.getvalue()


def _map(path: Path, samples: int) -> np.ndarray:
    """Map an .npy file of int16 [samples] into memory.

    Raises:
        BankError: the file is missing, or holds something else.
    """
    with _opened(path, samples) as file:
        return np.memmap(file, "<i2", "r", file.tell(), (samples,)) if samples else np.zeros(0, np.int16)


@contextlib.contextmanager
def _opened(path: Path, samples: int) -> Iterator[IO[bytes]]:
    """Open an .npy file of int16 [samples] at its first sample."""
    header = _header(samples)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != len(header) + 2 * samples:
                raise BankError(f"{path} is damaged: {size} bytes, expected {len(header) + 2 * samples}")
            if file.read(len(header)) != header:
                raise BankError(f"{path} is damaged: not the header of int16 [{samples}]")
            yield file
    except OSError as error:
        raise BankError(f"{path} cannot be read: {error.strerror or error}") from error


def _sums(path: Path, lengths: Sequence[int]) -> list[str]:
    """The checksums of all clips of a shard. Reads the file: mapped pages would count as memory of the process."""
    sums = []
    with _opened(path, sum(lengths)) as file:
        for length in lengths:
            digest, left = hashlib.sha256(), 2 * length
            while left and (piece := file.read(min(left, 2**20))):
                digest.update(piece)
                left -= len(piece)
            sums.append(digest.hexdigest()[:16])
    return sums


def _sum(samples: np.ndarray) -> str:
    """Checksum of a clip's int16 samples: 16 hex digits of their SHA-256."""
    return hashlib.sha256(samples).hexdigest()[:16]


def _plan(clips: Sequence[Clip]) -> str:
    return fingerprint(VERSION, [_identity(clip) for clip in clips])


def _identity(clip: Clip) -> list:
    try:
        state = os.stat(clip.file)
        return [*map(_printable, asdict(clip).values()), state.st_size, state.st_mtime_ns]
    except OSError:
        return [*map(_printable, asdict(clip).values()), None]


def _printable(value):
    return os.fsencode(value).hex() if isinstance(value, str) else value


@dataclass
class _Decoded:
    """A clip's int16 samples in a file (None: it could not be read), with problems and warnings."""

    samples: IO[bytes] | None = None
    count: int = 0
    scale: float = 1.0
    sum: str = ""
    source: list = field(default_factory=list)  # what it was made of, as ``_identity`` has it
    reasons: list[str] = field(default_factory=list)
    warnings: list[Warning] = field(default_factory=list)


class _Stopped(Exception):
    """This clip is no longer needed."""


class _Decoder:
    """Decodes clips in threads, ahead of time.

    Attributes:
        samples: decoded so far.
    """

    def __init__(self, clips: Sequence[Clip], scratch: Path, workers: int) -> None:
        self._pool, self.samples = ThreadPoolExecutor(workers), 0
        self._clips, self._scratch, self._workers = clips, scratch, workers
        self._lock, self._next, self._decoded = threading.Lock(), -1, None

    def __enter__(self) -> _Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._pool.shutdown()

    def stop(self) -> None:
        """Discard what was decoded ahead."""
        if self._decoded is not None:
            self._decoded.close()
            self._decoded = None

    def start(self, first: int, step: Callable[[int], None]) -> Iterator[_Decoded]:
        """Decode clips from number ``first`` on; clips that were decoded ahead are used if they begin there.

        While the caller waits for a clip, ``step(n)`` is called twice a second; n clips were yielded since this call.
        """
        if self._next != first or self._decoded is None:
            self.stop()
            self._next, self._decoded = first, self._ahead(first)
        taken = 0

        def waited() -> None:
            step(taken)

        while True:
            self._waited = waited
            wave = next(self._decoded)
            self._next += 1
            taken += 1
            yield wave

    def _ahead(self, first: int) -> Iterator[_Decoded]:
        stop, waiting, upcoming = threading.Event(), deque(), iter(self._clips[first:])
        try:
            while True:
                while len(waiting) < 2 * self._workers and (clip := next(upcoming, None)) is not None:
                    waiting.append(self._pool.submit(self._decode, clip, stop))
                if not waiting:
                    return
                yield self._wait(waiting[0])
                waiting.popleft()
        finally:
            stop.set()
            for future in waiting:
                future.cancel()

    def _wait(self, future: Future) -> _Decoded:
        while True:
            try:
                return future.result(timeout=0.5)
            except TimeoutError:
                if future.done():  # it is the clip's own
                    raise
                self._waited()

    def _decode(self, clip: Clip, stop: threading.Event) -> _Decoded:
        out = _Decoded(source=_identity(clip))
        low = high = 0.0
        samples = tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=self._scratch)  # noqa: SIM115 (closed by the shard's writer)
        blocks = audio.blocks(clip.file, clip.start, clip.end)
        with audio.collected() as noticed:
            while True:
                try:
                    block = next(blocks, None)
                    if out.count > LONGEST:
                        raise BankError("longer than 37 hours; cut it into segments (start and end in a CSV)")
                except (W2SError, OSError) as error:
                    samples.close()
                    return _Decoded(source=out.source, reasons=[str(error)])
                if block is None:
                    break
                if stop.is_set():
                    samples.close()
                    raise _Stopped
                low, high = min(low, float(block.min())), max(high, float(block.max()))
                samples.write(block)
                out.count += len(block)
                with self._lock:
                    self.samples += len(block)
        reason = fault(clip, out.count, silent=low == high)
        if _identity(clip) != out.source:
            reason = "the file was changed while it was read; build again, when it is at rest"
        if reason:
            samples.close()
            return _Decoded(source=out.source, reasons=[reason])
        out.reasons = [f"read in part: {w}" for w in noticed if isinstance(w, audio.TruncatedAudioWarning)]
        out.warnings = noticed
        out.samples, out.scale = samples, _scale(low, high)
        digest, each = hashlib.sha256(), 2**18
        for at in range(0, out.count, each):  # float32 to int16 within one file, where writing stays behind reading
            samples.seek(4 * at)
            piece = _quantise(np.frombuffer(samples.read(4 * each), np.float32), out.scale)
            digest.update(piece)
            samples.seek(2 * at)
            samples.write(piece)
        samples.truncate(2 * out.count)
        out.sum = digest.hexdigest()[:16]
        return out


def _failures_csv(problems: list[_Problem]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([("file", "reason"), *((problem.name, problem.reason) for problem in problems)])
    return text.getvalue()


class Bank:
    """A bank on disk.

    Attributes:
        path, about: the directory, and bank.json.
        clips: the columns of clips.parquet as numpy arrays [clips] (strings as object arrays; missing ratings are NaN).
        scales: float32 [clips], the power of two that each clip is multiplied by in the int16 samples.
        starts: int64 [clips], where each clip begins on the global sample axis.
        fingerprint: identifies samples, splits and ratings.

    Raises:
        UsageError: there is no bank at that path.
        BankError: the bank is damaged; names the file.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.about = read_json(self.path / "bank.json", "bank")
        version = self.about.get("version")
        if self.about.get("format") != "w2s-bank" or version not in (1, VERSION):
            raise BankError(f"{self.path / 'bank.json'}: expected a w2s-bank of version {VERSION} or 1, got "
                            f"{self.about.get('format')} of version {version}; build the bank again")  # fmt: skip
        again = "run w2s bank build again"
        if version > 1 and fingerprint({k: v for k, v in self.about.items() if k != "sum"}) != self.about.get("sum"):
            raise BankError(f"{self.path / 'bank.json'} is damaged: not what was written; {again}")
        file = self.path / "clips.parquet"
        try:
            content = file.read_bytes()
            if version > 1 and fingerprint(content) != self.about["sums"][file.name]:
                raise BankError(f"{file} is damaged: its checksum is not that of bank.json; {again}")
            table = read_table(content)
        except (OSError, pa.ArrowException) as error:
            raise BankError(f"{file} is missing or damaged ({error}); {again}") from error
        self.clips = {name: table[name].to_numpy() for name in table.column_names}
        self.scales = self.clips["scale"] if version > 1 else np.ones(table.num_rows, np.float32)
        self.fingerprint: str = self.about["fingerprint"]
        self.samples: int = self.about["samples"]
        self.starts = np.concatenate([[0], np.cumsum(self.clips["samples"], dtype=np.int64)[:-1]])
        self._totals = np.bincount(self.clips["shard"], self.clips["samples"])  # float64 counts exactly up to 2⁵³
        self._shards: dict[int, np.ndarray] = {}
        self._unchecked = np.full(table.num_rows, version > 1)

    def __len__(self) -> int:
        return len(self.starts)

    def __reduce__(self) -> tuple:
        return Bank, (self.path,)  # another process maps the files itself; pickling a map would copy all samples

    def _shard(self, number: int) -> np.ndarray:
        """One shard's samples, memory-mapped int16 [T]."""
        if number not in self._shards:
            path = _files(self.path, number)[0]
            try:
                self._shards[number] = _map(path, int(self._totals[number]))
            except BankError as error:
                raise BankError(f"{error}; run w2s bank build again") from error
        return self._shards[number]

    def clip(self, clip: int) -> np.ndarray:
        """All samples of one clip as they are stored, int16 [T]: the waveform times ``scales[clip]``.

        Raises:
            BankError: the checksum is wrong; names the clip and the file.
        """
        number, offset = int(self.clips["shard"][clip]), int(self.clips["offset"][clip])
        samples = self._shard(number)[offset : offset + int(self.clips["samples"][clip])]
        if self._unchecked[clip]:
            if _sum(samples) != self.clips["sum"][clip]:
                raise BankError(
                    f"{_files(self.path, number)[0]} is damaged in clip {clip} ({self.clips['name'][clip]}): its checksum is "
                    "not that of clips.parquet; run w2s bank build again, which decodes this file's clips anew"
                )
            self._unchecked[clip] = False
        return samples

    def wave(self, clip: int, samples: int | None = None) -> np.ndarray:
        """The waveform of one clip, or its first ``samples``: float32 [T], full scale is 1.0."""
        return self.clip(clip)[:samples] / np.float32(audio.FULL_SCALE * self.scales[clip])

    def excerpts(self, split: str, count: int, seconds: float, seed: int = 0) -> list[np.ndarray]:
        """The beginnings of up to ``count`` random clips of a split, float32 [T ≤ seconds] each."""
        clips = np.flatnonzero(self.clips["split"] == split)
        chosen = np.sort(np.random.default_rng(seed).permutation(clips)[:count])
        return [self.wave(at, round(seconds * SAMPLING_RATE)) for at in chosen]

    def gather(self, clips: np.ndarray, offsets: np.ndarray, samples: int) -> np.ndarray:
        """Read excerpts of clips on the host, as they are stored: [B], [B] → int16 [B, samples].

        An excerpt that runs past its clip's end continues at its beginning. ``render.gather`` reads the same samples on the
        device.
        """
        out = np.empty((len(clips), samples), np.int16)
        for row, clip, offset in zip(out, clips, offsets, strict=True):
            wave = self.clip(int(clip))
            if offset + samples <= len(wave):
                row[:] = wave[offset : offset + samples]
            else:
                row[:] = np.take(wave, np.arange(offset, offset + samples), mode="wrap")
        return out
