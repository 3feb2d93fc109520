"""``w2s label`` and ``w2s teacher``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from w2s_jax.cli import options as o
from w2s_jax.cli.progress import Reporter, finish, out
from w2s_jax.errors import UsageError, W2SError

app = typer.Typer()
teacher_app = typer.Typer(name="teacher", help="Look at a teacher before it labels.", **o.GROUP)


@app.command(cls=o.HugePages)
def label(
    bank_path: Annotated[Path, typer.Argument(metavar="BANK")],
    views_path: Annotated[Path, typer.Argument(metavar="VIEWS")],
    teacher: Annotated[str, typer.Option(metavar="NAME", help="paper | wavlm | wav2vec2 | acoustic | dnsmos | onnx:FILE")],
    into: Annotated[Path, typer.Option("--out", help="The labels' directory.")],
    dimensions: o.Dimensions = None,
    output: o.Output = None,
    checkpoint_dir: o.CheckpointDir = None,
    dtype: o.Dtype = None,
    normalisation: o.Normalisation = None,
    revision: o.Revision = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Views of one length in a batch on each device; a power of two wastes nothing.")
    ] = 16,
    distributed: o.Distributed = False,
    coordinator: o.Coordinator = None,
    processes: o.Processes = None,
    process: o.Process = None,
    force: Annotated[bool, typer.Option("--force", help="Replace labels of another teacher or other views.")] = False,
    as_json: o.Json = False,
) -> None:
    """Let a teacher label every view. Run again after an interruption, it goes on where it was.

    Started several times with the same --out, on one machine or on several that share a file system, the processes share the
    work shard by shard, without further options. --distributed is for machines whose JAX must know all hosts (TPU slices).
    """
    from w2s_jax import bank, labelling, teachers
    from w2s_jax.views import Views

    o.join_processes(distributed, coordinator, processes, process)
    the_bank, the_views = bank.Bank(bank_path), Views.read(views_path)
    the_teacher = o.load_teacher(teacher, checkpoint_dir, dimensions, dtype, normalisation, revision, output)
    began = time.perf_counter()
    with Reporter("label", "views") as reporter:
        about = labelling.label(
            the_bank, the_views, the_teacher, into, batch_size=batch_size, force=force, progress=reporter.report
        )
    seconds, before = time.perf_counter() - began, reporter.initial
    earlier = f", {'all' if before == about['count'] else before} of them earlier" if before else ""
    out.print(f"{into}: {about['count']} views labelled by {the_teacher.name} ({', '.join(the_teacher.dimensions)}){earlier}")
    out.print(f"  licence that a student inherits: {the_teacher.licence}")
    if teachers.attribute(the_teacher, "stand_in"):
        out.print("  this teacher is a stand-in: its values only imitate arousal, dominance and valence", style="yellow")
    finish({"labels": str(into), **about, "seconds": round(seconds, 1)}, as_json)


@teacher_app.command("check", cls=o.HugePages)
def check_teacher(
    teacher: Annotated[str, typer.Argument(metavar="NAME", help="paper | wavlm | wav2vec2 | acoustic | dnsmos | onnx:FILE")],
    dimensions: o.Dimensions = None,
    output: o.Output = None,
    checkpoint_dir: o.CheckpointDir = None,
    dtype: o.Dtype = None,
    normalisation: o.Normalisation = None,
    revision: o.Revision = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Views in a batch on each device.")] = 4,
    seconds: Annotated[float, typer.Option(min=0.05, max=3600, callback=o.finite, help="Length of a view.")] = 5.0,
    bank_path: Annotated[
        Path | None, typer.Option("--bank", help="Compare --dtype bfloat16 with float32 on 32 clips of this bank.")
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Load a teacher: its parameters, licence, golden check, and how fast it labels on this machine."""
    from w2s_jax import teachers

    if bank_path is not None and dtype != "bfloat16":
        raise UsageError("--bank goes with --dtype bfloat16: it shows what that changes in the labels")
    waves = None
    if bank_path:  # the acoustic teacher alone needs only the base install
        from w2s_jax.bank import Bank

        waves = Bank(bank_path).excerpts("train", 32, seconds)
    the_teacher = o.load_teacher(teacher, checkpoint_dir, dimensions, dtype, normalisation, revision, output)
    result = teachers.check(the_teacher, batch_size, seconds)
    if waves is not None:
        exact = o.load_teacher(teacher, checkpoint_dir, dimensions, "float32", normalisation, revision, output)
        result["bfloat16"] = teachers.compare(the_teacher, exact, waves)
    out.print(_tabulate(the_teacher, result, batch_size, seconds))
    finish(result, as_json)
    if result["doubt"]:
        raise W2SError(result["doubt"])


def _tabulate(teacher, result: dict, batch_size: int, seconds: float) -> Table:
    """The table of a teacher from what ``teachers.check`` has measured."""
    table = Table(title=f"teacher {teacher.name}", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("dimensions", ", ".join(teacher.dimensions))
    table.add_row("licence", teacher.licence)
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
    return table
