"""The bank: a corpus decoded once into int16 16 kHz mono shards that are memory-mapped, and a table of its clips.

``BANK/bank.json`` says what it is, ``BANK/clips.parquet`` has a row per clip, ``BANK/shards/NNNNN.npy`` hold the samples of
256 clips each, back to back, and ``BANK/failures.csv`` lists what could not be read. Clips have one global sample axis, int64,
which may pass 2³¹.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    from w2s_jax.artifacts import missing_extra

    raise missing_extra("pyarrow", "train") from error

from w2s_jax import DIMENSIONS, SAMPLING_RATE, audio
from w2s_jax.artifacts import W2SError, fingerprint, locked, read_json, write_atomic, write_json
from w2s_jax.corpora import SPLITS, Clip, check_splits, fault

SHARD_CLIPS = 256
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
        *((dimension, pa.float32()) for dimension in DIMENSIONS),
    ]
)


class BankError(W2SError):
    """The bank cannot be built or read."""


def to_int16(wave: np.ndarray) -> tuple[np.ndarray, float]:
    """float32 [T] → int16 [T] and the scale that it was multiplied by: 1, or less where the wave passes ±1 (never clipped)."""
    peak = float(np.abs(wave).max(initial=0.0))
    scale = 1.0 if peak <= 1.0 else 1.0 / peak
    return np.clip(np.round(wave * (scale * 32768.0)), -32768, 32767).astype(np.int16), scale


def build(
    clips: Sequence[Clip],
    out: str | os.PathLike,
    *,
    corpus: str = "folder",
    workers: int | None = None,
    max_failures: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Decode clips into a bank. Run again after a kill, it keeps the finished shards and does the rest.

    Args:
        clips: what to decode; every clip has a split, no speaker or group is in two.
        out: the bank's directory.
        corpus: where the clips come from, kept in bank.json.
        workers: decoding threads (libsndfile and soxr release the interpreter lock); default: one a core.
        max_failures: stop with an error once more clips than this cannot be read; default: never.
        progress: called with (clips done, clips in all).

    Returns:
        bank.json as a dict.

    Raises:
        BankError: no clips, none readable, too many failures, or a split missing or shared.
    """
    out = Path(out)
    if not clips:
        raise BankError("there are no clips to put into the bank")
    without = [clip.name for clip in clips if clip.split not in SPLITS]
    if without:
        raise BankError(f"{len(without)} clips have no split (first: {without[0]}); expected one of {', '.join(SPLITS)}")
    check_splits(clips)
    with locked(out), ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        (out / "bank.json").unlink(missing_ok=True)  # a bank that is being rebuilt is not a bank
        tables, failures, done = [], [], 0
        for shard in range(-(-len(clips) // SHARD_CLIPS)):
            part = clips[shard * SHARD_CLIPS : (shard + 1) * SHARD_CLIPS]
            table, failed = _shard(out, shard, part, pool, lambda n, done=done: progress and progress(done + n, len(clips)))
            tables.append(table)
            failures += failed
            done += len(part)
            if max_failures is not None and len(failures) > max_failures:
                name, reason = failures[0]
                raise BankError(
                    f"{len(failures)} clips cannot be read, {max_failures} are allowed; the first: {name}: {reason}"
                )
        for stale in (out / "shards").glob("*"):
            if int(stale.name[:5]) >= len(tables) or stale.suffix == ".tmp":
                stale.unlink()
        table = pa.concat_tables(tables)
        if not table.num_rows:
            raise BankError(f"none of {len(clips)} clips can be read; the first: {failures[0][0]}: {failures[0][1]}")
        table = table.set_column(0, _SCHEMA.field("clip"), pa.array(np.arange(table.num_rows, dtype=np.int32)))
        shards = [t.schema.metadata[b"samples_sha"].decode() for t in tables]
        write_atomic(out / "clips.parquet", lambda path: pq.write_table(table.replace_schema_metadata(None), path))
        write_atomic(out / "failures.csv", lambda path: path.write_text(_failures_csv(failures), encoding="utf-8"))
        about = {
            "format": "w2s-bank",
            "version": 1,
            "corpus": corpus,
            "sampling_rate": SAMPLING_RATE,
            "clips": table.num_rows,
            "failures": len(failures),
            "samples": int(np.sum(table["samples"].to_numpy(), dtype=np.int64)),
            "shards": len(shards),
            "fingerprint": fingerprint(table.drop(["shard", "offset"]).to_pydict(), shards),
        }
        write_json(out / "bank.json", about)
        return about


def _shard(out: Path, shard: int, clips: Sequence[Clip], pool: ThreadPoolExecutor, progress) -> tuple[pa.Table, list]:
    """One shard's samples, table and failures; taken from disk when it was built from exactly these files before."""
    table_path, samples_path = out / "shards" / f"{shard:05d}.parquet", out / "shards" / f"{shard:05d}.npy"
    plan = fingerprint([_identity(clip) for clip in clips])
    try:
        table = pq.read_table(table_path)
        kept = table.schema.metadata or {}
        total = int(np.sum(table["samples"].to_numpy(), dtype=np.int64))
        if kept.get(b"plan") == plan.encode() and np.load(samples_path, mmap_mode="r").shape == (total,):
            progress(len(clips))
            return table, [tuple(row) for row in csv.reader(io.StringIO(kept[b"failures"].decode()))]
    except (OSError, ValueError, pa.ArrowException):
        pass  # not there or damaged: build it
    rows, waves, failures, offset = [], [], [], 0
    for index, (clip, (wave, scale, reason)) in enumerate(zip(clips, pool.map(_decode, clips), strict=True)):
        if wave is None:
            failures.append((clip.name, reason))
        else:
            row = {key: value for key, value in asdict(clip).items() if key in _SCHEMA.names}
            end = clip.start + len(wave) / SAMPLING_RATE
            rows.append(row | {"clip": 0, "end": end, "shard": shard, "offset": offset, "samples": len(wave), "scale": scale})
            waves.append(wave)
            offset += len(wave)
        progress(index + 1)
    samples = np.concatenate(waves) if waves else np.zeros(0, np.int16)
    text = io.StringIO()
    csv.writer(text).writerows(failures)
    table = pa.Table.from_pylist(rows, schema=_SCHEMA).replace_schema_metadata(
        {"plan": plan, "samples_sha": fingerprint(samples.tobytes()), "failures": text.getvalue()}
    )

    def save(path: Path) -> None:
        with open(path, "wb") as file:  # np.save would add .npy to the temporary name
            np.save(file, samples)

    write_atomic(samples_path, save)
    write_atomic(table_path, lambda path: pq.write_table(table, path))  # last: its presence says that the shard is whole
    return table, failures


def _identity(clip: Clip) -> list:
    try:
        state = os.stat(clip.file)
        return [*map(_printable, asdict(clip).values()), state.st_size, state.st_mtime_ns]
    except OSError:
        return [*map(_printable, asdict(clip).values()), None]


def _printable(value):
    return os.fsencode(value).hex() if isinstance(value, str) else value


def _decode(clip: Clip) -> tuple[np.ndarray | None, float, str]:
    try:
        samples, scale = to_int16(audio.load(clip.file, clip.start, clip.end))
        reason = fault(clip, len(samples), silent=not samples.any())
        return (None, 0.0, reason) if reason else (samples, scale, "")
    except (W2SError, OSError) as error:
        return None, 0.0, str(error)


def _failures_csv(failures: list) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([("file", "reason"), *failures])
    return text.getvalue()


class Bank:
    """A bank on disk.

    Attributes:
        path, about: the directory, and bank.json.
        clips: the columns of clips.parquet as numpy arrays [clips] (strings as object arrays; missing ratings are NaN).
        starts: int64 [clips], where each clip begins on the global sample axis.
        fingerprint: identifies samples, splits and ratings.

    Raises:
        UsageError: there is no bank at that path.
        BankError: the bank is damaged; names the file.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.about = read_json(self.path / "bank.json", "bank")
        if self.about.get("format") != "w2s-bank" or self.about.get("version") != 1:
            raise BankError(f"{self.path / 'bank.json'}: expected a w2s-bank of version 1, got {self.about.get('format')} "
                            f"of version {self.about.get('version')}; build the bank again")  # fmt: skip
        try:
            table = pq.read_table(self.path / "clips.parquet")
        except (OSError, pa.ArrowException) as error:
            raise BankError(
                f"{self.path / 'clips.parquet'} is missing or damaged ({error}); run w2s bank build again"
            ) from error
        self.clips = {name: table[name].to_numpy() for name in table.column_names}
        self.fingerprint: str = self.about["fingerprint"]
        self.samples: int = self.about["samples"]
        self.starts = np.concatenate([[0], np.cumsum(self.clips["samples"], dtype=np.int64)[:-1]])
        self._totals = np.bincount(self.clips["shard"], self.clips["samples"])  # float64 counts exactly up to 2⁵³
        self._shards: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.starts)

    def __reduce__(self) -> tuple:
        return Bank, (self.path,)  # another process maps the files itself; a copy of a map would be all its samples

    def shard(self, number: int) -> np.ndarray:
        """One shard's samples, memory-mapped int16 [T]."""
        if number not in self._shards:
            path = self.path / "shards" / f"{number:05d}.npy"
            try:
                samples = np.load(path, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise BankError(f"{path} is missing or damaged ({error}); run w2s bank build again") from error
            expected = int(self._totals[number])
            if samples.dtype != np.int16 or samples.shape != (expected,):
                raise BankError(
                    f"{path} is damaged: expected int16 [{expected}], got {samples.dtype} {list(samples.shape)}; "
                    "delete it and run w2s bank build again"
                )
            self._shards[number] = samples
        return self._shards[number]

    def clip(self, clip: int) -> np.ndarray:
        """All samples of one clip, int16 [T]."""
        offset = int(self.clips["offset"][clip])
        return self.shard(int(self.clips["shard"][clip]))[offset : offset + int(self.clips["samples"][clip])]

    def excerpts(self, split: str, count: int, seconds: float, seed: int = 0) -> list[np.ndarray]:
        """Pieces of up to ``count`` random clips of a split, from each clip's beginning, float32 [T ≤ seconds] each."""
        clips = np.flatnonzero(self.clips["split"] == split)
        chosen = np.sort(np.random.default_rng(seed).permutation(clips)[:count])
        return [self.clip(at)[: round(seconds * SAMPLING_RATE)].astype(np.float32) / 32768 for at in chosen]

    def gather(self, clips: np.ndarray, offsets: np.ndarray, samples: int) -> np.ndarray:
        """Pieces of clips on the host: [B], [B] → int16 [B, samples]. A piece that runs past its clip's end goes on at its
        beginning; the same samples as ``render.gather`` takes on the device."""
        out = np.empty((len(clips), samples), np.int16)
        for row, clip, offset in zip(out, clips, offsets, strict=True):
            wave = self.clip(int(clip))
            if offset + samples <= len(wave):
                row[:] = wave[offset : offset + samples]
            else:
                row[:] = np.take(wave, np.arange(offset, offset + samples), mode="wrap")
        return out
