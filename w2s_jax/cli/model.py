"""``w2s export`` and ``w2s bench``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from w2s_jax.cli.options import Json, finite, require
from w2s_jax.cli.progress import Reporter, finish, out
from w2s_jax.errors import UsageError, W2SError
from w2s_jax.kinds import FILES

app = typer.Typer()

#: What --kind of export takes. An enum, as typer has no lists of a Literal.
Kinds = StrEnum("Kinds", {kind: kind for kind in (*FILES, "all")})


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
        typer.Option("--min-ccc", callback=finite, help="Least CCC with fp32, in every dimension, of a kind that rounds."),
    ] = 0.99,
    weight_bits: Annotated[
        Literal["7", "8"],
        typer.Option(help="Of eight-bit kinds' weights; 8 only for ARM and x86 with VNNI: elsewhere their sums overflow."),
    ] = "7",
    measure: Annotated[
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
    int8       computes in 8 bits; Wav2Small students with onnxruntime's own operators: small and fastest there
    qdq        computes in 8 bits with standard operators: for OpenVINO and others
    int8-int4  int8 with the pooling's weights in 4 bits: smallest; Wav2Small only
    litert     fp32 as TensorFlow Lite file; litert-int8 with weights of 8 bits
    chunked    fp32 for recordings of any length, piece by piece; Wav2Small only
    c          fp32 as C99, for any CPU: whole recordings and streams, no runtime; Wav2Small only
    c-int8     c in 8 bits, the same bits on every CPU: microcontrollers
    wasm       WebAssembly with weights of 8 bits, and an ES module: pages, workers, node; needs ziglang; Wav2Small only
    all        all that this student can have

    fp32, litert, chunked and c are compared with Flax on lengths from 64 samples to 60 s, the others with fp32 on validation
    audio. A kind that is not good enough is left out, with a warning and exit code 1; if fp32 is not, nothing is written.
    """
    if not run.is_dir():
        raise UsageError(f"no run at {run}: no such directory")
    if against is not None and not measure:
        raise UsageError("--against asks for a measurement, --no-measure for none; leave one of them out")
    require("export", "jax", "flax")
    from w2s_jax.export import export_student

    audio = {}
    if calibration is not None:
        from w2s_jax.bank import Bank

        bank = Bank(calibration)
        audio = {"calibration": bank.excerpts("train", 64, 5.0), "check": bank.excerpts("validation", 128, 5.0)}
    result = export_student(
        run,
        into,
        **audio,
        message=Reporter.message,
        min_ccc=min_ccc,
        kinds=[kind.value for kind in kinds] if kinds else None,
        weight_bits=int(weight_bits),
        measure=measure,
        against=against,
    )
    (out if out.is_terminal else Console(width=120)).print(_tabulate_kinds(result))
    out.print(f"model directory: {into}")
    finish({"model": str(into), **result}, as_json)
    if failed := result["failed"]:  # the warnings have given the reasons
        all_kinds = len(result["kinds"]) + len(failed)
        raise W2SError(f"{len(failed)} of {all_kinds} kinds not written: {', '.join(failed)}; {into} has the others")


def _tabulate_kinds(report: dict) -> Table:
    """The table of the kinds in what ``export_student`` returns."""
    table = Table()
    for at, heading in enumerate(("kind", "file", "kB", "CCC with fp32", "ms for 5 s", "ratio", "peak MB")):
        table.add_column(heading, justify="right" if at > 1 else "left", no_wrap=True)
    for kind, row in report["kinds"].items():
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
    for kind in report["failed"]:
        table.add_row(kind, "not written")
    return table


@app.command()
def bench(
    students: Annotated[
        list[str] | None, typer.Argument(metavar="STUDENT", help="Made with random weights; default: all, if no --model.")
    ] = None,
    models: Annotated[
        list[Path] | None,
        typer.Option("--model", metavar="FILE", help="A model directory (all its kinds) or any .onnx file; repeatable."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A reference model (.onnx): every row gets the ratio of its time to that file's."),
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
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, callback=finite, help="Length of the audio.")] = 5.0,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of each file; they take turns.")] = 30,
    threads: Annotated[int, typer.Option(min=1, help="Of the engine.")] = 1,
    as_json: Json = False,
) -> None:
    """Measure models on this machine: parameters, MACs, size, peak memory, time for 5 s; beside what the paper says.

    Peak memory is that of a fresh process above one that runs an empty model. Students need the extra "export"; --model alone
    needs nothing but the base install, where MACs stay uncounted. OpenVINO (extra "openvino") computes in float32, which is not
    its default on every CPU, and leaves out files with operators that only onnxruntime has.
    """
    from w2s_jax import bench as benchmark
    from w2s_jax import machine

    if students or not models:
        require("export", "jax", "flax")
    if not students and not models:
        from w2s_jax.models import STUDENTS

        students = list(STUDENTS)
    if settings and not students:
        raise UsageError("--set is for the students' fields; a model file has none")
    with Reporter("measure", "runs") as reporter:
        table = benchmark.bench(
            students or [],
            models or [],
            into,
            fields=_parse_fields(students[0], settings) if settings else {},
            seconds=seconds,
            runs=runs,
            threads=threads,
            against=against,
            engines=engines,
            message=reporter.message,
            progress=reporter.report,
        )
    used = machine.describe({row["engine"] for row in table})
    out.print(f"{seconds:g} s of audio, {threads} thread{'s' * (threads > 1)}; {used}")
    width = out.width if out.is_terminal else 180  # a file or a pipe has no width of its own
    (out if out.is_terminal else Console(width=width)).print(_tabulate_costs(table, width))
    out.print(f"{'students have random weights; ' if students else ''}RTF is time divided by the length of the audio")
    if against:
        out.print(f"ratio: time divided by that of {against} in onnxruntime, the median of pairs")
    out.print(f"files: {', '.join(str(path) for path in sorted(into.glob('bench.*')))}")
    finish({"out": str(into), "rows": table}, as_json)


def _parse_fields(student: str, settings: list[str]) -> dict:
    """Fields of a student from KEY=VALUE."""
    from w2s_jax import config

    return config.load(student, [f"fields.{setting}" for setting in settings]).fields.to_dict()


def _tabulate_costs(rows: list[dict], width: int) -> Table:
    """The table of what ``bench`` returns; narrow ones without the columns that bench.md has as well."""
    from w2s_jax.bench import format_row, headings

    table, names = Table(), headings(rows[0])
    left_out = ["paper says"] * (width < 150) + ["parameters", "p95", "RTF"] * (width < 110)
    columns = [at for at, name in enumerate(names) if name not in left_out]
    for at in columns:
        words = names[at] in ("model", "kind", "engine", "paper says")
        table.add_column(names[at], justify="left" if words else "right", no_wrap=True)
    for row in rows:
        cells = format_row(row)
        table.add_row(*(cells[at] for at in columns))
    return table
