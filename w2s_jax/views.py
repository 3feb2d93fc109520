"""Views: recipes for exact excerpts of audio, so that teacher and student get the same samples.

A view names a clip, the first sample, the length, the gain, and what is mixed in. ``draw`` makes a table of views;
``w2s_jax.render`` renders them as waveforms.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from w2s_jax import SAMPLING_RATE
from w2s_jax.bank import Bank, read_table
from w2s_jax.corpora import SPLITS
from w2s_jax.errors import MismatchError, UsageError, W2SError
from w2s_jax.files import fingerprint, write_atomic

#: Column → numpy type. ``partner`` is -1 where nothing is mixed in; ``offset`` counts samples from the clip's beginning.
COLUMNS = {
    "view": np.int64,
    "split": object,
    "samples": np.int32,
    "clip": np.int32,
    "offset": np.int32,
    "gain_db": np.float32,
    "partner": np.int32,
    "partner_offset": np.int32,
    "snr_db": np.float32,
}


#: The version of the samples that ``w2s_jax.render`` computes, raised whenever they change. Labels record it, so that a student
#: is never trained on other audio than its teacher labelled.
RENDERING = 1

#: Where a mixture's partner may come from.
PARTNERS = ("bank", "shard")


class Views:
    """A table of views.

    Attributes:
        columns: name → numpy array [views], as in ``COLUMNS``.
        about: how they were drawn, with the fingerprint of the bank that they belong to.
        fingerprint: identifies the table.
    """

    def __init__(self, columns: dict[str, np.ndarray], about: dict) -> None:
        self.columns = columns
        self.about = about
        numbers = [columns[name].tobytes() for name, kind in COLUMNS.items() if kind is not object]
        self.fingerprint = fingerprint(about, list(columns["split"]), *numbers)

    @classmethod
    def read(cls, path: str | os.PathLike) -> Views:
        """Read a table of views.

        Raises:
            UsageError: no such file, or not views.
            W2SError: the file is damaged, or of another version.
        """
        path = Path(path)
        if not path.is_file():
            found = "it is not a file" if path.exists() else "no such file"
            raise UsageError(f"no views at {path}: {found}; make them with w2s views draw BANK --out FILE")
        with open(path, "rb") as file:
            if file.read(4) != b"PAR1":
                raise UsageError(f"{path} is not parquet, so no table of views; make one with w2s views draw")
        try:
            table = read_table(path)
            about = json.loads((table.schema.metadata or {}).get(b"w2s", b"{}"))
            if not isinstance(about, dict) or about.get("format") != "w2s-views":
                raise UsageError(f"{path} is a parquet file, but not a table of views; make one with w2s views draw")
            if about.get("version") != 1:
                raise W2SError(f"{path} holds views of version {about.get('version')}; this w2s_jax reads version 1")
            stored = about.pop("fingerprint")
            columns = {name: table[name].to_numpy().astype(kind) for name, kind in COLUMNS.items() if name != "split"}
            splits = table["split"].combine_chunks().dictionary_encode()  # or every row would have a text of its own
            columns["split"] = splits.dictionary.to_numpy(zero_copy_only=False)[splits.indices.to_numpy()]
            views = cls(columns, about)
        except W2SError:
            raise
        except Exception as error:  # damaged bytes make pyarrow raise almost anything
            raise W2SError(f"{path} is damaged ({type(error).__name__}: {error}); draw the views again") from error
        if views.fingerprint != stored:
            raise W2SError(
                f"{path} is damaged or was changed after it was written (fingerprint {views.fingerprint}, expected {stored}); "
                "draw the views again"
            )
        return views

    def __len__(self) -> int:
        return len(self.columns["view"])

    def where(self, split: str) -> np.ndarray:
        """Row numbers of a split: int64 [n]."""
        return np.flatnonzero(self.columns["split"] == split)

    def check(self, bank: Bank) -> Views:
        """Refuse a bank that these views were not drawn from; returns the views.

        Raises:
            MismatchError: with both fingerprints.
        """
        if self.about["bank"] != bank.fingerprint:
            raise MismatchError(
                f"the views belong to bank {self.about['bank']}, but {bank.path} is bank {bank.fingerprint}; "
                "draw the views again (w2s views draw) or give the bank that they were drawn from"
            )
        return self

    def save(self, path: str | os.PathLike, force: bool = False) -> None:
        """Write the table as parquet, atomically. The same views that are there already are left as they are.

        Args:
            path: the file.
            force: replace other views; a file that is no table of views is never replaced.

        Raises:
            MismatchError: other views, or something else, are there.
        """
        path = Path(path)
        if path.exists():
            try:
                there = Views.read(path).fingerprint
                if there == self.fingerprint:
                    return
                found = f"{path} holds other views (fingerprint {there}, these are {self.fingerprint})"
            except UsageError as error:
                raise MismatchError(f"{error}. It is not replaced: choose another --out") from error
            except W2SError as error:
                found = str(error)
            if not force:
                raise MismatchError(f"{found}; choose another --out, or --force to replace it")
        table = pa.table({name: pa.array(self.columns[name]) for name in COLUMNS})
        table = table.replace_schema_metadata({"w2s": json.dumps({**self.about, "fingerprint": self.fingerprint})})
        write_atomic(path, lambda temporary: pq.write_table(table, temporary))


def batch_by_length(samples: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Group int [n] lengths into batches of equal length, the shortest first: indices int64 [≤ batch_size] of each batch."""
    for length in np.unique(samples):
        members = np.flatnonzero(samples == length)
        for at in range(0, len(members), batch_size):
            yield members[at : at + batch_size]


