"""Corpora that users already have, read into one plain list of clips.

``folder``, ``csv``, ``msp-podcast`` and ``iemocap``; each is a function of :data:`CORPORA`, whose keywords are the
corpus's options. Labels are scaled to 0..1. Reading is strict: one error lists everything that is wrong, by kind.
"""

from __future__ import annotations

import bisect
import contextlib
import csv
import dataclasses
import functools
import hashlib
import inspect
import io
import itertools
import math
import os
import re
import stat
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from w2s_jax import DIMENSIONS, SAMPLING_RATE
from w2s_jax.audio import printable
from w2s_jax.errors import UsageError, W2SError
from w2s_jax.files import fingerprint, open_regular

SPLITS = ("train", "validation", "test")

#: File names that :func:`folder` takes for audio: what libsndfile reads, what ffmpeg does, and headerless formats, which
#: nothing does: a file that cannot be decoded is reported as such, and not left out.
EXTENSIONS = (
    *(".wav", ".wave", ".bwf", ".rf64", ".w64", ".flac", ".mp1", ".mp2", ".mp3", ".mpga", ".oga", ".ogg", ".opus"),
    *(".aif", ".aifc", ".aiff", ".au", ".caf", ".nist", ".snd", ".sph", ".voc"),
    *(".m4a", ".m4b", ".m4r", ".mp4", ".m4v", ".mov", ".3ga", ".3gp", ".3g2", ".aac", ".adts", ".amr", ".awb", ".qcp"),
    *(".webm", ".weba", ".mka", ".mkv", ".ogv", ".ogx", ".spx", ".wma", ".wmv", ".asf", ".avi", ".flv", ".mpg", ".mpeg"),
    *(".ac3", ".eac3", ".dts", ".ape", ".wv", ".tta", ".tak", ".shn", ".mpc", ".ra", ".rm", ".dsf", ".dff"),
    *(".gsm", ".pcm", ".raw", ".vox"),
)

_SPLIT_NAMES = {
    **{name: name for name in SPLITS},
    **dict.fromkeys(("val", "valid", "dev", "development"), "validation"),
    "training": "train",
}


class CorpusError(W2SError):
    """The corpus does not have its format, or its splits share a speaker or a recording."""


class CorpusWarning(UserWarning):
    """The corpus was read, but something was left out or is probably a mistake."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One stretch of audio and what is known about it (None: not known).

    Attributes:
        file: a path that :mod:`w2s_jax.audio` opens.
        name: the path below the corpus root, with ``/``, for people: printable and valid UTF-8.
        start: in seconds.
        end: in seconds (None: to the end of the file).
        split: one of ``SPLITS``.
        speaker: who speaks; the same name is the same voice.
        group: clips that must stay in one split for another reason than their speaker (a folder, a recording).
        arousal: 0..1.
        dominance: 0..1.
        valence: 0..1.
    """

    file: str
    name: str
    start: float = 0.0
    end: float | None = None
    split: str | None = None
    speaker: str | None = None
    group: str | None = None
    arousal: float | None = None
    dominance: float | None = None
    valence: float | None = None


def read(corpus: str, source: str | os.PathLike, leaks: str = "error", **options: object) -> list[Clip]:
    """Read a corpus.

    Args:
        corpus: a key of ``CORPORA``.
        source: the corpus's directory, or the file for ``csv``.
        leaks: what to do with audio that the corpus has in two splits: ``"error"`` refuses it, ``"drop"`` leaves it out of
            training (:func:`drop_leaks`).
        options: keywords of the corpus's function.

    Returns:
        The clips, at least one, in an order that does not depend on the machine. No speaker and no recording is in two
        splits.

    Raises:
        UsageError: unknown corpus or option, or no such source.
        CorpusError: everything that is wrong with the content, by kind, with counts and the first places.
    """
    _choice("leaks", leaks, ("error", "drop"))
    if corpus not in CORPORA:
        raise UsageError(f"unknown corpus {corpus!r}; known: {', '.join(CORPORA)}")
    function = CORPORA[corpus]
    known = list(inspect.signature(function).parameters)[1:]
    if unknown := sorted(set(options) - set(known)):
        raise UsageError(f"corpus {corpus} has no option {', '.join(unknown)}; it has {', '.join(known) if known else 'none'}")
    clips = function(Path(source), **options)
    if leaks == "drop":
        clips = drop_leaks(clips)
    check_splits(clips)
    return clips


