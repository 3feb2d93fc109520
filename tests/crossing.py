"""One end of a crossing between two versions of JAX: test_crossing.py runs this with either interpreter.

    python crossing.py train DATA WORKDIR [STEP]      train on DATA's bank, views.parquet and labels; SIGTERM after STEP steps
    python crossing.py predict STUDENT OUT.npz        what Flax says about two waves: arrays waves [2, T], logits [2, D]

Both print the version of JAX.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import jax
import numpy as np

from w2s_jax import checkpoint, config
from w2s_jax.bank import Bank
from w2s_jax.errors import W2SError
from w2s_jax.labels import Labels
from w2s_jax.train import train
from w2s_jax.views import Views

STEPS = 12
SETTINGS = ["fields.channels=3", f"steps={STEPS}", "batch_size=8", "eval_every=4", "log_every=1"]


def run(data: Path, workdir: Path, stop: int | None) -> None:
    def progress(done, *_, **__):
        if done == stop:
            signal.raise_signal(signal.SIGTERM)

    table = Views.read(data / "views.parquet")
    train(
        config.load("wav2small", SETTINGS), Bank(data / "bank"), table, Labels.read(data / "labels", table), workdir,
        progress=progress,
    )  # fmt: skip


def predict(student: Path, out: Path) -> None:
    module, variables, _ = checkpoint.load_student(student)
    waves = (0.1 * np.random.default_rng(0).standard_normal((2, 16_000))).astype(np.float32)
    np.savez(out, waves=waves, logits=np.asarray(module.apply(variables, waves)))


def main(task: str, *arguments: str) -> int:
    print(jax.__version__)
    if task == "predict":
        predict(*map(Path, arguments))
        return 0
    data, workdir, *stop = arguments
    try:
        run(Path(data), Path(workdir), int(stop[0]) if stop else None)
    except W2SError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