def draw(
    bank: Bank,
    *,
    per_clip: int = 4,
    eval_per_clip: int = 1,
    seconds: tuple[float, ...] = (2.0, 5.0),
    mix: float = 0.5,
    gain_db: tuple[float, float] = (-6.0, 6.0),
    snr_db: tuple[float, float] = (0.0, 20.0),
    min_seconds: float = 0.5,
    partners: str = "bank",
    seed: int = 0,
) -> Views:
    """Draw views of every clip.

    Training views are random: a length from ``seconds`` that fits into the clip, a crop, a gain and, for a part of them, a
    mixture with a random excerpt of another training clip. Validation and test views are clean and fixed: the longest
    length that fits, evenly spaced crops, gain 0. A clip that is shorter than the shortest length is repeated to fill it:
    nothing is padded with zeros.

    Args:
        bank: the clips.
        per_clip, eval_per_clip: views of each training clip, and of each validation or test clip.
        seconds: the lengths (buckets) in seconds.
        mix: share of the training views that are mixtures, 0..1.
        gain_db, snr_db: ranges, uniform in dB; the gain is applied to the finished mixture.
        min_seconds: clips that are shorter have no views.
        partners: "bank": a mixture's partner is any training clip; "shard": one of the 256 neighbours in the same file of the
            bank, so that devices that share a large bank need few clips of each other's.
        seed: of the random numbers.

    Raises:
        UsageError: an option out of range.
        W2SError: no clip is long enough.
    """
    lengths = np.array(sorted({round(second * SAMPLING_RATE) for second in seconds}), np.int32)
    if not len(lengths) or lengths[0] < 64:
        raise UsageError(f"view lengths must be at least 64 samples (0.004 s), got {seconds} seconds")
    if per_clip < 1 or eval_per_clip < 1 or not 0 <= mix <= 1:
        raise UsageError(f"expected per_clip ≥ 1, eval_per_clip ≥ 1, 0 ≤ mix ≤ 1; got {per_clip}, {eval_per_clip}, {mix}")
    if gain_db[0] > gain_db[1] or snr_db[0] > snr_db[1]:
        raise UsageError(f"a range goes from low to high; got gain {gain_db}, SNR {snr_db}")
    if partners not in PARTNERS:
        raise UsageError(f"partners is {partners!r}; expected {' or '.join(PARTNERS)}")
    rng = np.random.default_rng(seed)
    usable = bank.clips["samples"] >= min_seconds * SAMPLING_RATE
    parts = []
    for split in SPLITS:
        clips = np.flatnonzero((bank.clips["split"] == split) & usable)
        if len(clips) and split == "train":
            parts.append(_draw_training(rng, bank, clips, per_clip, lengths, mix, gain_db, snr_db, partners))
        elif len(clips):
            parts.append(_place_evenly(bank, clips, eval_per_clip, lengths, split))
    if not parts:
        raise W2SError(f"none of the {len(bank)} clips is as long as {min_seconds} s; see min_seconds")
    columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS if name != "view"}
    columns["view"] = np.arange(len(columns["clip"]))
    columns = {name: columns[name].astype(kind) for name, kind in COLUMNS.items()}
    about = {
        "format": "w2s-views",
        "version": 1,
        "bank": bank.fingerprint,
        "per_clip": per_clip,
        "eval_per_clip": eval_per_clip,
        "seconds": [float(second) for second in seconds],
        "mix": float(mix),
        "gain_db": [float(edge) for edge in gain_db],
        "snr_db": [float(edge) for edge in snr_db],
        "min_seconds": float(min_seconds),
        "seed": seed,
        "clips_too_short": int((~usable).sum()),
        **({"partners": partners} if partners != "bank" else {}),  # the fingerprints of older views stay the same
    }
    return Views(columns, about)