def folder(source: Path, split_by: str = "none") -> list[Clip]:
    """Every audio file below a directory, known by its extension, in the order of the names.

    Other files are counted in a :class:`CorpusWarning`. Hidden files and directories are skipped. Links are followed, but into
    each directory once and never upwards, so that loops end.

    Args:
        source: the directory.
        split_by: ``"folder"`` makes the first directory below ``source`` a group, which is never divided between
            splits; ``"none"`` leaves the clips independent.
    """
    _choice("split_by", split_by, ("none", "folder"))
    _check_directory(source, "a directory of audio files")
    clips, others = [], Counter()
    for relative in _walk(source):
        extension = os.path.splitext(relative)[1].lower()
        if extension not in EXTENSIONS:
            others[_short(printable(extension)) or "no extension"] += 1
            continue
        top, _, below = relative.replace(os.sep, "/").partition("/")
        group = printable(top) if split_by == "folder" and below else None
        clips.append(Clip(file=os.path.join(source, relative), name=_name(relative), group=group))
    if not clips:
        raise CorpusError(
            f"no audio in {printable(source)}: {others.total()} other files found, expected names that end in .wav, .flac, "
            f".mp3, .ogg, .opus, .m4a or one of {len(EXTENSIONS) - 6} other endings"
        )
    if others:
        kinds = sorted(others.items(), key=lambda kind: (-kind[1], kind[0]))
        listed = ", ".join(f"{kind} {count}" for kind, count in kinds[:8])
        listed += f", {len(kinds) - 8} other kinds" if len(kinds) > 8 else ""
        count = others.total()
        _warn(f"{printable(source)}: {count} other file{'s' if count > 1 else ''} ignored: {listed}")
    clips.sort(key=lambda clip: (clip.name, clip.file))
    return _checked(source, clips, [clip.name for clip in clips])


def _walk(source: Path) -> Iterator[str]:
    """Paths of the files below ``source``, relative to it."""

    def identity(path: str | Path) -> tuple[int, int]:
        status = os.stat(path)
        return status.st_dev, status.st_ino

    seen = {identity(parent) for parent in source.resolve().parents}  # a link to ".." would bring in all the neighbours
    todo = deque([""])
    while todo:
        relative = todo.pop()
        try:
            here = identity(os.path.join(source, relative))
            if here in seen:
                continue
            seen.add(here)
            with os.scandir(os.path.join(source, relative)) as scan:
                entries = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            raise CorpusError(f"cannot read {printable(error.filename or source)}: {error.strerror}") from error
        for entry in entries:
            path = os.path.join(relative, entry.name)
            if entry.is_dir() and entry.is_symlink():
                todo.appendleft(path)  # later: a directory should be found under its own name
            elif entry.is_dir():
                todo.append(path)
            else:
                yield path


def csv_file(source: Path) -> list[Clip]:
    """A CSV ``file,start,end,split,speaker,arousal,dominance,valence`` (UTF-8); only ``file`` is required.

    Columns come in any order; a blank cell is an unknown value, and an unknown column is left out with a warning. Files
    are relative to the CSV. ``start`` and ``end`` are seconds or audformat's Timedelta (``0 days 00:00:01.500``);
    ``split`` also takes dev, development, val, valid and training; labels are 0..1.
    """
    fields = ("file", "start", "end", "split", "speaker", *DIMENSIONS)
    report = _Report(source)
    rows, unknown = _table(source, report, required=("file",), optional=fields)
    if unknown:
        _warn(f"{printable(source)}: unknown columns left out: {', '.join(map(_short, unknown))}")
    clips, places = [], []
    for place, row in rows:
        wrong, values = [], {}
        if not row["file"].strip():
            wrong.append(("no file", ""))
        for field, text in row.items():
            if not text or field in ("file", "speaker"):
                continue
            if field == "split":
                values[field] = _SPLIT_NAMES.get(text.lower())
                if values[field] is None:
                    wrong.append((f"unknown split (expected {', '.join(SPLITS)})", text))
            elif field in ("start", "end"):
                number = _seconds(text)
                if number is None:
                    wrong.append(("not a time", f"{field} {text}"))
                elif not math.isnan(number):  # NaT is audformat's word for "to the end"
                    values[field] = number
            else:
                values[field] = _number(text)
                if values[field] is None:
                    wrong.append(("not a number", f"{field} {text}"))
        for kind, text in wrong:
            report.add(kind, place, text)
        if wrong:
            continue
        speaker = printable(row["speaker"]) if row.get("speaker") else None
        file = os.path.join(source.parent, row["file"])
        clips.append(Clip(file=file, name=_name(row["file"]), speaker=speaker, **values))
        places.append(place)
    return _checked(source, clips, places, report)


