"""``w2s bank`` and ``w2s views``."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from w2s_jax import SAMPLING_RATE
from w2s_jax.cli.options import GROUP, Json, finite, parse_numbers
from w2s_jax.cli.progress import Reporter, finish, out
from w2s_jax.errors import UsageError, W2SError

bank_app = typer.Typer(name="bank", help="Decode a corpus once into a bank of 16 kHz samples.", **GROUP)
views_app = typer.Typer(name="views", help="Draw views: recipes for exact pieces of audio.", **GROUP)


@bank_app.command("build")
def build_bank(
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE", help="Folders of audio, a CSV file, or a corpus's root.")],
    into: Annotated[Path, typer.Option("--out", help="The bank's directory.")],
    corpus: Annotated[
        Literal["folder", "csv", "msp-podcast", "iemocap"], typer.Option(help="What the sources are.")
    ] = "folder",
    split_by: Annotated[
        Literal["none", "folder"], typer.Option(help="folder: the first folder below SOURCE is never divided.")
    ] = "none",
    fractions: Annotated[
        str, typer.Option(help="Train, validation, test; for clips that the corpus gives no split.")
    ] = "0.7,0.15,0.15",
    seed: Annotated[int, typer.Option(help="Of the splits.")] = 0,
    leaks: Annotated[
        Literal["error", "drop"],
        typer.Option(help="Audio that the corpus has in two splits: refuse it, or leave it out of training."),
    ] = "error",
    force: Annotated[bool, typer.Option("--force", help="Build over a bank of other sources or options.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Decoding threads.", show_default="one a core")] = None,
    max_failures: Annotated[
        int | None, typer.Option(min=0, help="Stop when more files are unreadable.", show_default="never")
    ] = None,
    as_json: Json = False,
) -> None:
    """Decode SOURCE... into a bank: int16 16 kHz mono shards and clips.parquet.

    Run again with the same sources and options, it checks what is there and does only what is missing, damaged or changed.
    Clips that are of no use (unreadable, silent, or with an end
    that is beyond their file's) are listed in failures.csv and left out; the exit code is then 1. No speaker is ever in two
    splits, and no recording: copies of a file, and segments of one file, stay together.
    """
    from w2s_jax import audio, bank, corpora

    if split_by != "none" and corpus != "folder":
        raise UsageError(f"--split-by is for --corpus folder; {corpus} has its own splits and speakers")
    shares = parse_numbers(fractions, "--fractions", 3)
    clips = corpora.assign_splits(_read_sources(sources, corpus, split_by, leaks), shares, seed)
    origin = {
        "corpus": corpus,
        "sources": [audio.printable(os.path.abspath(source)) for source in sources],
        "split_by": split_by,
        "fractions": list(shares),
        "seed": seed,
    }
    with Reporter("decode", "clips") as reporter:
        about = bank.build(
            clips, into, corpus=corpus, origin=origin, force=force, workers=workers, max_failures=max_failures,
            progress=reporter.report,
        )  # fmt: skip
    minutes = about["samples"] / SAMPLING_RATE / 60
    splits = {name: int((bank.Bank(into).clips["split"] == name).sum()) for name in corpora.SPLITS}
    out.print(f"{into}: {about['clips']} clips, {minutes:.1f} minutes; " + ", ".join(f"{n} {s}" for s, n in splits.items()))
    failures = into / "failures.csv"
    if about["read_in_part"]:
        Reporter.message(
            f"w2s: warning: {about['read_in_part']} clips could be read in part only; they are in the bank, and listed in "
            f"{failures}"
        )
    finish({"bank": str(into), **about, "minutes": round(minutes, 2), "splits": splits}, as_json)
    if about["failures"]:
        raise W2SError(f"{about['failures']} of {len(clips)} clips cannot be used; they are listed in {failures}")


def _read_sources(sources: list[Path], corpus: str, split_by: str, leaks: str) -> list:
    """The clips of all sources; of several, each clip's name begins with its source's, for they may have files of one name."""
    from w2s_jax import corpora

    options = {"split_by": split_by} if corpus == "folder" else {}
    several, clips = len(sources) > 1, []
    for source in sources:
        read = corpora.read(corpus, source, leaks, **options)
        if several:
            read = [dataclasses.replace(clip, name=f"{source.resolve().name}/{clip.name}") for clip in read]
        clips += read
    return corpora.drop_leaks(clips) if several and leaks == "drop" else clips


@views_app.command("draw")
def draw_views(
    bank_path: Annotated[Path, typer.Argument(metavar="BANK", help="A directory that w2s bank build made.")],
    into: Annotated[Path, typer.Option("--out", help="The parquet file to write.")],
    per_clip: Annotated[int, typer.Option(min=1, help="Views of each training clip.")] = 4,
    eval_per_clip: Annotated[int, typer.Option(min=1, help="Views of each validation and test clip; clean and fixed.")] = 1,
    seconds: Annotated[
        str, typer.Option(help="Lengths of the views: of a clip, those that fit into it; repeated if it is shorter than all.")
    ] = "2,5",
    mix: Annotated[
        float, typer.Option(min=0, max=1, callback=finite, help="Share of training views that are mixtures of two clips.")
    ] = 0.5,
    gain_db: Annotated[str, typer.Option(help="Range of the gain of training views.")] = "-6,6",
    snr_db: Annotated[str, typer.Option(help="Range of the first clip's level over the second's in a mixture.")] = "0,20",
    min_seconds: Annotated[float, typer.Option(min=0, callback=finite, help="Shorter clips have no views.")] = 0.5,
    partners: Annotated[
        Literal["bank", "shard"],
        typer.Option(help="Where the second clip of a mixture is from; shard: nearby, for large banks on many devices."),
    ] = "bank",
    seed: Annotated[int, typer.Option(min=0, help="Of the random numbers.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace other views.")] = False,
    as_json: Json = False,
) -> None:
    """Draw views of every clip of BANK into a parquet table."""
    from w2s_jax import bank, corpora, views

    drawn = views.draw(
        bank.Bank(bank_path),
        per_clip=per_clip,
        eval_per_clip=eval_per_clip,
        seconds=parse_numbers(seconds, "--seconds"),
        mix=mix,
        gain_db=parse_numbers(gain_db, "--gain-db", 2, 200),
        snr_db=parse_numbers(snr_db, "--snr-db", 2, 200),
        min_seconds=min_seconds,
        partners=partners,
        seed=seed,
    )
    drawn.save(into, force=force)
    counts = {split: len(drawn.where(split)) for split in corpora.SPLITS}
    mixed = int((drawn.columns["partner"] >= 0).sum())
    lengths = {f"{s:g}": int((drawn.columns["samples"] == round(s * SAMPLING_RATE)).sum()) for s in drawn.about["seconds"]}
    short = drawn.about["clips_too_short"]
    out.print(
        f"{into}: {len(drawn)} views ({', '.join(f'{n} {s}' for s, n in counts.items())}), "
        f"{', '.join(f'{n} of {s} s' for s, n in lengths.items())}, {mixed} of them mixtures"
        + (f"; {short} clips are shorter than {min_seconds} s and have none" if short else "")
    )
    result = {"views": str(into), "count": len(drawn), **counts, "seconds": lengths, "mixtures": mixed}
    finish(result | {"clips_too_short": short}, as_json)
