"""What commands print: results on stdout, progress and messages on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# no markup and no emoji: a path may have brackets and colons in it
out, err = (
    Console(stderr=stderr, soft_wrap=True, highlight=False, markup=False, emoji=False) for stderr in (False, True)
)  # fmt: skip


class Reporter:
    """Reports the progress of a job, and messages: a live bar on a terminal, elsewhere a line every ten seconds.

    It is a context manager; ``report`` is called inside.

    Args:
        job: what is done: "decode".
        unit: what is counted: "clips".
        brief: leave nothing of the bar behind, and print no line for a job of less than ten seconds.
        quiet: show messages only.

    Attributes:
        initial: what was done already at the first report; None before it.
    """

    def __init__(self, job: str, unit: str, brief: bool = False, quiet: bool = False) -> None:
        self.initial: int | None = None
        self._job, self._unit, self._brief, self._quiet = job, unit, brief, quiet
        self._figures: dict[str, float] = {}
        self._bar = _make_bar(transient=brief) if err.is_terminal and not quiet else None

    def __enter__(self) -> Reporter:
        self._began = time.monotonic()
        self._printed = (self._began if self._brief else 0.0, None, "")  # when, and what: done, figures
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self._job, total=None, figures="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def report(self, done: int, total: int, **figures: float) -> None:
        """Show that ``done`` of ``total`` units are done; each of the figures is shown until it has another value."""
        if self.initial is None:
            self.initial, self._first = done, time.monotonic()
        self._figures |= figures
        text = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in self._figures.items())
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, figures=text)
        elif not self._quiet:
            self._print(done, total, text)

    def _print(self, done: int, total: int, figures: str) -> None:
        now, (printed, *before) = time.monotonic(), self._printed
        early = now - printed < 10 and (done < total or (self._brief and before[0] is None))
        if early or (done == before[0] and (done == total or figures == before[1])):
            return
        self._printed = (now, done, figures)
        rate = (done - self.initial) / max(now - self._first, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if done < total and rate > 0 else ""
        line = f"{self._job}: {done}/{total} {self._unit}, {figures + ', ' if figures else ''}{now - self._began:.0f} s{left}"
        print(line, file=sys.stderr, flush=True)

    @staticmethod
    def message(line: str, style: str | None = None) -> None:
        """Print a line on stderr, above the bar if there is one."""
        err.print(line, style=style)


def _make_bar(transient: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # rich would send what is printed meanwhile to stderr, even results that are piped into a file
    return Progress(*columns, console=err, transient=transient, redirect_stdout=out.is_terminal)


def finish(result: dict, as_json: bool) -> None:
    """Print the machine-readable last line, if asked for."""
    if as_json:
        print(to_json(result), flush=True)


def to_json(value: object, **layout: object) -> str:
    """JSON that stdout can hold: all ASCII unless stdout is UTF-8 and no file name has stray bytes."""
    text = json.dumps(value, ensure_ascii=False, **layout)
    utf8 = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
    return text if utf8 and not any("\ud800" <= character <= "\udfff" for character in text) else json.dumps(value, **layout)


def print_error(message: object) -> None:
    """Print the one line that an error is on stderr."""
    with contextlib.suppress(OSError):  # nobody is left to read it
        print(f"w2s: error: {one_line(message)}", file=sys.stderr)


def one_line(message: object) -> str:
    """A message without line breaks."""
    return " ".join(str(message).split())
