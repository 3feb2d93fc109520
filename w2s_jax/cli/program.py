"""The program ``w2s``: its commands and its exit codes.

Exit codes: 0 done, 1 the work failed, 2 wrong usage, 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import codecs
import contextlib
import inspect
import io
import logging
import os
import sys
import warnings
from typing import Annotated

import typer
from typer.core import TyperGroup

from w2s_jax import __version__
from w2s_jax.cli import data, model, predict, quickstart, teach, train
from w2s_jax.cli.options import GROUP
from w2s_jax.cli.progress import one_line, print_error
from w2s_jax.errors import W2SError, missing_extra
from w2s_jax.install import extra_of

#: The order of the commands in the help: that of the pipeline.
ORDER = ("quickstart", "bank", "views", "teacher", "label", "train", "eval", "export", "predict", "bench")

#: The base of all usage errors; typer has its own copy of click since some release and does not export this class.
ClickError = typer.BadParameter.__base__.__base__


class _Ordered(TyperGroup):
    """Lists its commands in the order of the pipeline."""

    def list_commands(self, ctx) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)


def _unwrap(text: str) -> str:
    """Join the lines of each paragraph of a docstring, for help that fills the terminal; one that begins with \\b stays."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(part if part.startswith("\b") else " ".join(part.split()) for part in paragraphs)


app = typer.Typer(
    name="w2s",
    cls=_Ordered,
    help="Speech emotion on tiny hardware: distil a large teacher into a 72K-parameter network, run it anywhere.",
    add_completion=False,
    rich_markup_mode="rich",
    **GROUP,
)
for _group in (quickstart.app, data.bank_app, data.views_app, teach.teacher_app, teach.app, train.app, model.app, predict.app):
    for _command in _group.registered_commands:
        _command.help = _unwrap(_command.callback.__doc__ or "")  # none under python -OO
    app.add_typer(_group)


def _print_version(value: bool) -> None:
    if value:
        print(f"w2s {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass  # main takes --debug out of the arguments, wherever it stands; here it is for the help


def entry() -> None:
    """Run the command in ``sys.argv`` in a process of its own: the console script."""
    # transformers would import every framework that it finds, for its Flax modules
    os.environ |= {"USE_TORCH": "0", "USE_TF": "0", **os.environ}
    main(replaceable=True)


def main(replaceable: bool = False) -> None:
    """Run the command in ``sys.argv``; an error is one line on stderr and an exit code.

    Args:
        replaceable: the process runs nothing else: ``HugePages`` may start it again.
    """
    _standard_streams()
    # --debug may stand anywhere among the options, of which there are none after "--"
    arguments = sys.argv[1:]
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in options
    arguments = [option for option in options if option != "--debug"] + arguments[len(options) :]
    if not debug:
        warnings.showwarning = lambda message, *_, **__: print(f"w2s: warning: {one_line(message)}", file=sys.stderr)
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where no home can be written it warns in three lines
    try:
        code = app(arguments, standalone_mode=False, prog_name="w2s", obj=replaceable) or 0
        if code == 130:  # typer has caught the KeyboardInterrupt without a message
            raise KeyboardInterrupt
        sys.stdout.flush()  # here, where a full disk or a closed pipe can still be reported
    except (ClickError, typer.Abort, KeyboardInterrupt, BrokenPipeError) as error:
        code = _report(error)
    except Exception as error:
        if debug:
            raise
        code = _report(error)
    try:
        sys.stdout.flush()
    except OSError:  # the rest cannot be written; Python would try once more at exit, and print a traceback
        _discard(sys.stdout)
    sys.exit(code)


def _report(error: BaseException) -> int:
    """Print the one line about an error; returns the exit code."""
    if isinstance(error, BrokenPipeError):
        return 1  # the reader has gone (| head); nobody would read an error
    if type(error).__name__ == "NoArgsIsHelpError":
        return 2  # the help is printed already
    if isinstance(error, ClickError):
        where = f" (see {error.ctx.command_path} --help)" if getattr(error, "ctx", None) else ""
        message = error.format_message().rstrip(".").replace(": Value error, ", ": ")  # pydantic's word, for typer
        message, code = f"{message}{where}", 2
    elif isinstance(error, typer.Abort | KeyboardInterrupt):
        message, code = "stopped", 130
    elif isinstance(error, ModuleNotFoundError) and (extra := extra_of(error.name or "")):
        message, code = missing_extra(error.name, extra), 2
    elif isinstance(error, W2SError):
        message, code = error, error.exit_code
    elif isinstance(error, UnicodeEncodeError):  # of libraries that take only UTF-8: pyarrow, orbax
        name = ascii(error.object[:300])
        message, code = f"{name} is not valid UTF-8, as a file here has to be named; choose another name", 2
    elif isinstance(error, OSError | MemoryError):
        message, code = f"{type(error).__name__}: {error}", 1
    else:
        about = f"unexpected {type(error).__name__}: {one_line(error)[:300]}"
        message, code = f"{about} (a fault of w2s {__version__}: please report it with what --debug shows)", 1
    print_error(message)
    return code


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
