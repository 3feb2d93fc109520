"""The command line. It only reads options, shows progress and prints results; the work is in the library.

Results go to stdout, logs and progress to stderr. Exit codes: 0 done, 1 the work failed, 2 wrong usage, 130 and 143 stopped
by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import dataclasses
import importlib.util
import inspect
import io
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperGroup

from w2s_jax import SAMPLING_RATE, __version__
from w2s_jax.errors import UsageError, W2SError, missing_extra
from w2s_jax.kinds import FILES

HELP = {"help_option_names": ["-h", "--help"]}

#: The order of the commands in the help: that of the chain.
CHAIN = ("quickstart", "bank", "views", "teacher", "label", "train", "eval", "export", "predict", "bench")


class _Chain(TyperGroup):
    """Lists its commands in the order of the chain."""

    def list_commands(self, ctx) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: CHAIN.index(name) if name in CHAIN else len(CHAIN))


app = typer.Typer(
    name="w2s",
    cls=_Chain,
    help="Speech emotion on tiny hardware: distil a large teacher into a 72K-parameter network, run it anywhere.",
    no_args_is_help=True,
    add_completion=False,
    context_settings=HELP,
    rich_markup_mode="rich",
)
bank_app = typer.Typer(help="Decode a corpus once into a bank of 16 kHz samples.", no_args_is_help=True, context_settings=HELP)
views_app = typer.Typer(help="Draw views: recipes for exact pieces of audio.", no_args_is_help=True, context_settings=HELP)
teacher_app = typer.Typer(help="Look at a teacher before it labels.", no_args_is_help=True, context_settings=HELP)
app.add_typer(teacher_app, name="teacher")
app.add_typer(bank_app, name="bank")
app.add_typer(views_app, name="views")

# no markup: a path may have brackets in it
out, err = Console(soft_wrap=True, highlight=False, markup=False), Console(stderr=True, highlight=False, markup=False)

#: The base of all usage errors; typer has its own copy of click since some release and does not export this class.
ClickError = typer.BadParameter.__base__.__base__


def _finite(value: float | None) -> float | None:
    """A callback of options: infinity and NaN pass every range."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"expected a number, got {value}")
    return value


Json = Annotated[bool, typer.Option("--json", help="End stdout with one line of JSON.")]


class Corpus(StrEnum):
    folder = "folder"
    csv = "csv"
    msp_podcast = "msp-podcast"
    iemocap = "iemocap"


class SplitBy(StrEnum):
    none = "none"
    folder = "folder"


class Leaks(StrEnum):
    error = "error"
    drop = "drop"


class Split(StrEnum):
    train = "train"
    validation = "validation"
    test = "test"


class Format(StrEnum):
    table = "table"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Normalisation(StrEnum):
    official = "official"
    paper = "paper"


class Parallel(StrEnum):
    jit = "jit"
    pmap = "pmap"


class Partners(StrEnum):
    bank = "bank"
    shard = "shard"


class Placement(StrEnum):
    auto = "auto"
    device = "device"
    host = "host"


Kind = StrEnum("Kind", {kind: kind for kind in FILES})
Kinds = StrEnum("Kinds", {kind: kind for kind in (*FILES, "all")})


class Bits(StrEnum):
    seven = "7"
    eight = "8"


# options of every command that loads a teacher
Dimensions = Annotated[str | None, typer.Option("--dimensions", help="Names of an onnx: teacher's outputs, commas between.")]
Output = Annotated[
    str | None,
    typer.Option("--output", metavar="NAME", help="Of an onnx: teacher with several, the one to take.", show_default="logits"),
]
CheckpointDir = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint-dir",
        help="Where the teacher's files lie; for paper, with folders wav2vec2 and wavlm.",
        show_default="the Hugging Face hub",
    ),
]
Dtyped = Annotated[
    Dtype | None, typer.Option("--dtype", help="What paper, wavlm and wav2vec2 compute in.", show_default="float32")
]
Normalised = Annotated[
    Normalisation | None,
    typer.Option("--normalisation", help="Of the waveform for WavLM.", show_default="paper for paper, official for wavlm"),
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Of the checkpoint; named so, it need not give the published golden value.")
]
Distributed = Annotated[
    bool, typer.Option("--distributed", help="Join the other hosts of a TPU slice or a Slurm job through jax.distributed.")
]
Coordinator = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Join through this host, with --processes and --process.")
]
Processes = Annotated[int | None, typer.Option(min=1, help="How many processes there are.")]
Process = Annotated[int | None, typer.Option(min=0, help="Which of them this one is, from 0.")]


def _teacher(name: str, checkpoint_dir, dimensions: str | None, dtype, normalisation, revision, output: str | None = None):
    """Load a teacher from the options of a command."""
    err.print(f"loading teacher {name}")
    return heavy("teachers", "train").load(
        name,
        checkpoint_dir,
        tuple(dimensions.split(",")) if dimensions else None,
        dtype=dtype and dtype.value,
        normalisation=normalisation and normalisation.value,
        revision=revision,
        output=output,
    )


def finish(result: dict, as_json: bool) -> None:
    """Print the machine-readable last line, if asked for."""
    if as_json:
        print(_json(result), flush=True)


def _json(value: object, **layout: object) -> str:
    """JSON that stays valid whatever stdout can hold: in ASCII unless it is UTF-8, and if a file name has stray bytes."""
    text = json.dumps(value, ensure_ascii=False, **layout)
    utf8 = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
    return text if utf8 and not any("\ud800" <= character <= "\udfff" for character in text) else json.dumps(value, **layout)


