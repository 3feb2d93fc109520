"""The whole pipeline on generated speech, for a first look: every step is a call that the README shows as a command."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from rich.console import Console
from rich.table import Table

from w2s_jax import SAMPLING_RATE, config, corpora, export, labelling, speech, teachers, train, views
from w2s_jax.bank import Bank
from w2s_jax.bank import build as build_bank
from w2s_jax.errors import MismatchError, UsageError
from w2s_jax.evaluate import evaluate
from w2s_jax.files import read_json, write_atomic
from w2s_jax.install import program
from w2s_jax.labels import Labels
from w2s_jax.measure import measure
from w2s_jax.runtime import Predictor

#: Views and length of training: about three minutes on two cores, chosen by trial.
VIEWS = {"per_clip": 4, "eval_per_clip": 4, "seconds": (2.0,), "mix": 0.0}
STEPS = 320
SETTINGS = ["learning_rate=4e-3", "eval_every=80"]
WINDOW, HOP = 2.0, 0.25


def run(workdir: Path, out: Console | None = None, reporter: Callable | None = None, steps: int | None = None) -> dict:
    """Make speech, label it, train, evaluate, export, predict; what is done already is not done again.

    Args:
        workdir: gets speech/, bank/, views.parquet, labels/, run/, model/ and prediction.png.
        out: where the results are printed; default: nowhere.
        reporter: makes a context manager, ``reporter(job, unit)``, whose value has ``report(done, total, **figures)``;
            default: reports nothing.
        steps: of training; default: those of the run that is there, ``STEPS`` where there is none. Fewer are quicker and worse.

    Returns:
        The figures of the closing table.

    Raises:
        UsageError: ``workdir`` is a file.
        MismatchError: the run that is there has another number of steps than the one asked for.
    """
    out, reporter = out or Console(quiet=True), reporter or _report_nothing
    began = time.perf_counter()
    if workdir.exists() and not workdir.is_dir():
        raise UsageError(f"{workdir} is a file; expected a directory for what the quickstart makes")
    steps = _choose_steps(workdir, steps, out)
    corpus, bank = _make_bank(workdir, out, reporter)
    drawn, taught, teacher = _label(workdir, bank, out, reporter)
    out.print("4/7 train Wav2Small, 72,659 parameters", style="bold")
    settings = config.load("wav2small", [f"steps={steps}", *SETTINGS])
    with reporter("train", "steps") as progress:
        trained = train.train(settings, bank, drawn, taught, workdir / "run", progress=progress.report)
    out.print("5/7 evaluate on voices that it was not trained on", style="bold")
    scores = evaluate(workdir / "run", bank, drawn, taught, out=workdir / "run")["teacher"]
    out.print("6/7 export to ONNX", style="bold")
    exported = export.export_student(
        workdir / "run",
        workdir / "model",
        calibration=bank.excerpts("train", 64, 5.0),
        check=bank.excerpts("validation", 128, 5.0),
    )
    out.print("7/7 predict a held-out voice", style="bold")
    kinds = exported["kinds"]
    times = measure({kind: workdir / "model" / row["file"] for kind, row in kinds.items()}, runs=15, memory=False)
    wave, voice = _held_out(bank)
    picture = workdir / "prediction.png"
    _draw(picture, wave, voice, Predictor(workdir / "model"), teacher)

    result = {
        "mean_ccc": scores["mean"],
        "ccc": {name: scores[name]["ccc"] for name in taught.dimensions},
        "int8_ccc": kinds["int8"]["ccc"] if "int8" in kinds else None,
        "failed": exported["failed"],
        "bytes": {row["file"]: row["bytes"] for row in kinds.values()},
        "milliseconds_for_5_s": {kind: round(row["milliseconds"], 2) for kind, row in times.items()},
        "clips_per_second": trained["clips_per_second"],
        "picture": str(picture),
        "seconds": round(time.perf_counter() - began, 1),
    }
    out.print(_tabulate(scores, taught.dimensions, result["int8_ccc"]))
    for (file, size), milliseconds in zip(result["bytes"].items(), result["milliseconds_for_5_s"].values(), strict=True):
        out.print(f"{workdir / 'model' / file}: {size / 1000:.0f} kB, {milliseconds:.1f} ms for 5 s of audio, 1 thread")
    for kind, why in result["failed"].items():
        out.print(f"Without {kind}: {why}", style="bold", markup=False, highlight=False)
    out.print(f"A/D/V over time, student and teacher: {picture}")
    minutes = result["seconds"] / 60
    out.print(f"All of it took {minutes:.1f} minutes. The values imitate a rule; for emotion, give it a real teacher.")
    first = np.flatnonzero(bank.clips["split"] == "test")[0]
    _print_next(out, workdir / "model", corpus.parent / bank.clips["name"][first])
    return result


def _make_bank(workdir: Path, out: Console, reporter: Callable) -> tuple[Path, Bank]:
    """The list of the spoken clips, and their bank."""
    out.print("1/7 speak: sentences in seven languages, by eSpeak NG", style="bold")
    with reporter("speak", "clips") as progress:
        corpus = speech.make_corpus(workdir / "speech", progress=progress.report)
    out.print("2/7 decode into a bank", style="bold")
    with reporter("decode", "clips") as progress:
        build_bank(corpora.read("csv", corpus), workdir / "bank", corpus="csv", progress=progress.report)
    return corpus, Bank(workdir / "bank")


def _label(workdir: Path, bank: Bank, out: Console, reporter: Callable) -> tuple:
    """Views, their labels, and the teacher."""
    out.print("3/7 draw views, and label them with the acoustic teacher (a stand-in: a rule, no emotion model)", style="bold")
    drawn = views.draw(bank, **VIEWS)
    drawn.save(workdir / "views.parquet")
    teacher = teachers.load("acoustic")
    with reporter("label", "views") as progress:
        labelling.label(bank, drawn, teacher, workdir / "labels", progress=progress.report)
    return drawn, Labels.read(workdir / "labels", drawn), teacher


def _tabulate(scores: dict, dimensions: tuple[str, ...], int8: dict | None) -> Table:
    """The closing table: CCC with the teacher, and of int8 with fp32 where there is an int8."""
    table = Table(title="Wav2Small and its teacher on held-out voices", title_justify="left")
    for column in ("dimension", "CCC", "95 % interval", *(["int8 against fp32"] if int8 else [])):
        table.add_column(column, justify="left" if column == "dimension" else "right")
    for name in dimensions:
        score = scores[name]
        cells = [name, f"{score['ccc']:.3f}", f"{score['low']:.3f} to {score['high']:.3f}"]
        table.add_row(*cells, *([f"{int8[name]:.4f}"] if int8 else []))
    table.add_row("mean", f"{scores['mean']:.3f}", "", *([f"{np.mean(list(int8.values())):.4f}"] if int8 else []))
    return table


@contextlib.contextmanager
def _report_nothing(job: str, unit: str) -> Iterator[SimpleNamespace]:
    yield SimpleNamespace(report=lambda done, total, **figures: None)


def _choose_steps(workdir: Path, wanted: int | None, out: Console) -> int:
    """The steps to train: those of the run that is there. Others are refused, before any work."""
    run = workdir / "run"
    if not (run / "config.json").exists():
        return STEPS if wanted is None else wanted
    there = read_json(run / "config.json", "run")["config"]["steps"]
    if wanted not in (None, there):
        raise MismatchError(f"{run} holds a run of {there} steps, not {wanted}; delete {run}, or choose another --workdir")
    if there != STEPS:
        out.print(f"{run} holds a run of {there} steps, which is kept; for the usual {STEPS} delete {run} and run this again")
    return there


def _print_next(out: Console, model: Path, audio: Path) -> None:
    """Print commands that work as they are printed."""
    w2s, model, audio = program("w2s"), shlex.quote(str(model)), shlex.quote(str(audio))
    out.print("\nNext:", style="bold")
    for command in (
        f"{w2s} predict {model} {audio} --window 2 --hop 0.5",
        f"{w2s} predict {model} YOUR.wav --window 2 --hop 0.5",
        f"{w2s} bank build YOUR_FOLDER --out bank        (then views draw, label, train, eval, export: see the README)",
    ):
        out.print(f"  {command}", soft_wrap=True, markup=False, highlight=False)


def _held_out(bank: Bank) -> tuple[np.ndarray, str]:
    """Four clips of one test voice, one after the other: float32 [T] and the voice."""
    clips = np.flatnonzero(bank.clips["split"] == "test")
    speaker = bank.clips["speaker"][clips[0]]
    own = clips[bank.clips["speaker"][clips] == speaker][:4]
    return np.concatenate([bank.wave(clip) for clip in own]), str(speaker)


def _draw(path: Path, wave: np.ndarray, name: str, predictor: Predictor, teacher) -> None:
    """A/D/V over time as PNG: the student's lines, and dotted the teacher's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(predictor.windows(wave, SAMPLING_RATE, WINDOW, HOP))
    middle = [(start + end) / 2 for start, end, _ in rows]
    taught = teacher(np.stack([wave[round(s * SAMPLING_RATE) :][: round(WINDOW * SAMPLING_RATE)] for s, _, _ in rows]))
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3))
    seconds = np.arange(len(wave)) / SAMPLING_RATE
    top.plot(seconds[::16], wave[::16], color="0.4", linewidth=0.4)
    top.set_yticks([])
    top.set_title(f"held-out voice {name}: lines Wav2Small, dotted its teacher ({WINDOW:g} s windows)", fontsize=10)
    for at, dimension in enumerate(predictor.dimensions):
        color = f"C{at}"
        bottom.plot(middle, [values[dimension] for *_, values in rows], color=color, label=dimension)
        bottom.plot(middle, taught[:, at], color=color, linestyle=":", linewidth=1.2)
    bottom.set_xlabel("seconds")
    bottom.set_ylim(0, 1)
    bottom.set_xlim(0, seconds[-1])
    bottom.legend(loc="upper right", ncols=3, fontsize=9)
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
