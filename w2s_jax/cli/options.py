"""Options that several commands share, and what is made of them."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.core import TyperCommand

from w2s_jax.cli.progress import Reporter
from w2s_jax.errors import UsageError, missing_extra

#: Settings of every group of commands.
GROUP = {"no_args_is_help": True, "context_settings": {"help_option_names": ["-h", "--help"]}}

Json = Annotated[bool, typer.Option("--json", help="End stdout with one line of JSON.")]
Split = Literal["train", "validation", "test"]

# options of every command that loads a teacher
Dimensions = Annotated[str | None, typer.Option("--dimensions", help="Names of an onnx: teacher's outputs, commas between.")]
Output = Annotated[
    str | None,
    typer.Option(
        "--output", metavar="NAME", help="Which output to use, if an onnx: teacher has several.", show_default="logits"
    ),
]
CheckpointDir = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint-dir",
        help="Where the teacher's files lie; for paper, with folders wav2vec2 and wavlm.",
        show_default="the Hugging Face hub",
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option("--dtype", help="What paper, wavlm and wav2vec2 compute in.", show_default="float32"),
]
Normalisation = Annotated[
    Literal["official", "paper"] | None,
    typer.Option(
        "--normalisation", help="Of the waveform for WavLM.", show_default="paper for paper, official for wavlm"
    ),
]  # fmt: skip
Revision = Annotated[
    str | None, typer.Option("--revision", help="Of the checkpoint; named so, it need not give the published reference value.")
]

# options of every command that can be one of several processes
Distributed = Annotated[
    bool, typer.Option("--distributed", help="Join the other hosts of a TPU slice or a Slurm job through jax.distributed.")
]
Coordinator = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Join through this host, with --processes and --process.")
]
Processes = Annotated[int | None, typer.Option(min=1, help="How many processes there are.")]
Process = Annotated[int | None, typer.Option(min=0, help="Which of them this one is, from 0.")]


class HugePages(TyperCommand):
    """A command that starts itself again once its options are read, with a malloc that asks for huge pages.

    A training step on a CPU, or a batch of a Transformer, allocates and frees a gigabyte; most of what this costs is page
    faults, and glibc reads the setting only when a process starts (measured: experiments/README.md).

    The context's ``obj`` says whether the process is the command's own and may be replaced.
    """

    def __init__(self, *args, **kwargs) -> None:
        about = "On Linux it starts itself again with GLIBC_TUNABLES=glibc.malloc.hugetlb=1, which is faster, unless it is set."
        super().__init__(*args, **kwargs | {"epilog": about})

    def invoke(self, ctx):
        """Start the process again, or run the command."""
        if ctx.obj and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
            os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
            with contextlib.suppress(OSError):
                os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        return super().invoke(ctx)


def finite(value: float | None) -> float | None:
    """A callback of options: infinity and NaN pass every range."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"expected a number, got {value}")
    return value


def parse_numbers(text: str, name: str, count: int | None = None, most: float = 86400) -> tuple[float, ...]:
    """Numbers from -most to most with commas between them; ``name`` is the option."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or (count is not None and len(values) != count):
        raise UsageError(f"{name} takes {count or 'some'} numbers with commas between them, got {text!r}")
    if not all(-most <= value <= most for value in values):
        raise UsageError(f"{name} takes numbers from {-most:g} to {most:g}, got {text!r}")
    return values


def load_teacher(name: str, checkpoint_dir, dimensions: str | None, dtype, normalisation, revision, output: str | None):
    """Load a teacher from the options of a command."""
    from w2s_jax import teachers

    Reporter.message(f"loading teacher {name}")
    return teachers.load(
        name,
        checkpoint_dir,
        tuple(dimensions.split(",")) if dimensions else None,
        dtype=dtype,
        normalisation=normalisation,
        revision=revision,
        output=output,
    )


def join_processes(distributed: bool, coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Make this process one of several for JAX, if asked to."""
    explicit = (coordinator, processes, process)
    if any(value is not None for value in explicit):
        if None in explicit:
            raise UsageError("--coordinator, --processes and --process go together")
        if process >= processes:
            raise UsageError(f"--process counts from 0: with --processes {processes} it is at most {processes - 1}")
    elif not distributed:
        return
    from w2s_jax import parallel

    parallel.join(*explicit)


def require(extra: str, *modules: str) -> None:
    """Refuse to start a command that needs a larger extra than its missing modules alone would.

    Raises:
        UsageError: a module is not installed; names the extra.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise missing_extra(module, extra)