@contextlib.contextmanager
def shown(what: str, unit: str, brief: bool = False) -> Iterator[Any]:
    """Progress on stderr: a live bar on a terminal, a line every ten seconds elsewhere.

    Yields ``report(done, total, **figures)``. With ``brief`` nothing is left of the bar, and work of less than ten seconds
    has no line.
    """
    if err.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        # rich would send what is printed meanwhile to stderr, results that are piped into a file included
        piped = not out.is_terminal
        with Progress(*columns, console=err, transient=brief, redirect_stdout=not piped) as bar:
            task, kept = bar.add_task(what, total=None, figures=""), {}

            def report(done: int, total: int, **figures: float) -> None:
                kept.update(figures)
                bar.update(task, completed=done, total=total, figures=_figures(kept))

            yield report
        return
    began, first, kept = time.monotonic(), [None], {}
    last = [began if brief else 0.0, None, {}]

    def report(done: int, total: int, **figures: float) -> None:
        kept.update(figures)
        now = time.monotonic()
        if first[0] is None:
            first[0] = (done, now)
        soon = now - last[0] < 10 and (done < total or (brief and last[1] is None))
        if soon or (done, kept) == tuple(last[1:]):
            return
        last[:] = now, done, dict(kept)
        rate = (done - first[0][0]) / max(now - first[0][1], 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if done < total and rate > 0 else ""
        note = _figures(kept)
        print(
            f"{what}: {done}/{total} {unit}, {note + ', ' if note else ''}{now - began:.0f} s{left}",
            file=sys.stderr,
            flush=True,
        )

    yield report


def _figures(figures: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in figures.items())


def heavy(module: str, extra: str):
    """Import one of our modules whose dependencies come with an extra."""
    try:
        return importlib.import_module(f"w2s_jax.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("w2s_jax"):
            raise
        raise missing_extra(error.name or module, extra) from error
    except UsageError as error:
        if isinstance(
            error.__cause__, ModuleNotFoundError
        ):  # the module names its own extra; the command may need a larger one
            raise missing_extra(error.__cause__.name or module, extra) from error
        raise


def _numbers(text: str, name: str, count: int | None = None, most: float = 86400) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or (count is not None and len(values) != count):
        raise UsageError(f"{name} takes {count or 'some'} numbers with commas between them, got {text!r}")
    if not all(-most <= value <= most for value in values):
        raise UsageError(f"{name} takes numbers from {-most:g} to {most:g}, got {text!r}")
    return values


@bank_app.command("build")
def bank_build(
    sources: Annotated[
        list[Path], typer.Argument(metavar="SOURCE...", help="Folders of audio, a CSV file, or a corpus's root.")
    ],
    into: Annotated[Path, typer.Option("--out", help="The bank's directory.")],
    corpus: Annotated[Corpus, typer.Option(help="What the sources are.")] = Corpus.folder,
    split_by: Annotated[SplitBy, typer.Option(help="folder: the first folder below SOURCE is never divided.")] = SplitBy.none,
    fractions: Annotated[
        str, typer.Option(help="Train, validation, test; for clips that the corpus gives no split.")
    ] = "0.7,0.15,0.15",
    seed: Annotated[int, typer.Option(help="Of the splits.")] = 0,
    leaks: Annotated[
        Leaks, typer.Option(help="Audio that the corpus has in two splits: refuse it, or leave it out of training.")
    ] = Leaks.error,
    force: Annotated[bool, typer.Option("--force", help="Build over a bank of other sources or options.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Decoding threads.", show_default="one a core")] = None,
    max_failures: Annotated[
        int | None, typer.Option(min=0, help="Stop when more files are unreadable.", show_default="never")
    ] = None,
    as_json: Json = False,
) -> None:
    """Decode SOURCE... into a bank: int16 16 kHz mono shards and clips.parquet.

    Run again with the same sources and options, it checks what is there and does only what is missing, damaged or changed.
    Clips that are of no use (unreadable, silent, or with an end
    that is beyond their file's) are listed in failures.csv and left out; the exit code is then 1. No speaker is ever in two
    splits, and no recording: copies of a file, and segments of one file, stay together.
    """
    audio, corpora, bank = heavy("audio", "train"), heavy("corpora", "train"), heavy("bank", "train")
    if split_by is not SplitBy.none and corpus is not Corpus.folder:
        raise UsageError(f"--split-by is for --corpus folder; {corpus.value} has its own splits and speakers")
    options = {"split_by": split_by.value} if corpus is Corpus.folder else {}
    clips = []
    for source in sources:
        found = corpora.read(corpus.value, source, leaks.value, **options)
        if len(sources) > 1:  # two sources may have files of one name
            found = [dataclasses.replace(clip, name=f"{source.resolve().name}/{clip.name}") for clip in found]
        clips += found
    if leaks is Leaks.drop and len(sources) > 1:
        clips = corpora.drop_leaks(clips)
    shares = _numbers(fractions, "--fractions", 3)
    clips = corpora.assign_splits(clips, shares, seed)
    origin = {
        "corpus": corpus.value,
        "sources": [audio.printable(os.path.abspath(source)) for source in sources],
        "split_by": split_by.value,
        "fractions": list(shares),
        "seed": seed,
    }
    with shown("decode", "clips") as report:
        about = bank.build(
            clips, into, corpus=corpus.value, origin=origin, force=force, workers=workers, max_failures=max_failures,
            progress=report,
        )  # fmt: skip
    minutes = about["samples"] / SAMPLING_RATE / 60
    splits = {name: int((bank.Bank(into).clips["split"] == name).sum()) for name in corpora.SPLITS}
    out.print(f"{into}: {about['clips']} clips, {minutes:.1f} minutes; " + ", ".join(f"{n} {s}" for s, n in splits.items()))
    if about["read_in_part"]:
        err.print(
            f"w2s: warning: {about['read_in_part']} clips could be read in part only; they are in the bank, and listed in "
            f"{into / 'failures.csv'}"
        )
    finish({"bank": str(into), **about, "minutes": round(minutes, 2), "splits": splits}, as_json)
    if about["failures"]:
        raise W2SError(f"{about['failures']} of {len(clips)} clips cannot be used; they are listed in {into / 'failures.csv'}")


@views_app.command("draw")
def views_draw(
    bank_path: Annotated[Path, typer.Argument(metavar="BANK")],
    into: Annotated[Path, typer.Option("--out", help="The parquet file to write.")],
    per_clip: Annotated[int, typer.Option(min=1, help="Views of each training clip.")] = 4,
    eval_per_clip: Annotated[int, typer.Option(min=1, help="Views of each validation and test clip; clean and fixed.")] = 1,
    seconds: Annotated[
        str, typer.Option(help="Lengths of the views: of a clip, those that fit into it; repeated if it is shorter than all.")
    ] = "2,5",
    mix: Annotated[
        float, typer.Option(min=0, max=1, callback=_finite, help="Share of training views that are mixtures of two clips.")
    ] = 0.5,
    gain_db: Annotated[str, typer.Option(help="Range of the gain of training views.")] = "-6,6",
    snr_db: Annotated[str, typer.Option(help="Range of the first clip's level over the second's in a mixture.")] = "0,20",
    min_seconds: Annotated[float, typer.Option(min=0, callback=_finite, help="Shorter clips have no views.")] = 0.5,
    partners: Annotated[
        Partners,
        typer.Option(help="Where the second clip of a mixture is from; shard: nearby, for large banks on many devices."),
    ] = Partners.bank,
    seed: Annotated[int, typer.Option(min=0, help="Of the random numbers.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace other views.")] = False,
    as_json: Json = False,
) -> None:
    """Draw views of every clip of BANK into a parquet table."""
    bank, views = heavy("bank", "train"), heavy("views", "train")
    drawn = views.draw(
        bank.Bank(bank_path),
        per_clip=per_clip,
        eval_per_clip=eval_per_clip,
        seconds=_numbers(seconds, "--seconds"),
        mix=mix,
        gain_db=_numbers(gain_db, "--gain-db", 2, 200),
        snr_db=_numbers(snr_db, "--snr-db", 2, 200),
        min_seconds=min_seconds,
        partners=partners.value,
        seed=seed,
    )
    drawn.save(into, force=force)
    counts = {name.value: len(drawn.where(name.value)) for name in Split}
    mixed = int((drawn.columns["partner"] >= 0).sum())
    lengths = {f"{s:g}": int((drawn.columns["samples"] == round(s * SAMPLING_RATE)).sum()) for s in drawn.about["seconds"]}
    short = drawn.about["clips_too_short"]
    out.print(
        f"{into}: {len(drawn)} views ({', '.join(f'{n} {s}' for s, n in counts.items())}), "
        f"{', '.join(f'{n} of {s} s' for s, n in lengths.items())}, {mixed} of them mixtures"
        + (f"; {short} clips are shorter than {min_seconds} s and have none" if short else "")
    )
    result = {"views": str(into), "count": len(drawn), **counts, "seconds": lengths, "mixtures": mixed}
    finish(result | {"clips_too_short": short}, as_json)


@app.command()
def label(
    bank_path: Annotated[Path, typer.Argument(metavar="BANK")],
    views_path: Annotated[Path, typer.Argument(metavar="VIEWS")],
    teacher: Annotated[str, typer.Option(metavar="NAME", help="paper | wavlm | wav2vec2 | acoustic | dnsmos | onnx:FILE")],
    into: Annotated[Path, typer.Option("--out", help="The labels' directory.")],
    dimensions: Dimensions = None,
    output: Output = None,
    checkpoint_dir: CheckpointDir = None,
    dtype: Dtyped = None,
    normalisation: Normalised = None,
    revision: Revision = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Views of one length that each device hears at once; a power of two wastes nothing.")
    ] = 16,
    distributed: Distributed = False,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process: Process = None,
    force: Annotated[bool, typer.Option("--force", help="Replace labels of another teacher or other views.")] = False,
    as_json: Json = False,
) -> None:
    """Let a teacher label every view. Run again after an interruption, it goes on where it was.

    Started several times with the same --out, on one machine or on several that share a file system, the processes share the
    work shard by shard, without further options. --distributed is for machines whose JAX must know all hosts (TPU slices).
    """
    bank, views, work = (heavy(name, "train") for name in ("bank", "views", "label"))
    _join(distributed, coordinator, processes, process)
    the_bank, the_views = bank.Bank(bank_path), views.read(views_path)
    the_teacher = _teacher(teacher, checkpoint_dir, dimensions, dtype, normalisation, revision, output)
    before, began = None, time.perf_counter()
    with shown("label", "views") as report:

        def progress(done: int, total: int, rate: float) -> None:
            nonlocal before
            if before is None:  # first of all it tells what is there already
                before = done
            report(done, total, views_per_second=rate)

        about = work.label(the_bank, the_views, the_teacher, into, batch_size=batch_size, force=force, progress=progress)
    seconds = time.perf_counter() - began
    earlier = f", {'all' if before == about['count'] else before} of them earlier" if before else ""
    out.print(f"{into}: {about['count']} views labelled by {the_teacher.name} ({', '.join(the_teacher.dimensions)}){earlier}")
    out.print(f"  licence that a student inherits: {the_teacher.licence}")
    if the_teacher.stand_in:
        out.print("  this teacher is a stand-in: its values only imitate arousal, dominance and valence", style="yellow")
    finish({"labels": str(into), **about, "seconds": round(seconds, 1)}, as_json)


def _join(distributed: bool, coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Make this process one of several for JAX, if asked to."""
    explicit = (coordinator, processes, process)
    if any(value is not None for value in explicit):
        if None in explicit:
            raise UsageError("--coordinator, --processes and --process go together")
        if process >= processes:
            raise UsageError(f"--process counts from 0: with --processes {processes} it is at most {processes - 1}")
    elif not distributed:
        return
    heavy("parallel", "train").join(*explicit)


@teacher_app.command("check")
def teacher_check(
    teacher: Annotated[str, typer.Argument(metavar="NAME", help="paper | wavlm | wav2vec2 | acoustic | dnsmos | onnx:FILE")],
    dimensions: Dimensions = None,
    output: Output = None,
    checkpoint_dir: CheckpointDir = None,
    dtype: Dtyped = None,
    normalisation: Normalised = None,
    revision: Revision = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Views that each device hears at once.")] = 4,
    seconds: Annotated[float, typer.Option(min=0.05, max=3600, callback=_finite, help="Length of a view.")] = 5.0,
    bank_path: Annotated[
        Path | None, typer.Option("--bank", help="Compare --dtype bfloat16 with float32 on 32 clips of this bank.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Load a teacher: its parameters, licence, golden check, and how fast it labels on this machine."""
    teachers = heavy("teachers", "train")
    if bank_path is not None and dtype is not Dtype.bfloat16:
        raise UsageError("--bank goes with --dtype bfloat16: it shows what that changes in the labels")
    the_bank = heavy("bank", "train").Bank(bank_path) if bank_path else None
    the_teacher = _teacher(teacher, checkpoint_dir, dimensions, dtype, normalisation, revision, output)
    result = teachers.check(the_teacher, batch_size, seconds)
    if the_bank is not None:
        exact = _teacher(teacher, checkpoint_dir, dimensions, Dtype.float32, normalisation, revision, output)
        result["bfloat16"] = teachers.compare(the_teacher, exact, the_bank.excerpts("train", 32, seconds))
    table = Table(title=f"teacher {the_teacher.name}", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("dimensions", ", ".join(the_teacher.dimensions))
    table.add_row("licence", the_teacher.licence)
    members = result.get("members", [result])
    for member in members:
        for key in ("checkpoint", "revision", "dtype", "normalisation"):
            if key in member:
                table.add_row(f"{member['name']} {key}" if len(members) > 1 else key, str(member[key] or "not known"))
    if result["parameters"]:
        table.add_row("parameters", f"{result['parameters']:,}")
    for name, difference in result["golden_difference"].items():
        table.add_row(f"golden value of {name}", f"differs by {difference:.2g}")
    table.add_row("devices", str(result["devices"]))
    rate = f"{result['views_per_second']:.3g} views of {seconds:g} s per second"
    table.add_row("speed", f"{rate}, {batch_size} at once on each device")
    table.add_row("an hour of audio", f"{result['seconds_per_hour']:,.0f} s")
    if "bfloat16" in result:
        effect = result["bfloat16"]
        scores = ", ".join(f"{name} {value:.4f}" for name, value in effect["ccc"].items())
        largest = f"largest difference {effect['largest_difference']:.2g}"
        table.add_row("bfloat16 against float32", f"CCC {scores}; {largest} ({effect['clips']} clips)")
    out.print(table)
    finish(result, as_json)
    if result["doubt"]:
        raise W2SError(result["doubt"])


@app.command()
def train(
    experiment: Annotated[
        str, typer.Argument(metavar="EXPERIMENT[:variant]", help="A Python file with get_config, or a student's name.")
    ],
    bank_path: Annotated[Path, typer.Option("--bank")],
    views_path: Annotated[Path, typer.Option("--views")],
    labels_path: Annotated[Path, typer.Option("--labels")],
    workdir: Annotated[Path, typer.Option(help="Where the run lives; an interrupted run goes on.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; repeatable.")
    ] = None,
    parallel: Annotated[
        Parallel | None, typer.Option(help="One program over all devices, or pmap.", show_default="the experiment's: jit")
    ] = None,
    bank_placement: Annotated[
        Placement | None, typer.Option(help="Where the bank's samples are kept.", show_default="the experiment's: auto")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Write a trace of a few steps to WORKDIR/profile.")] = False,
    distributed: Distributed = False,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process: Process = None,
    as_json: Json = False,
) -> None:
    """Train a student on a teacher's labels, on all devices of this process and of those that it joins.

    WORKDIR gets config.json, metrics.jsonl, TensorBoard events, checkpoints, and the best student in student/. Ctrl-C and
    SIGTERM write a last checkpoint (exit code 130 and 143); the same command goes on from it. With more --set steps, a run,
    finished or not, goes on with the learning rates that the schedule over so many steps has from there on. Processes that
    are joined (--distributed, or --coordinator with --processes and --process) share WORKDIR; each reads only its part of the
    bank.
    """
    config, bank, views, labels, work = (heavy(name, "train") for name in ("config", "bank", "views", "labels", "train"))
    experiment_config = config.load(experiment, settings or [])
    if parallel:
        experiment_config.parallel = parallel.value
    if bank_placement:
        experiment_config.bank_placement = bank_placement.value
    _join(distributed, coordinator, processes, process)
    the_bank, the_views = bank.Bank(bank_path), views.read(views_path)
    the_labels = labels.read(labels_path, the_views)
    with shown("train", "steps") as report:
        summary = work.train(
            experiment_config,
            the_bank,
            the_views,
            the_labels,
            workdir,
            profile=profile,
            progress=report,
            say=lambda line: err.print(line, soft_wrap=True),
        )
    if not heavy("parallel", "train").is_main_process():
        return
    scores = summary["validation_ccc"]
    found = ", ".join(f"{name} {score:.3f}" for name, score in scores.items()) if scores else "no validation views"
    out.print(f"{summary['student']}: step {summary['best_step']} of {summary['steps']}, validation CCC {found}")
    if summary["clips_per_second"]:
        out.print(f"  {summary['clips_per_second']} views/s, {summary['seconds']} s of training")
    finish(summary, as_json)


@app.command("eval")
def evaluate(
    bank_path: Annotated[Path, typer.Option("--bank")],
    path: Annotated[
        Path | None, typer.Argument(metavar="RUN|MODEL", help="A run, a student, a model directory or an .onnx file.")
    ] = None,
    views_path: Annotated[Path | None, typer.Option("--views", show_default="clean views drawn from the bank")] = None,
    labels_path: Annotated[Path | None, typer.Option("--labels", show_default="people's ratings only")] = None,
    split: Annotated[Split, typer.Option(help="Which part of the bank.")] = Split.test,
    into: Annotated[
        Path | None,
        typer.Option("--out", help="For the figures (JSON) and a scatter plot.", show_default="beside RUN|MODEL"),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="NAME", help="Instead of RUN|MODEL: this teacher, on whole clips.")
    ] = None,
    dimensions: Dimensions = None,
    output: Output = None,
    checkpoint_dir: CheckpointDir = None,
    dtype: Dtyped = None,
    normalisation: Normalised = None,
    revision: Revision = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Clips that each device hears at once.", show_default="8")
    ] = None,
    as_json: Json = False,
) -> None:
    """CCC per dimension, with 95 % confidence intervals, against the teacher's labels and against people's ratings."""
    if (path is None) == (teacher is None):
        raise UsageError("eval needs either RUN|MODEL or --teacher NAME")
    bank, views, labels, work = (heavy(name, "train") for name in ("bank", "views", "labels", "evaluate"))
    if teacher is not None:
        if views_path or labels_path:
            raise UsageError("--teacher hears whole clips and is compared with people: --views and --labels are for a student")
        the_bank = bank.Bank(bank_path)
        the_teacher = _teacher(teacher, checkpoint_dir, dimensions, dtype, normalisation, revision, output)
        with shown("eval", "clips") as progress:
            report = work.evaluate_teacher(
                the_teacher, the_bank, split=split.value, batch_size=batch_size or 8, out=into, progress=progress
            )
        _scores(report["human"], f"{teacher} against people's ratings, {split.value} split, {report['clips']} clips")
        if report["cut"]:
            out.print(f"{report['cut']} clips are longer than 30 s; only their first 30 s were heard")
        if getattr(the_teacher, "doubt", None):
            err.print(f"w2s: warning: {the_teacher.doubt}", style="yellow")
        written = into and into / f"teacher_{split.value}"
    else:
        if any(value is not None for value in (dimensions, output, checkpoint_dir, dtype, normalisation, revision, batch_size)):
            options = "--dimensions, --output, --checkpoint-dir, --dtype, --normalisation, --revision and --batch-size"
            raise UsageError(f"{options} go with --teacher")
        if labels_path and not views_path:
            raise UsageError("--labels belong to views: give --views as well")
        the_bank = bank.Bank(bank_path)
        the_views = views.read(views_path) if views_path else None
        the_labels = labels.read(labels_path, the_views) if labels_path else None
        directory = into or (path if path.is_dir() else path.parent)
        report = work.evaluate(path, the_bank, the_views, the_labels, split=split.value, out=directory)
        for what, title in (("teacher", "its teacher"), ("human", "people's ratings")):
            if report[what]:
                _scores(report[what], f"{path.name} against {title}, {split.value} split, {report['views']} views")
        written = directory / f"eval_{split.value}"
    for note in report["notes"]:
        out.print(note, style="yellow")
    if written:
        out.print(f"figures and picture: {written}.json, {written}.png")
    finish(report, as_json)


def _scores(scores: dict, title: str) -> None:
    """Print the CCC of each dimension."""
    table = Table(title=title, title_justify="left")
    table.add_column("dimension")
    for column in ("CCC", "95 % from", "to"):
        table.add_column(column, justify="right")
    for name, score in scores.items():
        if name != "mean":
            table.add_row(name, *("-" if score[key] is None else f"{score[key]:.3f}" for key in ("ccc", "low", "high")))
    table.add_row("mean", f"{scores['mean']:.3f}", "", "")
    out.print(table)


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model directory or an .onnx file.")],
    sources: Annotated[
        list[Path], typer.Argument(metavar="AUDIO|FOLDER|-...", help="Audio files, folders of them, - for a file on stdin.")
    ],
    window: Annotated[
        float | None, typer.Option(help="Seconds in a window.", show_default="whole file; 10 beyond a minute")
    ] = None,
    hop: Annotated[float | None, typer.Option(help="Seconds from window to window.", show_default="the window")] = None,
    form: Annotated[Format, typer.Option("--format", help="Of the rows on stdout.")] = Format.table,
    kind: Annotated[Kind | None, typer.Option(help="Which file of a model directory.", show_default="fp32")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of onnxruntime.")] = 1,
    as_json: Json = False,
) -> None:
    """Predict the model's dimensions for audio files, one row per file or window.

    A FOLDER stands for all audio files below it, - for the bytes of one file on standard input. Long files are read window by
    window in bounded memory. A file that cannot be read is reported and the rest is done; the exit code is then 1. Ctrl-C
    prints the rows so far.
    """
    from w2s_jax.runtime import Predictor

    for value, name, most in ((window, "--window", LONGEST), (hop, "--hop", sys.float_info.max)):
        if value is not None and not 0 < value <= most:
            most = f" and at most {most:g}" if value > most == LONGEST else ""
            raise UsageError(f"{name} takes a number of seconds above 0{most}, got {value}")
    if hop is not None and window is None:
        raise UsageError("--hop goes with --window")
    predictor = Predictor(model, kind=kind.value if kind else None, threads=threads)
    with tempfile.TemporaryDirectory(prefix="w2s-") as temporary:
        files = _audio_files(sources, Path(temporary))
        if stand_in := predictor.metadata.get("stand_in") == "true":
            err.print(
                f"w2s: note: {model} learned from a stand-in for a teacher: its values show that the chain works, nothing else",
                style="yellow",
                soft_wrap=True,
            )
        rows, failures = 0, 0
        writer = _Rows(form, predictor.dimensions)
        try:
            # rows that appear on the terminal one by one are progress enough, and would run into the bar
            live = form in (Format.csv, Format.jsonl) and out.is_terminal
            with _unseen() if live else shown("predict", "files", brief=True) as report:
                for number, (name, path) in enumerate(files):
                    try:
                        with _called(name, path):
                            for start, end, values in _predict_file(predictor, path, window, hop):
                                rows += writer.add(name, start, end, values)
                                report(number, len(files), rows=rows)
                    except W2SError as error:
                        failures += 1
                        _fail(str(error), 1)
                    report(number + 1, len(files), rows=rows)
        finally:  # also of what is stopped in the middle
            writer.close()
    result = {"model": str(model), "files": len(files), "failures": failures, "rows": rows}
    finish(result | ({"stand_in": True} if stand_in else {}), as_json)
    if failures:
        if len(files) == 1:  # its error is told already
            raise typer.Exit(1)
        raise W2SError(f"{failures} of {len(files)} files could not be predicted")


#: Seconds of audio that are predicted in one piece unless windows are asked for; memory grows with the length.
WHOLE_FILE = 60.0
#: Seconds in the longest window; several hours would not fit into the memory of most machines.
LONGEST = 3600.0


@contextlib.contextmanager
def _unseen() -> Iterator[Any]:
    yield lambda *_, **__: None


def _audio_files(sources: list[Path], temporary: Path) -> list[tuple[Path, Path]]:
    """(name for people, path) of every audio file that the command line names; standard input is spooled to ``temporary``."""
    files = []
    for source in sources:
        if source == Path("-"):
            if (spooled := temporary / "stdin") in (path for _, path in files):
                raise UsageError("- is named twice, but standard input can be read only once")
            _spool(spooled)
            files.append((source, spooled))
        elif source.is_dir():
            from w2s_jax import corpora

            files += [(Path(clip.file),) * 2 for clip in corpora.read("folder", source)]
        else:
            files.append((source, source))
    return files


def _spool(path: Path) -> None:
    """Copy standard input to a file, for audio formats are read by seeking."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("- reads an audio file from a pipe (w2s predict MODEL - < speech.wav); nothing is piped in")
    try:
        with open(path, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
    except OSError as error:
        raise W2SError(
            f"cannot copy standard input into {path.parent}: {error.strerror} (TMPDIR chooses another place)"
        ) from error


@contextlib.contextmanager
def _called(name: Path, path: Path) -> Iterator[None]:
    """Errors and warnings about ``path`` name the file as the user knows it."""
    from w2s_jax.audio import printable

    known, spooled = "standard input" if name != path else printable(name), printable(path)

    def renamed(message: object) -> str:
        return str(message).replace(spooled, known)

    before = warnings.showwarning
    warnings.showwarning = lambda message, *rest, **others: before(renamed(message), *rest, **others)
    try:
        yield
    except W2SError as error:
        message = renamed(error)
        error.args = (message if known in message else f"{known}: {message}",)
        raise
    finally:
        warnings.showwarning = before


def _predict_file(predictor, path: Path, window: float | None, hop: float | None):
    from w2s_jax import audio

    if window is None and audio.duration(path) <= WHOLE_FILE:
        wave = audio.load(path)
        yield 0.0, len(wave) / SAMPLING_RATE, predictor(wave)
        return
    window = window or 10.0
    yield from predictor.windows(audio.blocks(path), SAMPLING_RATE, window, hop or window)


class _Rows:
    """Rows of predictions to stdout in one of the formats; all but table and json as they come."""

    def __init__(self, form: Format, dimensions) -> None:
        self.form, self.dimensions, self.kept = form, list(dimensions), []
        if form is Format.csv:
            self._csv("file", "start", "end", *self.dimensions)

    def _csv(self, *values) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(values)
        print(line.getvalue(), end="", flush=True)

    def add(self, path: Path, start: float, end: float, values: dict[str, float]) -> int:
        from w2s_jax.audio import printable

        # times to the sample: the last window, aligned with the end, may begin right after the one before
        row = {"file": printable(path), "start": round(start, 6), "end": round(end, 6)}
        row |= {name: round(float(value), 6) for name, value in values.items()}
        if self.form is Format.jsonl:
            print(_json(row), flush=True)
        elif self.form is Format.csv:
            self._csv(*row.values())
        else:
            self.kept.append(row)
        return 1

    def close(self) -> None:
        if self.form is Format.json:
            print(_json(self.kept, indent=1))
        elif self.form is Format.table and self.kept:
            table = Table()
            table.add_column("file", overflow="fold")
            for name in ("start", "end", *self.dimensions):
                table.add_column(name, justify="right")
            for row in self.kept:
                figures = [f"{row['start']:.2f}", f"{row['end']:.2f}", *(f"{row[name]:.3f}" for name in self.dimensions)]
                table.add_row(row["file"], *figures)
            out.print(table)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run or student directory.")],
    into: Annotated[Path, typer.Option("--out", help="The model directory to write.")],
    kinds: Annotated[
        list[Kinds] | None,
        typer.Option("--kind", help="What to write; repeatable.", show_default="fp32, and int8 with --calibration"),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="BANK",
            help="Audio for kinds that round: training clips set the ranges, validation clips judge what comes out.",
        ),
    ] = None,
    min_ccc: Annotated[
        float,
        typer.Option("--min-ccc", callback=_finite, help="Least CCC with fp32, in every dimension, of a kind that rounds."),
    ] = 0.99,
    weight_bits: Annotated[
        Bits, typer.Option(help="Of eight-bit kinds' weights; 8 only for ARM and x86 with VNNI: elsewhere their sums overflow.")
    ] = Bits.seven,
    measured: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure time and memory on this machine for the report.")
    ] = True,
    against: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Another ONNX file of one waveform, measured beside; the report has ratios to it."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a student: one file of each kind, model.yaml for audonnx, a card, export.json with proofs and figures.

    \b
    fp32       the student as it is; always written
    fp16w      weights of 16 bits, computes in float32
    int8w      weights of 8 bits, computes in float32: small and portable
    int8       computes in 8 bits; Wav2Smalls with onnxruntime's own operators: small and fastest there
    qdq        computes in 8 bits with standard operators: for OpenVINO and others
    int8-int4  int8 with the pooling's weights in 4 bits: smallest; Wav2Small only
    litert     fp32 as TensorFlow Lite file; litert-int8 with weights of 8 bits
    chunked    fp32 for recordings of any length, piece by piece; Wav2Smalls only
    all        all that this student can have

    fp32, litert and chunked are compared with Flax on lengths from 64 samples to 60 s, the others with fp32 on validation
    audio. A kind that is not good enough is left out, with a warning and exit code 1; if fp32 is not, nothing is written.
    """
    if not run.is_dir():
        raise UsageError(f"no run at {run}: no such directory")
    package = heavy("export", "export")
    from w2s_jax import bench as measuring

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def figures(files: dict[str, Path]) -> dict[str, dict]:
        say(f"measuring {len(files)} files")
        found = measuring.measure(files, 5.0, 20, 1, against=against)
        if line := measuring.slower({kind: found[kind]["milliseconds"] for kind in files}):
            say(line)
        keys = ("milliseconds", "peak_memory", *(["ratio"] if against else []))
        about = {"seconds": 5.0, "machine": measuring.machine()} | ({"against": against.name} if against else {})
        return {kind: {key: found[kind][key] for key in keys} | about for kind in files}

    waves = checks = None
    if calibration is not None:
        bank = heavy("bank", "train").Bank(calibration)
        waves, checks = bank.excerpts("train", 64, 5.0), bank.excerpts("validation", 128, 5.0)
    result = package.export_student(
        run,
        into,
        calibration=waves,
        check=checks,
        progress=say,
        min_ccc=min_ccc,
        kinds=[kind.value for kind in kinds] if kinds else None,
        weight_bits=int(weight_bits.value),
        measure=figures if measured or against else None,
    )
    table = Table()
    for at, heading in enumerate(("kind", "file", "kB", "CCC with fp32", "ms for 5 s", "ratio", "peak MB")):
        table.add_column(heading, justify="right" if at > 1 else "left", no_wrap=True)
    for kind, row in result["kinds"].items():
        memory = row.get("peak_memory")
        table.add_row(
            kind,
            row["file"],
            f"{row['bytes'] / 1000:.1f}",
            f"{min(row['ccc'].values()):.4f}" if "ccc" in row else "–",
            f"{row['milliseconds']:.2f}" if "milliseconds" in row else "–",
            f"{row['ratio']:.2f}" if "ratio" in row else "–",
            f"{memory / 1e6:.1f}" if memory is not None else "–",
        )
    for kind in result["failed"]:
        table.add_row(kind, "not written")
    (out if out.is_terminal else Console(width=120)).print(table)
    out.print(f"model directory: {into}")
    finish({"model": str(into), **result}, as_json)
    if failed := result["failed"]:  # why, the warnings have said
        all_kinds = len(result["kinds"]) + len(failed)
        raise W2SError(f"{len(failed)} of {all_kinds} kinds not written: {', '.join(failed)}; {into} has the others")


@app.command()
def bench(
    students: Annotated[
        list[str] | None, typer.Argument(metavar="[STUDENT...]", help="Made with random weights; default: all, if no --model.")
    ] = None,
    models: Annotated[
        list[Path] | None,
        typer.Option("--model", metavar="FILE", help="A model directory (all its kinds) or any .onnx file; repeatable."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A yardstick: every row gets the ratio of its time to that of this .onnx file."),
    ] = None,
    engines: Annotated[
        list[str] | None,
        typer.Option(
            "--engine", metavar="ENGINE", help="onnxruntime or openvino; repeatable; default: both, if OpenVINO is installed."
        ),
    ] = None,
    into: Annotated[
        Path, typer.Option("--out", help="For bench.csv, bench.json, bench.md, bench.png and the students.")
    ] = Path("bench"),
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A field of the students; repeatable.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, callback=_finite, help="Length of the audio.")] = 5.0,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of each file; they take turns.")] = 30,
    threads: Annotated[int, typer.Option(min=1, help="Of the engine.")] = 1,
    as_json: Json = False,
) -> None:
    """Measure models on this machine: parameters, MACs, size, peak memory, time for 5 s; beside what the paper says.

    Peak memory is that of a fresh process above one that runs an empty model. Students need the extra "export"; --model alone
    needs nothing but the base install, where MACs stay uncounted. OpenVINO (extra "openvino") computes in float32, which is not
    its default on every CPU, and leaves out files with operators that only onnxruntime has.
    """
    from w2s_jax import bench as work

    if not students and not models:
        students = list(heavy("models", "export").STUDENTS)
    fields = {}
    if settings:
        if not students:
            raise UsageError("--set is for the students' fields; a model file has none")
        config = heavy("config", "train")
        fields = config.load(students[0], [f"fields.{setting}" for setting in settings]).fields.to_dict()
    with shown("measure", "runs") as report:
        table = work.bench(
            students or [],
            models or [],
            into,
            fields=fields,
            seconds=seconds,
            runs=runs,
            threads=threads,
            against=against,
            engines=engines,
            say=lambda line: err.print(line),
            progress=report,
        )
    used = work.machine({row["engine"] for row in table})
    out.print(f"{seconds:g} s of audio, {threads} thread{'s' * (threads > 1)}; {used}")
    grid = Table()
    headings = work.headings(table[0])
    width = out.width if out.is_terminal else 180  # a file or a pipe has no width of its own
    # bench.md has all of them
    left_out = ["paper says"] * (width < 150) + ["parameters", "p95", "RTF"] * (width < 110)
    kept = [at for at, heading in enumerate(headings) if heading not in left_out]
    for at in kept:
        words = headings[at] in ("model", "kind", "engine", "paper says")
        grid.add_column(headings[at], justify="left" if words else "right", no_wrap=True)
    for row in table:
        cells = work.shown(row)
        grid.add_row(*(cells[at] for at in kept))
    (out if out.is_terminal else Console(width=width)).print(grid)
    out.print(f"{'students have random weights; ' if students else ''}RTF is time divided by the length of the audio")
    if against:
        out.print(f"ratio: time divided by that of {against} in onnxruntime, the median of pairs")
    out.print(f"files: {', '.join(str(path) for path in sorted(into.glob('bench.*')))}")
    finish({"out": str(into), "rows": table}, as_json)


@app.command()
def quickstart(
    workdir: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("quickstart"),
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Training steps; fewer are quicker and worse.", show_default="320, or those of a run there"),
    ] = None,
    as_json: Json = False,
) -> None:
    """The whole chain on generated speech: minutes on a laptop, no network, no system package."""
    for package in ("jax", "librosa", "matplotlib", "pyarrow", "tensorflow", "tf2onnx", "espeakng_loader"):
        if importlib.util.find_spec(package) is None:  # one message for all, not one after the other
            raise missing_extra(package, "all")
    module = heavy("quickstart", "all")
    finish(module.run(workdir, out, shown, steps), as_json)