def msp_podcast(source: Path, test: str = "Test1") -> list[Clip]:
    """MSP-Podcast, any release: ``Labels/labels_consensus.csv`` and ``Audios/``. Labels 1..7 become ``(x - 1) / 6``.

    Args:
        source: the directory that holds ``Labels`` and ``Audios``.
        test: which of Test1, Test2 and Test3 is the test split; the clips of the other two are left out.
    """
    _choice("test", test, ("Test1", "Test2", "Test3"))
    _check_directory(source, "the MSP-Podcast directory with Labels/ and Audios/")
    names = ("labels_consensus.csv", "labels_concensus.csv")  # older releases have the second spelling
    table = next((path for name in names if (path := source / "Labels" / name).is_file()), None)
    if table is None:
        raise CorpusError(f"{printable(source)} is no MSP-Podcast: expected Labels/{names[0]} (or {names[1]})")
    columns = {"arousal": "EmoAct", "dominance": "EmoDom", "valence": "EmoVal"}  # by name: the file's order is A, V, D
    splits = {"Train": "train", "Development": "validation", "Validation": "validation", test: "test"}
    report = _Report(table)
    rows, _ = _table(table, report, required=("FileName", *columns.values(), "SpkrID", "Split_Set"))
    clips, places = [], []
    for place, row in rows:
        split = row["Split_Set"]
        if split not in splits:
            if split not in ("Test1", "Test2", "Test3"):
                report.add("unknown Split_Set (expected Train, Development, Test1, Test2, Test3)", place, split)
            continue
        if not row["FileName"]:
            report.add("no FileName", place)
            continue
        speaker = row["SpkrID"]
        clips.append(
            Clip(
                file=str(source / "Audios" / row["FileName"]),
                name=_name(f"Audios/{row['FileName']}"),
                split=splits[split],
                speaker=None if speaker in ("", "Unknown") else printable(speaker),
                **{field: _scaled(row[column], column, 7, report, place) for field, column in columns.items()},
            )
        )
        places.append(place)
    return _checked(table, clips, places, report)


# "[6.2901 - 8.2357]\tSes01F_impro01_F000\tneu\t[2.5000, 2.5000, 2.5000]": valence, activation, dominance. The header
# ("% [START_TIME - END_TIME] TURN_NAME ...") and the lines of single raters ("A-E3:\tval 2; act 4; dom  4;") do not match.
_TURN = re.compile(r"\[[\d.]+ - [\d.]+\]\t(\S+)\t\S+\t\[([^,\s]+), ([^,\s]+), ([^,\s]+)\]\s*")


