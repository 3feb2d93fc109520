"""``w2s train`` and ``w2s eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from w2s_jax.cli import options as o
from w2s_jax.cli.progress import Reporter, finish, out
from w2s_jax.errors import UsageError

app = typer.Typer()


@app.command(cls=o.HugePages)
def train(
    experiment: Annotated[
        str, typer.Argument(metavar="EXPERIMENT[:variant]", help="A Python file with get_config, or a student's name.")
    ],
    bank_path: Annotated[Path, typer.Option("--bank", help="A directory that w2s bank build made.")],
    views_path: Annotated[Path, typer.Option("--views", help="The views that were labelled.")],
    labels_path: Annotated[Path, typer.Option("--labels", help="A directory that w2s label made.")],
    workdir: Annotated[Path, typer.Option(help="Where the run lives; an interrupted run goes on.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, of those above; repeatable.")
    ] = None,
    parallel: Annotated[
        Literal["jit", "pmap"] | None,
        typer.Option(help="One program over all devices, or pmap.", show_default="the experiment's: jit"),
    ] = None,
    bank_placement: Annotated[
        Literal["auto", "device", "host"] | None,
        typer.Option(help="Where the bank's samples are kept.", show_default="the experiment's: auto"),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Write a trace of a few steps to WORKDIR/profile.")] = False,
    distributed: o.Distributed = False,
    coordinator: o.Coordinator = None,
    processes: o.Processes = None,
    process: o.Process = None,
    as_json: o.Json = False,
) -> None:
    """Train a student on a teacher's labels, on all devices of this process and of those that it joins.

    WORKDIR gets config.json, metrics.jsonl, TensorBoard events, checkpoints, and the best student in student/. Ctrl-C and
    SIGTERM write a last checkpoint (exit code 130 and 143); the same command goes on from it. With more --set steps, a run,
    finished or not, goes on with the learning rates that the schedule over so many steps has from there on; without it, a run
    keeps the number of steps that it has. Processes that
    are joined (--distributed, or --coordinator with --processes and --process) share WORKDIR; each reads only its part of the
    bank.

    Students: wav2small, wav2small_17k, mobilenet_v3_s, mobilenet_v3_l, mobilenet_v4_s, mobilenet_v4_m, mobilenet_v4_l, cnn14.

    Settings: steps, batch_size, learning_rate, warmup, weight_decay, clip_norm, l2, ema, crop, jitter, calibrate, seed,
    accumulate, dtype, form, pretrained, eval_every, log_every, scan_steps, parallel, data_shards,
    bank_placement, bank_gib, workers, and the student's own: fields.channels, fields.stride, … (see w2s_jax/config.py).
    """
    from w2s_jax import bank, config
    from w2s_jax import parallel as devices
    from w2s_jax import train as training
    from w2s_jax.labels import Labels
    from w2s_jax.views import Views

    experiment_config = config.load(experiment, settings or [])
    if not experiment.partition(":")[0].endswith(".py") and not any(text.startswith("steps=") for text in settings or []):
        experiment_config.steps = training.planned_steps(workdir, experiment_config.steps)
    if parallel:
        experiment_config.parallel = parallel
    if bank_placement:
        experiment_config.bank_placement = bank_placement
    o.join_processes(distributed, coordinator, processes, process)
    the_bank, the_views = bank.Bank(bank_path), Views.read(views_path)
    the_labels = Labels.read(labels_path, the_views)
    with Reporter("train", "steps") as reporter:
        summary = training.train(
            experiment_config,
            the_bank,
            the_views,
            the_labels,
            workdir,
            profile=profile,
            progress=reporter.report,
            message=reporter.message,
        )
    if not devices.is_main_process():
        return
    scores = summary["validation_ccc"]
    shown = ", ".join(f"{name} {score:.3f}" for name, score in scores.items()) if scores else "no validation views"
    out.print(f"{summary['student']}: step {summary['best_step']} of {summary['steps']}, validation CCC {shown}")
    if summary["clips_per_second"]:
        out.print(f"  {summary['clips_per_second']} views/s, {summary['seconds']} s of training")
    finish(summary, as_json)


@app.command("eval")
def evaluate(
    bank_path: Annotated[Path, typer.Option("--bank", help="A directory that w2s bank build made.")],
    path: Annotated[
        Path | None, typer.Argument(metavar="RUN|MODEL", help="A run, a student, a model directory or an .onnx file.")
    ] = None,
    views_path: Annotated[
        Path | None, typer.Option("--views", help="What to evaluate on.", show_default="clean views drawn from the bank")
    ] = None,
    labels_path: Annotated[
        Path | None, typer.Option("--labels", help="The teacher's, of these views.", show_default="human ratings only")
    ] = None,
    split: Annotated[o.Split, typer.Option(help="Which part of the bank.")] = "test",
    into: Annotated[
        Path | None,
        typer.Option("--out", help="For the figures (JSON) and a scatter plot.", show_default="beside RUN|MODEL"),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="NAME", help="Instead of RUN|MODEL: this teacher, on whole clips.")
    ] = None,
    dimensions: o.Dimensions = None,
    output: o.Output = None,
    checkpoint_dir: o.CheckpointDir = None,
    dtype: o.Dtype = None,
    normalisation: o.Normalisation = None,
    revision: o.Revision = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Clips in a batch on each device.", show_default="8")] = None,
    as_json: o.Json = False,
) -> None:
    """CCC per dimension, with 95 % confidence intervals, against the teacher's labels and against human ratings."""
    if (path is None) == (teacher is None):
        raise UsageError("eval needs either RUN|MODEL or --teacher NAME")
    options = (checkpoint_dir, dimensions, dtype, normalisation, revision, output)
    if teacher is not None:
        if views_path or labels_path:
            raise UsageError("--teacher labels whole clips and is compared with people: --views and --labels are for a student")
        report, written = _evaluate_teacher(teacher, options, bank_path, split, batch_size or 8, into)
    else:
        if any(value is not None for value in (*options, batch_size)):
            names = "--dimensions, --output, --checkpoint-dir, --dtype, --normalisation, --revision and --batch-size"
            raise UsageError(f"{names} go with --teacher")
        if labels_path and not views_path:
            raise UsageError("--labels belong to views: give --views as well")
        report, written = _evaluate_student(path, bank_path, views_path, labels_path, split, into)
    for note in report["notes"]:
        out.print(note, style="yellow")
    if written:
        out.print(f"figures and picture: {written}.json, {written}.png")
    finish(report, as_json)