def _unwrapped(text: str) -> str:
    """Help that is wrapped where the terminal ends, not where the source does; what follows a \\b is left as it is."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(part if part.startswith("\b") else " ".join(part.split()) for part in paragraphs)


for _group in (app, bank_app, views_app, teacher_app):
    for _command in _group.registered_commands:
        _command.help = _unwrapped(_command.callback.__doc__)


def _version(value: bool) -> None:
    if value:
        print(f"w2s {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    pass


def entry() -> None:
    """What the console script calls: ``main``, in a process whose malloc asks for huge pages where that is faster.

    A training step on a CPU, or a batch of a Transformer, takes and returns a gigabyte; most of the time that this costs is
    page faults, and glibc reads the setting only when a process starts (measured: experiments/README.md). A GLIBC_TUNABLES of
    the user's own is left alone.
    """
    # transformers would import every framework that it finds, for its Flax modules
    os.environ |= {"USE_TORCH": "0", "USE_TF": "0", **os.environ}
    if (
        sys.platform == "linux"
        and next((word for word in sys.argv[1:] if not word.startswith("-")), None)
        in {"train", "label", "teacher", "quickstart"}
        and "GLIBC_TUNABLES" not in os.environ
    ):
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        with contextlib.suppress(OSError):
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    main()


def main() -> None:
    """Run the command in ``sys.argv``; an error is one line on stderr and an exit code."""
    _standard_streams()
    # --debug may stand anywhere among the options, of which there are none after "--"
    arguments = sys.argv[1:]
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in options
    arguments = [option for option in options if option != "--debug"] + arguments[len(options) :]
    if not debug:
        warnings.showwarning = lambda message, *_, **__: print(f"w2s: warning: {_one_line(message)}", file=sys.stderr)
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # without a home it makes do, and says so in three lines
    try:
        code = app(arguments, standalone_mode=False, prog_name="w2s") or 0
        if code == 130:  # typer has caught the KeyboardInterrupt, and says nothing
            raise KeyboardInterrupt
        sys.stdout.flush()  # here, where a full disk or a closed pipe can still be told
    except ClickError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # the help is printed already
            code = 2
        else:
            where = f" (see {error.ctx.command_path} --help)" if getattr(error, "ctx", None) else ""
            message = error.format_message().rstrip(".").replace(": Value error, ", ": ")  # pydantic's word, for typer
            code = _fail(f"{message}{where}", 2)
    except (typer.Abort, KeyboardInterrupt):
        code = _fail("stopped", 130)
    except W2SError as error:
        if debug:
            raise
        code = _fail(str(error), error.exit_code)
    except BrokenPipeError:
        code = 1  # the reader went away (| head); nothing is left to say to it
    except (OSError, MemoryError) as error:
        if debug:
            raise
        code = _fail(f"{type(error).__name__}: {error}", 1)
    except UnicodeEncodeError as error:  # of libraries that take only UTF-8: pyarrow, orbax
        if debug:
            raise
        code = _fail(f"{ascii(error.object[:300])} is not valid UTF-8, as a file here has to be named; choose another name", 2)
    except Exception as error:
        if debug:
            raise
        about = f"unexpected {type(error).__name__}: {_one_line(error)[:300]}"
        code = _fail(f"{about} (a fault of w2s {__version__}: please report it with what --debug shows)", 1)
    try:
        sys.stdout.flush()
    except OSError:  # what is left cannot be written; Python would try once more at the end, and say so
        _discard(sys.stdout)
    sys.exit(code)


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # nobody is left to read it
        print(f"w2s: error: {_one_line(message)}", file=sys.stderr)
    return code


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _standard_streams() -> None:
    """Give the process the three streams that it may have been started without, and have them write what they can.

    What the encoding of stdout or stderr lacks is escaped, or drawn with ASCII where that reads well.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # otherwise the next file that is opened gets this number, and whatever is printed
            with contextlib.suppress(OSError):
                spare = os.open(os.devnull, os.O_RDWR)
                if spare != number:
                    os.dup2(spare, number)
                    os.close(spare)
    codecs.register_error("w2s", _in_ascii)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (until the process ends)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="w2s")


_ASCII = {"–": "-", "…": "...", "×": "x", "→": "->", "·": ".", "’": "'", "−": "-", "≥": ">=", "≤": "<="}


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """An error handler of codecs: what cannot be encoded is replaced or, as in Python source, escaped."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    refused = error.object[error.start : error.end]
    return "".join(_ASCII.get(character) or ascii(character)[1:-1] for character in refused), error.end


def _discard(stream) -> None:
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


if __name__ == "__main__":
    entry()