def iemocap(source: Path, validation_session: int = 4, test_session: int = 5, out_of_range: str = "error") -> list[Clip]:
    """IEMOCAP: ``SessionN/dialog/EmoEvaluation`` and ``SessionN/sentences/wav``. Labels 1..5 become ``(x - 1) / 4``.

    A session has two speakers of its own (``Ses01F``, ``Ses01M``), so splits by session are disjoint in speakers.

    Args:
        source: the directory that holds ``Session1`` to ``Session5``.
        validation_session: this session is the validation split.
        test_session: this session is the test split; all others are the training split.
        out_of_range: some raters left 1..5, and so do some means: ``"error"`` lists these turns, ``"drop"`` leaves them
            out with a warning. They are never clipped.
    """
    _choice("out_of_range", out_of_range, ("error", "drop"))
    _check_directory(source, "the IEMOCAP directory with Session1 to Session5")
    try:
        held_out = {int(test_session): "test", int(validation_session): "validation"}
    except (TypeError, ValueError):
        held_out = {}
    if len(held_out) != 2 or not set(held_out) <= set(range(1, 6)):
        raise UsageError(
            "validation_session and test_session must be two different sessions of 1 to 5, "
            f"got {validation_session!r} and {test_session!r}"
        )
    report = _Report(source)
    clips, places, dropped = [], [], 0
    for session in range(1, 6):
        root = source / f"Session{session}"
        for dialog in sorted((root / "dialog" / "EmoEvaluation").glob("[!.]*.txt")):  # "._x.txt": left by a Mac
            with open_regular(dialog, "a table of turns") as file:
                lines = file.read().decode("utf-8", "replace").splitlines()
            for number, line in enumerate(lines, 1):
                place = f"{dialog.name}:{number}"
                if not re.match(r"\[\d", line):
                    continue
                match = _TURN.fullmatch(line)
                if not match:
                    report.add("not a turn ([START - END] TURN EMOTION [V, A, D], separated by tabs)", place, line)
                    continue
                turn, *vad = match.groups()
                numbers = [_number(text) for text in vad]
                if out_of_range == "drop" and any(x is not None and not 1 <= x <= 5 for x in numbers):
                    dropped += 1
                    continue
                valence, arousal, dominance = (_scaled(text, "value", 5, report, place) for text in vad)
                relative = os.path.join(root.name, "sentences", "wav", dialog.stem, turn + ".wav")
                clips.append(
                    Clip(
                        file=os.path.join(source, relative),
                        name=_name(relative),
                        split=held_out.get(session, "train"),
                        speaker=f"Ses{session:02d}{turn.rpartition('_')[2][:1]}",  # F or M of the turn's number
                        arousal=arousal,
                        dominance=dominance,
                        valence=valence,
                    )
                )
                places.append(place)
    if dropped:
        _warn(f"{printable(source)}: {dropped} turns with values outside 1..5 left out")
    if not clips and not report.found:
        raise CorpusError(f"no turns in {printable(source)}; expected SessionN/dialog/EmoEvaluation/*.txt with N = 1 to 5")
    return _checked(source, clips, places, report)


CORPORA: dict[str, Callable[..., list[Clip]]] = {
    "folder": folder,
    "csv": csv_file,
    "msp-podcast": msp_podcast,
    "iemocap": iemocap,
}


def assign_splits(
    clips: Sequence[Clip], fractions: tuple[float, float, float] = (0.7, 0.15, 0.15), seed: int = 0
) -> list[Clip]:
    """Give a split to each clip that has none, so that no speaker, group or recording is divided.

    Clips that share a speaker, a group or a file go together, also with those that have a split already; files of equal
    content are one file. The fractions count clips, over all of them, and are met as well as such whole units allow. No
    split stays empty as long as there are units for it; :class:`CorpusWarning` says when there are not. The result depends
    on names, fractions, seed and copies only, not on the order or the machine.

    Args:
        clips: in any order.
        fractions: of train, validation and test; they sum to 1.
        seed: another seed, other splits.

    Returns:
        The clips in the same order, each with a split.

    Raises:
        UsageError: the fractions are no fractions.
        CorpusError: a speaker, a group or a recording is in two splits already, or a clip belongs to clips of two splits.
    """
    if len(fractions) != 3 or not all(0 <= f <= 1 for f in fractions) or not math.isclose(sum(fractions), 1):
        raise UsageError(f"fractions of train, validation and test must be 0..1 and sum to 1, got {fractions}")
    check_splits(clips)
    recordings = _recordings(clips)
    _warn_of_copies(clips, recordings)
    units = _units(clips, recordings)
    taken = Counter()
    free = []
    chosen: dict[str, str] = {}
    for unit, members in units.items():
        given = {clip.split for clip in members if clip.split}
        if not given:
            free.append(unit)
            continue
        left = [clip.name for clip in members if not clip.split]
        if left and len(given) > 1:
            raise CorpusError(
                f"{left[0]} has no split, and its speaker, group or file is shared with clips of "
                f"{' and '.join(sorted(given))}; give it one of these"
            )
        chosen[unit] = min(given)
        taken.update(clip.split or chosen[unit] for clip in members)
    free.sort(key=lambda unit: hashlib.sha256(f"{seed}\0{unit}".encode()).digest())
    wanted = {split: fraction * len(clips) for split, fraction in zip(SPLITS, fractions, strict=True) if fraction}
    for i, unit in enumerate(free):
        empty = [split for split in wanted if not taken[split]]
        candidates = empty if len(empty) >= len(free) - i else wanted
        chosen[unit] = max(candidates, key=lambda split: wanted[split] - taken[split])
        taken[chosen[unit]] += len(units[unit])
    empty = [split for split in wanted if not taken[split]]
    if free and empty:
        _warn(
            f"{' and '.join(empty)} {'stays' if len(empty) == 1 else 'stay'} empty: {_undivided(units)}. Name the speakers or "
            "the splits (--corpus csv), point at a folder with more folders in it, or ask for it (--fractions 1,0,0)"
        )
    split_of = {clip: chosen[unit] for unit, members in units.items() for clip in members}
    return [clip if clip.split else dataclasses.replace(clip, split=split_of[clip]) for clip in clips]


