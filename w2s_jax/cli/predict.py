"""``w2s predict``."""

from __future__ import annotations

import contextlib
import csv
import io
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from w2s_jax import SAMPLING_RATE
from w2s_jax.cli.options import Json
from w2s_jax.cli.progress import Reporter, finish, out, print_error, to_json
from w2s_jax.errors import UsageError, W2SError
from w2s_jax.kinds import FILES

app = typer.Typer()
#: Seconds of audio that are predicted in one piece unless windows are asked for; memory grows with the length.
WHOLE_FILE = 60.0
#: Seconds in the longest window; several hours would not fit into the memory of most machines.
LONGEST = 3600.0


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model directory or an .onnx file.")],
    sources: Annotated[
        list[Path], typer.Argument(metavar="AUDIO|FOLDER|-", help="Audio files, folders of them, - for a file on stdin.")
    ],
    window: Annotated[
        float | None, typer.Option(help="Seconds in a window.", show_default="whole file; 10 beyond a minute")
    ] = None,
    hop: Annotated[float | None, typer.Option(help="Seconds from window to window.", show_default="the window")] = None,
    form: Annotated[
        Literal["table", "json", "jsonl", "csv"], typer.Option("--format", help="Of the rows on stdout.")
    ] = "table",
    kind: Annotated[Literal[*FILES] | None, typer.Option(help="Which file of a model directory.", show_default="fp32")] = None,
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
    predictor = Predictor(model, kind=kind, threads=threads)
    with tempfile.TemporaryDirectory(prefix="w2s-") as temporary:
        files = _audio_files(sources, Path(temporary))
        if stand_in := predictor.metadata.get("stand_in") == "true":
            Reporter.message(
                f"w2s: note: {model} learned from a stand-in for a teacher: its values show that all works, nothing else",
                style="yellow",
            )
        writer, failures = _RowWriter(form, predictor.dimensions), 0
        # rows that appear on the terminal one by one are progress enough, and would run into the bar
        quiet = form in ("csv", "jsonl") and out.is_terminal
        with Reporter("predict", "files", brief=True, quiet=quiet) as reporter, writer:
            for number, (name, path) in enumerate(files):
                try:
                    with _named(name, path):
                        for start, end, values in _predict_file(predictor, path, window, hop):
                            writer.write(name, start, end, values)
                            reporter.report(number, len(files), rows=writer.rows)
                except W2SError as error:
                    failures += 1
                    print_error(error)
                reporter.report(number + 1, len(files), rows=writer.rows)
    result = {"model": str(model), "files": len(files), "failures": failures, "rows": writer.rows}
    finish(result | ({"stand_in": True} if stand_in else {}), as_json)
    if failures:
        if len(files) == 1:  # its error is printed already
            raise typer.Exit(1)
        raise W2SError(f"{failures} of {len(files)} files could not be predicted")


def _audio_files(sources: list[Path], temporary: Path) -> list[tuple[Path, Path]]:
    """(the user's name, path) of each audio file that the command line names; standard input is spooled to ``temporary``."""
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
def _named(name: Path, path: Path) -> Iterator[None]:
    """Have errors and warnings about ``path`` name the file as the user does."""
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


def _predict_file(
    predictor, path: Path, window: float | None, hop: float | None
) -> Iterator[tuple[float, float, dict[str, float]]]:
    """(start, end, values) of a file, or of each of its windows; start and end in seconds."""
    from w2s_jax import audio

    if window is None and audio.duration(path) <= WHOLE_FILE:
        wave = audio.load(path)
        yield 0.0, len(wave) / SAMPLING_RATE, predictor(wave)
        return
    window = window or 10.0
    yield from predictor.windows(audio.blocks(path), SAMPLING_RATE, window, hop or window)


class _RowWriter:
    """Writes rows of predictions to stdout: csv and jsonl one by one, table and json at the end, even of a job cut short."""

    def __init__(self, form: str, dimensions: Sequence[str]) -> None:
        self.rows = 0
        self._form, self._dimensions, self._pending = form, dimensions, []
        if form == "csv":
            self._write_csv("file", "start", "end", *dimensions)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self._form == "json":
            print(to_json(self._pending, indent=1))
        elif self._form == "table" and self._pending:
            table = Table()
            table.add_column("file", overflow="fold")
            for name in ("start", "end", *self._dimensions):
                table.add_column(name, justify="right")
            for row in self._pending:
                figures = [f"{row['start']:.2f}", f"{row['end']:.2f}", *(f"{row[name]:.3f}" for name in self._dimensions)]
                table.add_row(row["file"], *figures)
            out.print(table)

    def write(self, path: Path, start: float, end: float, values: dict[str, float]) -> None:
        from w2s_jax.audio import printable

        # times to the sample: the last window, aligned with the end, may begin right after the one before
        row = {"file": printable(path), "start": round(start, 6), "end": round(end, 6)}
        row |= {name: round(float(value), 6) for name, value in values.items()}
        self.rows += 1
        if self._form == "jsonl":
            print(to_json(row), flush=True)
        elif self._form == "csv":
            self._write_csv(*row.values())
        else:
            self._pending.append(row)

    def _write_csv(self, *values: object) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(values)
        print(line.getvalue(), end="", flush=True)
