"""Make artifacts/, a small bank, views, labels, run and model directory, and artifacts.npz, their values.

    python tests/golden/artifacts.py tests/golden

Made once, by the version that artifacts/run/config.json names, and kept: what users stored then has to be readable now
(tests/test_formats.py). Made again, they would only show that today's code reads what today's code writes.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import RATE, voice

from w2s_jax import bank as banks
from w2s_jax import config, corpora, labelling, render, teachers, train, views
from w2s_jax.export import export_student
from w2s_jax.labels import Labels
from w2s_jax.runtime import Predictor

SECONDS = 0.25


def main(out: Path) -> None:
    place = out / "artifacts"
    shutil.rmtree(place, ignore_errors=True)
    with tempfile.TemporaryDirectory() as sources:
        rows = ["file,split,speaker,arousal,dominance,valence"]
        for number in range(6):
            wave = voice(0.4 + 0.05 * number, number, 90 + 20 * number)
            soundfile.write(f"{sources}/{number}.wav", wave * 0.1**number, RATE, subtype="FLOAT")
            rows.append(f"{number}.wav,{'train' if number < 4 else 'validation'},s{number},0.{number + 1},0.5,0.{9 - number}")
        table = Path(sources, "corpus.csv")
        table.write_text("\n".join(rows) + "\n")
        banks.build(corpora.read("csv", table), place / "bank", corpus="csv", origin={"corpus": "csv"})
    bank = banks.Bank(place / "bank")
    drawn = views.draw(bank, per_clip=2, eval_per_clip=2, seconds=(SECONDS,), mix=0.5)
    drawn.save(place / "views.parquet")
    labelling.label(bank, drawn, teachers.load("acoustic"), place / "labels")
    labels = Labels.read(place / "labels", drawn)
    settings = config.load("wav2small", ["steps=4", "eval_every=2", "batch_size=4", "fields.channels=2", "scan_steps=1"])
    train.train(settings, bank, drawn, labels, place / "run")
    shutil.rmtree(place / "run" / "tensorboard", ignore_errors=True)
    (place / "run" / "training.png").unlink(missing_ok=True)
    waves = [bank.wave(clip) for clip in range(len(bank))]
    export_student(
        place / "run", place / "model", calibration=waves * 3, check=waves, kinds=["int8", "chunked", "litert"], min_ccc=-1
    )
    for note in place.rglob("commit_success.txt"):  # names the directory that it was made in
        note.write_text(note.read_text().replace(str(out), "tests/golden"))
    for lock in place.rglob(".lock"):
        lock.unlink()
    probe = voice(1.0, 99)
    values = {
        "rendered": render.render_on_host(bank, drawn, np.arange(len(drawn))),
        "labels": labels.values,
        "probe": probe,
        **{
            f"predicted_{kind}": list(Predictor(place / "model", kind=kind)(probe).values())
            for kind in ("fp32", "int8", "chunked", "litert")
        },
    }
    np.savez_compressed(out / "artifacts.npz", **values)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