def _draw_training(rng, bank: Bank, clips: np.ndarray, copies: int, lengths, mix, gain_db, snr_db, partners) -> dict:
    """Columns of ``copies`` random views of each training clip."""
    available, candidates = bank.clips["samples"], clips
    clips = np.repeat(clips, copies)
    samples = lengths[rng.integers(0, _count_fitting(lengths, available[clips]))]
    offset = rng.integers(0, _count_offsets(samples, available[clips]))
    mixed = rng.random(len(clips)) < mix
    first, last = 0, len(candidates)
    if partners == "shard":
        shard, own = bank.clips["shard"][candidates], bank.clips["shard"][clips]
        first, last = np.searchsorted(shard, own), np.searchsorted(shard, own, side="right")
    partner = candidates[rng.integers(first, last, len(clips))]
    mixed &= partner != clips
    partner_offset = rng.integers(0, available[partner])
    gain = rng.uniform(*gain_db, len(clips))
    snr = rng.uniform(*snr_db, len(clips))
    return {
        "split": np.full(len(clips), "train", object),
        "samples": samples,
        "clip": clips,
        "offset": offset,
        "gain_db": gain,
        "partner": np.where(mixed, partner, -1),
        "partner_offset": np.where(mixed, partner_offset, 0),
        "snr_db": np.where(mixed, snr, 0),
    }


def _place_evenly(bank: Bank, clips: np.ndarray, copies: int, lengths: np.ndarray, split: str) -> dict:
    """Columns of ``copies`` clean views of each clip: the longest length that fits, at evenly spaced offsets."""
    available = bank.clips["samples"]
    number, clips = np.tile(np.arange(copies), len(clips)), np.repeat(clips, copies)
    samples = lengths[_count_fitting(lengths, available[clips]) - 1]
    zeros = np.zeros(len(clips))
    return {
        "split": np.full(len(clips), split, object),
        "samples": samples,
        "clip": clips,
        "offset": ((2 * number + 1) * (_count_offsets(samples, available[clips]) - 1)) // (2 * copies),
        "gain_db": zeros,
        "partner": zeros - 1,
        "partner_offset": zeros,
        "snr_db": zeros,
    }


def _count_fitting(lengths: np.ndarray, available: np.ndarray) -> np.ndarray:
    """How many of the ascending lengths fit into each clip; the shortest always counts, as shorter clips are repeated."""
    return np.maximum(np.searchsorted(lengths, available, side="right"), 1)


def _count_offsets(samples: np.ndarray, available: np.ndarray) -> np.ndarray:
    """The number of possible first samples: all from which the view fits, or all of a clip that is repeated."""
    return np.where(available >= samples, available - samples + 1, available)
