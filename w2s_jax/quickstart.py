"""The whole chain on generated speech, for a first look: every step is a call that the README shows as a command."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from w2s_jax import SAMPLING_RATE, config, corpora, export, label, labels, speech, teachers, train, views
from w2s_jax.bank import Bank
from w2s_jax.bank import build as build_bank
from w2s_jax.errors import MismatchError
from w2s_jax.evaluate import evaluate
from w2s_jax.files import read_json, write_atomic
from w2s_jax.install import program
from w2s_jax.runtime import Predictor

#: What the student hears and how long it learns; about three minutes on two cores, found by trial.
VIEWS = {"per_clip": 4, "eval_per_clip": 4, "seconds": (2.0,), "mix": 0.0}
STEPS = 320
SETTINGS = ["learning_rate=4e-3", "eval_every=80"]
WINDOW, HOP = 2.0, 0.25


def run(workdir: Path, out: Console | None = None, shown: Callable | None = None, steps: int | None = None) -> dict:
    """Make speech, label it, train, evaluate, export, predict; what is done already is kept.

    Args:
        workdir: gets speech/, bank/, views.parquet, labels/, run/, model/ and prediction.png.
        out: where the results are printed; default: nowhere.
        shown: a context manager ``shown(what, unit)`` that yields ``report(done, total, **figures)``; default: shows nothing.
        steps: of training; default: those of the run that is there, ``STEPS`` where there is none. Fewer are quicker and worse.

    Returns:
        The figures of the closing table.

    Raises:
        MismatchError: the run that is there has another number of steps than the one asked for.
    """
    out, shown = out or Console(quiet=True), shown or _quiet
    began = time.perf_counter()
    steps = _steps(workdir, steps, out)
    out.print("1/7 speak: sentences in seven languages, by eSpeak NG", style="bold")
    with shown("speak", "clips") as report:
        corpus = speech.make_corpus(workdir / "speech", progress=report)
    out.print("2/7 decode into a bank", style="bold")
    with shown("decode", "clips") as report:
        build_bank(corpora.read("csv", corpus), workdir / "bank", corpus="csv", progress=report)
    bank = Bank(workdir / "bank")
    out.print("3/7 draw views, and label them with the acoustic teacher (a stand-in: a rule, no emotion model)", style="bold")
    drawn = views.draw(bank, **VIEWS)
    drawn.save(workdir / "views.parquet")
    with shown("label", "views") as report:
        teacher = teachers.load("acoustic")
        label.label(
            bank,
            drawn,
            teacher,
            workdir / "labels",
            progress=lambda done, total, rate: report(done, total, views_per_second=rate),
        )
    known = labels.read(workdir / "labels", drawn)
    out.print("4/7 train Wav2Small, 72,659 parameters", style="bold")
    with shown("train", "steps") as report:
        settings = config.load("wav2small", [f"steps={steps}", *SETTINGS])
        trained = train.train(settings, bank, drawn, known, workdir / "run", progress=report)
    out.print("5/7 evaluate on voices that were never heard", style="bold")
    scores = evaluate(workdir / "run", bank, drawn, known, out=workdir / "run")["teacher"]
    out.print("6/7 export to ONNX", style="bold")
    exported = export.export_student(
        workdir / "run",
        workdir / "model",
        calibration=bank.excerpts("train", 64, 5.0),
        check=bank.excerpts("validation", 128, 5.0),
    )
    out.print("7/7 predict a held-out voice", style="bold")
    kinds = exported["kinds"]
    milliseconds = {kind: _median_milliseconds(Predictor(workdir / "model", kind=kind)) for kind in kinds}
    picture = workdir / "prediction.png"
    wave, name = _held_out(bank)
    _draw(picture, wave, name, Predictor(workdir / "model"), teacher)

    int8 = kinds["int8"]["ccc"] if "int8" in kinds else None
    table = Table(title="Wav2Small and its teacher on held-out voices", title_justify="left")
    for column in ("dimension", "CCC", "95 % interval", *(["int8 against fp32"] if int8 else [])):
        table.add_column(column, justify="left" if column == "dimension" else "right")
    for dimension in known.dimensions:
        score = scores[dimension]
        cells = [dimension, f"{score['ccc']:.3f}", f"{score['low']:.3f} to {score['high']:.3f}"]
        table.add_row(*cells, *([f"{int8[dimension]:.4f}"] if int8 else []))
    table.add_row("mean", f"{scores['mean']:.3f}", "", *([f"{np.mean(list(int8.values())):.4f}"] if int8 else []))
    out.print(table)
    seconds = time.perf_counter() - began
    for kind, row in kinds.items():
        file = workdir / "model" / row["file"]
        out.print(f"{file}: {row['bytes'] / 1000:.0f} kB, {milliseconds[kind]:.1f} ms for 5 s of audio, 1 thread")
    for kind, why in exported["failed"].items():
        out.print(f"Without {kind}: {why}", style="bold", markup=False, highlight=False)
    out.print(f"A/D/V over time, student and teacher: {picture}")
    out.print(f"All of it took {seconds / 60:.1f} minutes. The values imitate a rule; for emotion, give it a real teacher.")
    _next(out, workdir / "model", corpus.parent / bank.clips["name"][np.flatnonzero(bank.clips["split"] == "test")[0]])
    return {
        "mean_ccc": scores["mean"],
        "ccc": {name: scores[name]["ccc"] for name in known.dimensions},
        "int8_ccc": int8,
        "failed": exported["failed"],
        "bytes": {row["file"]: row["bytes"] for row in kinds.values()},
        "milliseconds_for_5_s": {kind: round(value, 2) for kind, value in milliseconds.items()},
        "clips_per_second": trained["clips_per_second"],
        "picture": str(picture),
        "seconds": round(seconds, 1),
    }


@contextlib.contextmanager
def _quiet(what: str, unit: str):
    yield lambda *_, **__: None


def _steps(workdir: Path, asked: int | None, out: Console) -> int:
    """The steps to train: those of the run that is there, unless others are asked for, which is refused before any work."""
    kept = workdir / "run"
    if not (kept / "config.json").exists():
        return STEPS if asked is None else asked
    there = read_json(kept / "config.json", "run")["config"]["steps"]
    if asked not in (None, there):
        raise MismatchError(f"{kept} holds a run of {there} steps, not {asked}; delete {kept}, or choose another --workdir")
    if there != STEPS:
        out.print(f"{kept} holds a run of {there} steps, which is kept; for the usual {STEPS} delete {kept} and run this again")
    return there


def _next(out: Console, model: Path, audio: Path) -> None:
    """Print commands that work when they are typed as they are."""
    w2s, model, audio = program("w2s"), shlex.quote(str(model)), shlex.quote(str(audio))
    out.print("\nNext:", style="bold")
    for command in (
        f"{w2s} predict {model} {audio} --window 2 --hop 0.5",
        f"{w2s} predict {model} YOUR.wav --window 2 --hop 0.5",
        f"{w2s} bank build YOUR_FOLDER --out bank        (then views draw, label, train, eval, export: see the README)",
    ):
        out.print(f"  {command}", soft_wrap=True, markup=False, highlight=False)


def _median_milliseconds(predictor: Predictor, runs: int = 15) -> float:
    wave = np.random.default_rng(0).standard_normal(5 * SAMPLING_RATE).astype(np.float32)
    predictor(wave)
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        predictor(wave)
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times))


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
