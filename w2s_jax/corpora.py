"""Corpora that users already have, read into one plain list of clips.

``folder``, ``csv``, ``msp-podcast`` and ``iemocap``; each is a function of :data:`CORPORA`, whose keywords are the
corpus's options. Labels are scaled to 0..1. Reading is strict: one error lists everything that is wrong, by kind.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import inspect
import math
import os
import re
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from w2s_jax import DIMENSIONS
from w2s_jax.artifacts import UsageError, W2SError
from w2s_jax.audio import printable

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
    """The corpus is not what its format says, or its splits share a speaker."""


class CorpusWarning(UserWarning):
    """The corpus was read, but something in it was left out."""


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


def read(corpus: str, source: str | os.PathLike, **options: object) -> list[Clip]:
    """Read a corpus.

    Args:
        corpus: a key of ``CORPORA``.
        source: the corpus's directory, or the file for ``csv``.
        options: keywords of the corpus's function.

    Returns:
        The clips, at least one, in an order that does not depend on the machine. No speaker is in two splits.

    Raises:
        UsageError: unknown corpus or option, or no such source.
        CorpusError: everything that is wrong with the content, by kind, with counts and the first places.
    """
    if corpus not in CORPORA:
        raise UsageError(f"unknown corpus {corpus!r}; known: {', '.join(CORPORA)}")
    function = CORPORA[corpus]
    known = list(inspect.signature(function).parameters)[1:]
    if unknown := sorted(set(options) - set(known)):
        raise UsageError(f"corpus {corpus} has no option {', '.join(unknown)}; it has {', '.join(known) if known else 'none'}")
    clips = function(Path(source), **options)
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
            f"no audio in {printable(source)}: {others.total()} other files found, expected names that end in "
            + " ".join(EXTENSIONS)
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
            lines = dialog.read_text(encoding="utf-8", errors="replace").splitlines()
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
    """Give a split to each clip that has none, so that no speaker, group or file is divided.

    Clips that share a speaker, a group or a file go together, also with those that have a split already. The fractions
    count clips, over all of them, and are met as well as such whole units allow. No split stays empty as long as there
    are units for it. The result depends on names, fractions and seed only, not on the order or the machine.

    Args:
        clips: in any order.
        fractions: of train, validation and test; they sum to 1.
        seed: another seed, other splits.

    Returns:
        The clips in the same order, each with a split.

    Raises:
        UsageError: the fractions are no fractions.
        CorpusError: a speaker or a group is in two splits already, or a clip belongs to clips of two splits.
    """
    if len(fractions) != 3 or not all(0 <= f <= 1 for f in fractions) or not math.isclose(sum(fractions), 1):
        raise UsageError(f"fractions of train, validation and test must be 0..1 and sum to 1, got {fractions}")
    check_splits(clips)
    units = _units(clips)
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
    split_of = {clip: chosen[unit] for unit, members in units.items() for clip in members}
    return [clip if clip.split else dataclasses.replace(clip, split=split_of[clip]) for clip in clips]


def _units(clips: Sequence[Clip]) -> dict[str, list[Clip]]:
    """Clips that are connected by a shared speaker, group or file, under a name that the order of clips cannot change."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    for clip in clips:
        keys = [f"file {clip.name}"]
        keys += [f"{field} {value}" for field in ("speaker", "group") if (value := getattr(clip, field))]
        first, *others = sorted({root(key) for key in keys})
        for other in others:  # the smallest name becomes the root
            parent[other] = first
    units = defaultdict(list)
    for clip in clips:
        units[root(f"file {clip.name}")].append(clip)
    return units


def check_splits(clips: Sequence[Clip]) -> None:
    """Refuse splits that share a speaker or a group; clips without a split do not count.

    Raises:
        CorpusError: names the speakers (or groups) and their splits.
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
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
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
    except FileNotFoundError as error:
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
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text, re.ASCII):
        return None
    return number if math.isfinite(number := float(text)) else None


_TIMEDELTA = re.compile(r"(?:(\d+) days?,? )?(\d+):(\d\d):(\d\d(?:\.\d+)?)", re.ASCII)


def _seconds(text: str) -> float | None:
    """Seconds from a number or a Timedelta; NaN for ``NaT``; None when it is neither."""
    if text == "NaT":
        return math.nan
    if match := _TIMEDELTA.fullmatch(text):
        days, hours, minutes, seconds = match.groups()
        return ((int(days or 0) * 24 + int(hours)) * 60 + int(minutes)) * 60 + float(seconds)
    return _number(text)


def _check_directory(source: Path, what: str) -> None:
    if not source.is_dir():
        found = "is not a directory" if source.exists() else "does not exist"
        raise UsageError(f"{printable(source)} {found}; expected {what}")


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