def _evaluate_teacher(
    name: str, options: tuple, bank_path: Path, split: str, batch_size: int, into: Path | None
) -> tuple[dict, Path | None]:
    """Compare a teacher with people, print its scores; the report, and the files' path without suffix."""
    from w2s_jax import evaluate as evaluation
    from w2s_jax import teachers
    from w2s_jax.bank import Bank

    bank = Bank(bank_path)
    teacher = o.load_teacher(name, *options)
    with Reporter("eval", "clips") as reporter:
        report = evaluation.evaluate_teacher(
            teacher, bank, split=split, batch_size=batch_size, out=into, progress=reporter.report
        )
    _print_scores(report["human"], f"{name} against human ratings, {split} split, {report['clips']} clips")
    if report["cut"]:
        out.print(f"{report['cut']} clips are longer than 30 s; only their first 30 s were used")
    if doubt := teachers.attribute(teacher, "doubt"):
        Reporter.message(f"w2s: warning: {doubt}", style="yellow")
    return report, into and into / f"teacher_{split}"


def _evaluate_student(
    path: Path, bank_path: Path, views_path: Path | None, labels_path: Path | None, split: str, into: Path | None
) -> tuple[dict, Path]:
    """Compare a student with its teacher and with people, print its scores; the report, and the files' path without suffix."""
    from w2s_jax import evaluate as evaluation
    from w2s_jax.bank import Bank
    from w2s_jax.labels import Labels
    from w2s_jax.views import Views

    bank = Bank(bank_path)
    the_views = Views.read(views_path) if views_path else None
    the_labels = Labels.read(labels_path, the_views) if labels_path else None
    directory = into or (path if path.is_dir() else path.parent)
    report = evaluation.evaluate(path, bank, the_views, the_labels, split=split, out=directory)
    for judge, title in (("teacher", "its teacher"), ("human", "human ratings")):
        if report[judge]:
            _print_scores(report[judge], f"{path.name} against {title}, {split} split, {report['views']} views")
    return report, directory / f"eval_{split}"


def _print_scores(scores: dict, title: str) -> None:
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