def _undivided(units: dict[str, list[Clip]]) -> str:
    """Why clips cannot be divided: how many there are, and what those that go together share."""
    count, largest = sum(map(len, units.values())), max(units.values(), key=len)
    if count == len(units):
        return f"there {'is 1 clip' if count == 1 else f'are {count} clips'} in all"
    shared = {field: {getattr(clip, field) for clip in largest} for field in ("speaker", "group")}
    what = [
        f"the {field} {_short(str(*values))}" for field, values in shared.items() if len(values) == 1 and None not in values
    ]
    share = what[0] if what else "a recording, a speaker or a group with each other"
    return f"{len(largest)} of {count} clips share {share} and are not divided"


def _units(clips: Sequence[Clip], recordings: Sequence[str]) -> dict[str, list[Clip]]:
    """Clips that are connected by a shared speaker, group or file, under a name that the order of clips cannot change."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    for clip, recording in zip(clips, recordings, strict=True):
        # "recording" sorts behind "file", so that copies join units and never name one
        keys = [f"file {clip.name}", f"recording {recording}"]
        keys += [f"{field} {value}" for field in ("speaker", "group") if (value := getattr(clip, field))]
        first, *others = sorted({root(key) for key in keys})
        for other in others:  # the smallest name becomes the root
            parent[other] = first
    units = defaultdict(list)
    for clip in clips:
        units[root(f"file {clip.name}")].append(clip)
    return units


def check_splits(clips: Sequence[Clip]) -> None:
    """Refuse splits that share a speaker, a group or a recording; clips without a split do not count.

    Raises:
        CorpusError: names the speakers (or groups, or clips) and their splits.
    """
    for field in ("speaker", "group"):
        splits = defaultdict(set)
        for clip in clips:
            if clip.split and getattr(clip, field):
                splits[getattr(clip, field)].add(clip.split)
        shared = {name: sorted(found, key=SPLITS.index) for name, found in sorted(splits.items()) if len(found) > 1}
        if shared:
            some = "; ".join(f"{name}: {', '.join(found)}" for name, found in list(shared.items())[:5])
            more = f"; and {len(shared) - 5} more" if len(shared) > 5 else ""
            raise CorpusError(
                f"{len(shared)} {field}{'s are' if len(shared) > 1 else ' is'} in more than one split ({some}{more}); "
                f"move each {field} to one split, or leave the splits blank to have them assigned"
            )
    if leaks := find_leaks(clips):
        raise CorpusError(
            f"{_describe(leaks)}; move each recording to one split, leave the splits blank to have them assigned, or leave "
            "these clips out (--leaks drop)"
        )


def drop_leaks(clips: Sequence[Clip]) -> list[Clip]:
    """Leave out what :func:`find_leaks` finds, with a warning: test stays whole, and what it has is not trained on."""
    leaks = find_leaks(clips)
    if not leaks:
        return list(clips)
    _warn(f"{_describe(leaks)}; left out of {' and '.join(s for s in SPLITS if any(clip.split == s for clip, _ in leaks))}")
    dropped = {clip for clip, _ in leaks}
    return [clip for clip in clips if clip not in dropped]


def find_leaks(clips: Sequence[Clip]) -> list[tuple[Clip, Clip]]:
    """Clips whose audio is also in another split: segments that overlap, of one file or of files of equal content.

    Files are compared byte by byte (by their SHA-256, and only where sizes are equal). A copy that was encoded anew is not
    found. Segments that merely touch do not overlap.

    Args:
        clips: those without a split do not count.

    Returns:
        Pairs of such a clip and one that it shares audio with, in the order of the clips. The first is of the training
        split, or else of validation; without the first ones nothing is shared.
    """
    clips = [clip for clip in clips if clip.split]
    if len({clip.split for clip in clips}) < 2:
        return []
    of_recording = defaultdict(list)
    for clip, recording in zip(clips, _recordings(clips), strict=True):
        of_recording[recording].append(clip)
    found = {}
    for members in of_recording.values():
        kept: list[Clip] = []
        for split in reversed(SPLITS):
            own = [clip for clip in members if clip.split == split]
            overlapping = _overlap(kept)
            pairs = {clip: other for clip in own if (other := overlapping(clip))} if kept else {}
            found |= pairs
            kept += [clip for clip in own if clip not in pairs]
    return [(clip, found[clip]) for clip in clips if clip in found]


def check_decoded(clips: Sequence[Clip], digests: Sequence[str | None]) -> None:
    """Refuse splits that share decoded audio, whatever its files look like (as WAV and as FLAC, or with other tags).

    Args:
        clips: each with a split.
        digests: of each clip's samples; None: not known.

    Raises:
        CorpusError: names the clips.
    """
    first: dict[str, Clip] = {}
    pairs = []
    for clip, digest in zip(clips, digests, strict=True):
        if digest is not None and clip.split and first.setdefault(digest, clip).split != clip.split:
            pairs.append((clip, first[digest]))
    if pairs:
        raise CorpusError(
            f"{_describe(pairs, 'by their samples')}; move each recording to one split, or leave the copies out of the corpus"
        )


#: Segments overlap by more than this, in seconds: tables round their times.
_TOUCHING = 1e-3


def _overlap(clips: Sequence[Clip]) -> Callable[[Clip], Clip | None]:
    """A function that finds one of ``clips`` that a segment of the same recording overlaps."""
    clips = sorted(clips, key=lambda clip: clip.start)
    starts = [clip.start for clip in clips]
    # of all clips that begin before a segment ends, the one that ends last overlaps it, or none does
    last = list(itertools.accumulate(clips, lambda a, b: max(a, b, key=_end)))

    def find(clip: Clip) -> Clip | None:
        before = bisect.bisect_left(starts, _end(clip) - _TOUCHING)
        return last[before - 1] if before and _end(last[before - 1]) > clip.start + _TOUCHING else None

    return find


def _end(clip: Clip) -> float:
    return math.inf if clip.end is None else clip.end


def _first(found: Sequence[str]) -> str:
    """The first three, and the number of the others."""
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")


def _describe(leaks: Sequence[tuple[Clip, Clip]], how: str = "by the content of their files") -> str:
    """Leaks in words, with counts and the first places."""

    def place(clip: Clip) -> str:
        segment = clip.start or clip.end is not None
        return clip.name + (f" from {clip.start:g} s to {_end(clip):g} s" if segment else "") + f" ({clip.split})"

    def listed(pairs: Sequence[tuple[Clip, Clip]], between: str) -> str:
        return _first([f"{place(clip)} {between} {place(other)}" for clip, other in pairs])

    copies = [(clip, other) for clip, other in leaks if clip.name != other.name]
    segments = [(clip, other) for clip, other in leaks if clip.name == other.name]
    parts = []
    if copies:
        some = "clip is" if len(copies) == 1 else "clips are"
        parts.append(f"{len(copies)} {some} in another split as well, {how} ({listed(copies, 'is')})")
    if segments:
        some = "segment overlaps" if len(segments) == 1 else "segments overlap"
        parts.append(f"{len(segments)} {some} one of another split ({listed(segments, 'and')})")
    return ", and ".join(parts)


def _recordings(clips: Sequence[Clip]) -> list[str]:
    """What each clip is cut from: its file, or the content of its file where another file has the same."""
    paths = {os.path.normpath(clip.file): clip.file for clip in clips}
    sizes = defaultdict(list)
    for path, file in paths.items():
        with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL in the name
            status = os.stat(file)
            if stat.S_ISREG(status.st_mode) and status.st_size:
                sizes[status.st_size].append((path, status.st_mtime_ns))
    content = {}
    for size, files in sizes.items():
        for whole in (False, True):  # most files of equal size differ in their first or last bytes
            same = defaultdict(list)
            for path, changed in files if len(files) > 1 else ():
                with contextlib.suppress(OSError):
                    same[_digest(paths[path], size, changed, whole)].append((path, changed))
            same = {digest: members for digest, members in same.items() if len(members) > 1}
            files = [member for members in same.values() for member in members]
        content |= {path: digest for digest, members in same.items() for path, _ in members}
    return [content.get(path, path) for path in (os.path.normpath(clip.file) for clip in clips)]


@functools.lru_cache(2**18)
def _digest(file: str, size: int, changed: int, whole: bool) -> str:
    """Of a file as it was at the time ``changed``: of all of it, or of its ends."""
    if whole:
        return fingerprint(Path(file))
    with open(file, "rb") as opened:
        first = opened.read(4096)
        opened.seek(max(0, size - 4096))
        return fingerprint(first, opened.read(4096))


def _warn_of_copies(clips: Sequence[Clip], recordings: Sequence[str]) -> None:
    first: dict[str, Clip] = {}
    copies: dict[str, str] = {}
    for clip, recording in zip(clips, recordings, strict=True):
        original = first.setdefault(recording, clip)
        if os.path.normpath(clip.file) != os.path.normpath(original.file):
            copies[clip.file] = f"{clip.name} is {original.name}"
    if copies:
        some = "file has" if len(copies) == 1 else "files have"
        _warn(
            f"{len(copies)} {some} the content of another file ({_first(list(copies.values()))}); copies stay in one split, "
            "and count as often as they are there"
        )


#: By how many seconds a clip may end after its file does: durations in tables are rounded, and those of MP3 are estimates.
_BEYOND = 0.1


def fault(clip: Clip, samples: int, silent: bool) -> str | None:
    """Why a decoded clip cannot be used; None if it can.

    Args:
        clip: as the corpus describes it.
        samples: its decoded length, at 16 kHz.
        silent: not one sample differs from zero.
    """
    end = clip.start + samples / SAMPLING_RATE
    if clip.end is not None and clip.end > end + _BEYOND:
        milliseconds = 100 <= clip.end <= 1000 * (end + _BEYOND)
        slip = "times are in seconds; are these milliseconds?" if milliseconds else "no end: to the end"
        return f"the file ends at {end:.3g} s, but the clip is to end at {clip.end:g} s ({slip})"
    if silent:
        return "silent: every sample is zero, so there is nothing to learn from"
    return None


class _Report:
    """Everything that is wrong with a source, by kind, with the places where it was found."""

    def __init__(self, source: Path):
        self.source = source
        self.found: dict[str, list[str]] = {}

    def add(self, kind: str, place: str, text: str = "") -> None:
        self.found.setdefault(kind, []).append(f"{place}: {_short(text)}" if text else place)

    def finish(self) -> None:
        if self.found:
            kinds = [
                f"{len(places)} x {kind} ({'; '.join(places[:3])}{'; …' if len(places) > 3 else ''})"
                for kind, places in self.found.items()
            ]
            raise CorpusError(f"{printable(self.source)} has errors, correct these first: {'. '.join(kinds)}")


def _checked(source: Path, clips: list[Clip], places: list[str], report: _Report | None = None) -> list[Clip]:
    """The checks that all corpora share; ``places`` says where each clip comes from."""
    report = report or _Report(source)
    exists: dict[str, bool] = {}
    first_place: dict[tuple, str] = {}
    for clip, place in zip(clips, places, strict=True):
        for field in DIMENSIONS:
            value = getattr(clip, field)
            if value is not None and not 0 <= value <= 1:
                report.add("value outside 0..1", place, f"{field} {value:g}")
        if clip.start < 0:
            report.add("start < 0", place, f"{clip.start:g}")
        if clip.end is not None and not clip.end > clip.start:
            report.add("end <= start", place, f"{clip.start:g} to {clip.end:g}")
        if clip.file not in exists:
            exists[clip.file] = "\0" not in clip.file and os.path.exists(clip.file)
        if not exists[clip.file]:
            report.add("missing file", place, clip.file)
        key = (os.path.normpath(clip.file), clip.start, clip.end)
        if key in first_place:
            report.add("duplicate", place, f"as {first_place[key]}")
        first_place.setdefault(key, place)
    report.finish()
    if not clips:
        raise CorpusError(f"{printable(source)} has no clips")
    return clips


def _table(
    path: Path, report: _Report, required: Sequence[str], optional: Sequence[str] = ()
) -> tuple[list[tuple[str, dict[str, str]]], list[str]]:
    """Rows of a CSV as (``"line 2"``, {column: stripped text}) with the known columns only, and the unknown columns."""
    name = printable(path)
    rows = []
    try:
        # utf-8-sig drops a BOM; surrogateescape keeps file names that are not UTF-8 as the operating system has them
        with (
            open_regular(path, "a CSV file") as binary,
            io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
        ):
            if binary.peek(4)[:4] == b"PAR1":
                raise CorpusError(f"{name} is parquet; expected CSV (audformat writes it with storage_format='csv')")
            reader = csv.reader(file, strict=True)
            header = [cell.strip() for cell in next(reader, [])]
            if missing := [column for column in required if column not in header]:
                raise CorpusError(
                    f"{name} has no column {', '.join(missing)} in its first line; found: "
                    + (_short(", ".join(header), 200) or "nothing")
                    + ". Expected UTF-8 text separated by commas."
                )
            if twice := [column for column, n in Counter(header).items() if n > 1 and column]:
                raise CorpusError(f"{name} has a column twice: {', '.join(map(_short, twice))}")
            known = {*required, *optional}
            line = reader.line_num
            for cells in reader:
                place, line = f"line {line + 1}", reader.line_num
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) != len(header):
                    report.add(f"not {len(header)} cells as in the first line", place, f"{len(cells)} cells")
                    continue
                # File names may begin or end with a space; the rest may not.
                row = zip(header, cells, strict=True)
                rows.append((place, {c: t if c == "file" else t.strip() for c, t in row if c in known}))
    except csv.Error as error:
        raise CorpusError(f"{name} is not CSV: line {reader.line_num}: {error}") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"no such CSV file: {name}") from error
    except OSError as error:
        raise UsageError(f"cannot read {name} as CSV: {error.strerror}") from error
    return rows, [column for column in header if column not in known]


def _scaled(text: str, column: str, largest: int, report: _Report, place: str) -> float | None:
    """A rating of 1..largest on 0..1; None when blank or reported."""
    if not text:
        return None
    number = _number(text)
    if number is None or not 1 <= number <= largest:
        report.add(f"rating outside 1..{largest}", place, f"{column} {text}")
        return None
    return (number - 1) / (largest - 1)


def _number(text: str) -> float | None:
    """A finite decimal number; Python's float() also takes nan, inf and 1_0."""
    if not re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", text, re.ASCII):
        return None
    return number if math.isfinite(number := float(text)) else None


