"""``w2s quickstart``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from w2s_jax.cli.options import HugePages, Json, require
from w2s_jax.cli.progress import Reporter, finish, out

app = typer.Typer()


@app.command(cls=HugePages)
def quickstart(
    workdir: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("quickstart"),
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Training steps; fewer are quicker and worse.", show_default="320, or those of a run there"),
    ] = None,
    as_json: Json = False,
) -> None:
    """The whole pipeline on generated speech: minutes on a laptop, no network, no system package."""
    # one message for all of it, not one after the other
    require("all", "jax", "librosa", "matplotlib", "pyarrow", "tensorflow", "tf2onnx", "espeakng_loader")
    from w2s_jax.quickstart import run

    finish(run(workdir, out, Reporter, steps), as_json)
