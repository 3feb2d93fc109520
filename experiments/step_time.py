"""How long a training step takes on this machine, alone and inside a scan.

    python experiments/step_time.py [STUDENT...] [--batch 16] [--seconds 3] [--scan 2] [--form native direct]
        [--peer torch_wav2small.py [--compile]]

Several students, or several forms of a Wav2Small, are timed in turn, which gives the steps that each gets from one budget of
seconds. With ``--peer`` (a file with ``Wav2Small`` and ``ccc_loss``; needs torch), its eager step with Adam is timed in turn
with ours, in this process; with ``--compile`` that of ``torch.compile`` too. The ratios of the first of ours to all others are
printed, of medians. Results: experiments/README.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from w2s_jax import SAMPLING_RATE, models
from w2s_jax.train.step import initial_state, scan_steps, train_step


def ours(name: str, fields: dict, waves: np.ndarray, targets: np.ndarray, length: int):
    """A function that runs one dispatch of ``length`` steps of a student with AdamW on the same batch, and waits for it."""
    student = models.build(name, **fields)
    variables = jax.jit(student.init)(jax.random.key(0), waves[:1])
    optimizer = optax.adamw(1e-3)
    step = partial(train_step, student=student, frontend=variables["frontend"], optimizer=optimizer, l2=0.1, ema=0.98)
    run = jax.jit(lambda state, batches: scan_steps(step, state, batches))
    state = initial_state(variables, optimizer)
    batches = jnp.stack([waves] * length), jnp.stack([targets] * length)
    return lambda: jax.block_until_ready(run(state, batches))


def theirs(path: Path, compiled: bool, waves: np.ndarray, targets: np.ndarray):
    """The same for the PyTorch peer: one step, eager or by ``torch.compile``."""
    import torch

    spec = importlib.util.spec_from_file_location("peer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.Wav2Small().train()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    predict = torch.compile(model) if compiled else model
    x, y = torch.from_numpy(waves), torch.from_numpy(targets)

    def step():
        optimiser.zero_grad()
        module.ccc_loss(predict(x), y).backward()
        optimiser.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="*", default=["wav2small"], metavar="STUDENT")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--scan", type=int, default=0, help="also time so many steps in one dispatch")
    parser.add_argument("--form", nargs="+", default=["auto"], help="of the students' convolutions; not all students have any")
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--compile", action="store_true", help="also time the peer's torch.compile")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    waves = rng.standard_normal((arguments.batch, round(arguments.seconds * SAMPLING_RATE))).astype(np.float32)
    targets = rng.standard_normal((arguments.batch, 3)).astype(np.float32)
    several = len(arguments.form) > 1
    ways = [
        (f"{name} {form}" if several else name, name, {} if form == "auto" else {"form": form})
        for name in arguments.students
        for form in arguments.form
    ]
    contestants = {label: (ours(name, fields, waves, targets, 1), 1) for label, name, fields in ways}
    first, *chosen = ways[0]
    if arguments.scan > 1:
        contestants["scan"] = (ours(*chosen, waves, targets, arguments.scan), arguments.scan)
    if arguments.peer:
        contestants["peer"] = (theirs(arguments.peer, False, waves, targets), 1)
    if arguments.peer and arguments.compile:
        contestants["peer compiled"] = (theirs(arguments.peer, True, waves, targets), 1)
    times = {name: [] for name in contestants}
    for run, _ in contestants.values():  # compilation, and the first touch of the memory
        run()
    for _ in range(arguments.runs):  # in turn, so that a drift of the machine hits all
        for name, (run, steps) in contestants.items():
            began = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - began) / steps)
    medians = {name: round(float(np.median(values)), 3) for name, values in times.items()}
    ratios = {f"{first}/{name}": round(medians[first] / medians[name], 2) for name in medians if name != first}
    print(json.dumps({"batch": arguments.batch, "seconds": arguments.seconds, "seconds_per_step": medians, **ratios}))


if __name__ == "__main__":
    main()