# pandas writes "0 days 00:00:01.500000", or "0 days" where a whole column is of whole days; Python "1 day, 1:00:00"
_TIMEDELTA = re.compile(r"(?:(\d+) days?)?(?:(?:^|,? )(\d+):(\d\d):(\d\d(?:\.\d+)?))?", re.ASCII)

#: No recording is longer than this, in seconds (31 years); a larger number is a slip, and overflows somewhere later.
LONGEST = 1e9


def _seconds(text: str) -> float | None:
    """Seconds from a number or a Timedelta; NaN for ``NaT``; None when it is neither, or above ``LONGEST``."""
    if text == "NaT":
        return math.nan
    seconds = _number(text)
    if seconds is None and text and (match := _TIMEDELTA.fullmatch(text)):
        days, hours, minutes, rest = (float(part or 0) for part in match.groups())  # float: int has no end
        seconds = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    return seconds if seconds is not None and seconds <= LONGEST else None


def _check_directory(source: Path, what: str) -> None:
    if not source.is_dir():
        found = "is not a directory" if source.exists() else "does not exist"
        way = " (--corpus csv reads a table)" if source.suffix.lower() in (".csv", ".tsv") else ""
        raise UsageError(f"{printable(source)} {found}; expected {what}{way}")


def _choice(option: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(f"{option} must be one of {', '.join(choices)}, got {value!r}")


def _name(relative: str) -> str:
    return printable(relative.replace(os.sep, "/"))


def _short(text: str, length: int = 80) -> str:
    text = printable(text)
    return text if len(text) <= length else text[: length // 2 - 1] + "…" + text[-length // 2 :]


def _warn(message: str) -> None:
    warnings.warn(message, CorpusWarning, stacklevel=3)
