"""How many clips a second a training step takes in on an accelerator, in every form and dtype, beside PyTorch.

Claim: training Wav2Small is bound by memory traffic, 104 MB per clip of 5 s in bfloat16 (64 MB were BatchNorm fused into its
neighbours). So bfloat16 is nearly twice as fast as float32; on a GPU no form of the convolutions is much faster than another,
on a TPU blocks are; and steps in one dispatch, from a bank on the device, cost no more than the bare step.

    python experiments/accelerator_speed.py [--batch 256] [--peer torch_wav2small.py] [--out speed.json]

Hardware: one GPU or TPU, or in small a CPU (``--batch 4 --seconds 1 --runs 2``). About 10 minutes, most of them compilation.
Expected on an H100 (3.35 TB/s): the bound is 32,000 clips/s of Wav2Small in bfloat16, 16,000 in float32; half of that would be
good. Not yet run on any accelerator.

Two kinds of steps are timed: "step", one dispatch of one step of a batch that lies on the device; and "scan", ``--steps`` steps
in one dispatch, each of which mixes its batch out of an int16 bank on the device, as ``w2s train`` does. Both are trained with
AdamW and the average of weights. With ``--peer`` (a file with ``Wav2Small`` and ``ccc_loss``; needs a torch that sees the same
device) its bare step with Adam is timed as well, eager and compiled: in float32, with TF32 (that is what JAX's float32 products
are on such a GPU; only the front end's are exact), and under bfloat16 autocast. All take turns in each run, and medians of the
runs are reported. What does not run is reported with its error, and the rest goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

# JAX and PyTorch share one GPU: by default JAX would take three quarters of its memory at its first use
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from w2s_jax import SAMPLING_RATE, models
from w2s_jax.errors import UsageError, W2SError
from w2s_jax.feed import DeviceFeed
from w2s_jax.files import write_json
from w2s_jax.models.forms import CHOICES, DTYPES
from w2s_jax.render import ROW, Recipe
from w2s_jax.train import initial_state, train_step, train_steps

#: GB/s of memory by what a device calls itself (a part of it); makers' data sheets.
BANDWIDTH = {
    "H100 PCIe": 2000,
    "H100 NVL": 3900,
    "H100": 3350,
    "H200": 4800,
    "A100-SXM4-80GB": 2039,
    "A100": 1555,
    "L4": 300,
    "TPU v4": 1228,
    "TPU v5 lite": 819,
    "TPU v5e": 819,
    "TPU v5p": 2765,
    "TPU v5": 2765,
    "TPU v6 lite": 1640,
    "TPU v6e": 1640,
}
#: MB that a step of Wav2Small moves per clip of 5 s: what XLA has to in bfloat16, twice that in float32, and in bfloat16 with
#: BatchNorm fused into its neighbours. By arithmetic: every activation that is written or read, forward and backward.
TRAFFIC = {"bfloat16": 104.0, "float32": 208.0, "fused bfloat16": 64.0}
#: Clips in the bank from which the scans take theirs.
CLIPS = 1024
#: Views in the table of recipes.
VIEWS = 4096


def bandwidth(kind: str) -> float | None:
    """GB/s of a device that calls itself ``kind``, or None where the table does not know it.

    >>> bandwidth("NVIDIA H100 80GB HBM3"), bandwidth("NVIDIA H100 PCIe"), bandwidth("cpu")
    (3350, 2000, None)
    """
    return next((speed for name, speed in BANDWIDTH.items() if name in kind), None)


def bounds(speed: float, seconds: float) -> dict[str, int]:
    """Clips/s of Wav2Small that ``speed`` GB/s of memory allow, clips of ``seconds``, by kind of ``TRAFFIC``.

    >>> bounds(3350, 5)["bfloat16"]
    32212
    """
    return {kind: round(1000 * speed / (megabytes * seconds / 5)) for kind, megabytes in TRAFFIC.items()}


def bank_on_device(samples: int) -> tuple[jax.Array, Recipe]:
    """A bank of noise, int16 [rows, ROW], ``CLIPS`` clips of ``samples``; and recipes of ``VIEWS`` views of it, half mixed."""
    rng = np.random.default_rng(0)
    rows = -(-CLIPS * samples // ROW)
    bank = rng.integers(-8192, 8192, (rows, ROW), np.int16)

    def place() -> list[np.ndarray]:  # row and column of the clip's begin, its length, and where in it the view begins
        clips = rng.integers(0, CLIPS, VIEWS)
        begin = np.divmod(clips * samples, ROW)
        return [*begin, np.full(VIEWS, samples), rng.integers(0, samples, VIEWS)]

    gain = np.ones(VIEWS, np.float32)
    level = np.where(np.arange(VIEWS) % 2, np.float32(0.3), np.float32(0))
    recipe = Recipe(*(column.astype(np.int32) for column in (*place(), *place())), gain, level)
    return jax.device_put(bank), jax.tree.map(jnp.asarray, recipe)


def ours(name: str, fields: dict, batch: int, samples: int, steps: int, bank, table) -> Callable[[], None]:
    """A function that runs one dispatch of training steps and waits for it: compiled, and run once.

    ``steps`` 0 is the bare step, of a batch on the device; otherwise so many steps in a scan, out of the bank.
    """
    rng = np.random.default_rng(0)
    student = models.build(name, **fields)
    variables = jax.jit(student.init)(jax.random.key(0), jnp.zeros((1, samples)))
    optimizer = optax.adamw(1e-3)
    how = {"student": student, "frontend": variables["frontend"], "optimizer": optimizer, "l2": 0.1, "ema": 0.98}
    state = initial_state(variables, optimizer)
    if steps:
        targets = jnp.asarray(rng.standard_normal((VIEWS, 3)), jnp.float32)
        chosen = jnp.asarray(rng.integers(0, VIEWS, (steps, batch)), jnp.int32)

        @partial(jax.jit, donate_argnums=0)
        def dispatch(state, data, chosen):
            return train_steps(state, data, chosen, samples, render_batch=DeviceFeed.render_batch, **how)

        arguments = ((bank, table, targets), chosen)
    else:
        waves = jnp.asarray(rng.standard_normal((batch, samples)), jnp.float32)
        dispatch = jax.jit(partial(train_step, **how), donate_argnums=0)
        arguments = ((waves, jnp.asarray(rng.standard_normal((batch, 3)), jnp.float32)),)

    def run() -> None:
        nonlocal state
        state, measured = dispatch(state, *arguments)
        losses = np.asarray(measured["loss"])  # waits
        if not np.isfinite(losses).all():
            raise W2SError(f"the loss is {losses}")

    run()
    return run


def theirs(path: Path, kind: str, compiled: bool, batch: int, samples: int) -> Callable[[], None]:
    """The same for the bare step of the PyTorch peer; ``kind`` is "float32", "tf32" or "bfloat16" (autocast)."""
    import torch

    spec = importlib.util.spec_from_file_location("peer", path)
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and jax.default_backend() != "cpu":
        raise UsageError(f"torch sees no {jax.default_backend()}; install a torch that does, or leave --peer out")
    torch.manual_seed(0)
    model = peer.Wav2Small().to(device).train()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    forward = torch.compile(model) if compiled else model
    x, y = torch.randn(batch, samples, device=device), torch.rand(batch, 3, device=device)

    def run() -> None:
        # set at every step: contestants take turns
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = kind != "float32"
        optimiser.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=kind == "bfloat16"):
            prediction = forward(x)
        loss = peer.ccc_loss(prediction.float(), y)
        loss.backward()
        optimiser.step()
        loss.item()  # waits

    for _ in range(3):  # cuDNN chooses its algorithms, torch.compile compiles
        run()
    return run


def contestants(arguments: argparse.Namespace, samples: int) -> dict[str, tuple[int, Callable]]:
    """By name, how many steps a dispatch has, and what makes the function that runs one."""
    bank, table = bank_on_device(samples)
    make, batch = {}, arguments.batch
    for name in arguments.students:
        forms = arguments.forms if "form" in models.STUDENTS[name].__dataclass_fields__ else [None]
        for dtype in arguments.dtypes:
            for form in forms:
                fields = {"dtype": dtype, **({"form": form} if form else {})}
                for steps in dict.fromkeys((0, arguments.steps)):
                    label = " ".join(filter(None, (name, dtype, form, f"scan of {steps}" if steps else "step")))
                    make[label] = (steps or 1, partial(ours, name, fields, batch, samples, steps, bank, table))
    if arguments.peer:
        for kind in ("float32", "tf32", "bfloat16"):
            for compiled in (False, True) if arguments.compile else (False,):
                label = f"torch wav2small {kind} {'compiled' if compiled else 'eager'}"
                make[label] = (1, partial(theirs, arguments.peer, kind, compiled, batch, samples))
    return make


def measure(make: dict[str, tuple[int, Callable]], runs: int, batch: int) -> list[dict]:
    """Clips per second of each contestant: the median, the slowest and the fastest of ``runs``; or its error."""
    ready, rows = {}, {name: {"name": name} for name in make}
    for name, (_, build) in make.items():
        began = time.perf_counter()
        try:
            ready[name] = build()
            rows[name]["compile_seconds"] = round(time.perf_counter() - began, 1)
        except Exception as error:  # too little memory, an operator that a compiler lacks: the others still run
            rows[name]["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        print(f"{name}: {rows[name].get('error', 'ready')}", file=sys.stderr, flush=True)
    times = {name: [] for name in ready}
    for _ in range(runs):  # in turn, so that a drift of the machine hits all
        for name, run in ready.items():
            began = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - began) / make[name][0])
    for name, values in times.items():
        low, middle, high = batch / np.quantile(values, (1, 0.5, 0))
        rows[name] |= {"clips_per_second": round(middle, 1), "slowest": round(low, 1), "fastest": round(high, 1)}
    return list(rows.values())


def table(rows: list[dict], limits: dict[str, int]) -> str:
    """The rows as Markdown; Wav2Small's have the share that they reach of the bound of memory."""
    lines = ["| contestant | clips/s | slowest to fastest | of the memory bound |", "| --- | --- | --- | --- |"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['name']} | {row['error'].replace('|', '/')} | | |")
            continue
        share = "–"
        if "wav2small " in row["name"] and limits:
            kind = "bfloat16" if "bfloat16" in row["name"] else "float32"
            share = f"{100 * row['clips_per_second'] / limits[kind]:.1f} %"
        spread = f"{row['slowest']:,} to {row['fastest']:,}"
        lines.append(f"| {row['name']} | {row['clips_per_second']:,} | {spread} | {share} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", default=["wav2small", "mobilenet_v4_s"], choices=list(models.STUDENTS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--forms", nargs="+", default=["direct", "blocks"], choices=CHOICES)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a clip")
    parser.add_argument("--steps", type=int, default=16, help="in one dispatch of the scans; 0: bare steps only")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="the peer eager only")
    parser.add_argument("--bandwidth", type=float, help="GB/s of the device's memory, where the table does not know it")
    parser.add_argument("--out", type=Path, help="a file for the figures as JSON")
    arguments = parser.parse_args(argv)
    if arguments.batch < 2 or arguments.runs < 1:
        parser.error("expected --batch of at least 2 (CCC belongs to a set) and --runs of at least 1")
    device = jax.devices()[0]
    speed = arguments.bandwidth or bandwidth(device.device_kind)
    if speed is None:
        print(f"memory of {device.device_kind!r} is not in the table: --bandwidth GB/s gives the bound", file=sys.stderr)
    limits = bounds(speed, arguments.seconds) if speed else {}
    make = contestants(arguments, round(arguments.seconds * SAMPLING_RATE))
    rows = measure(make, arguments.runs, arguments.batch)
    result = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "batch": arguments.batch,
        "seconds": arguments.seconds,
        "runs": arguments.runs,
        "bandwidth": speed,
        "bounds": limits,
        "rows": rows,
    }
    if "torch" in sys.modules:
        result["torch"] = sys.modules["torch"].__version__
    print(json.dumps(result))
    print(table(rows, limits))
    if limits:
        print(f"\nBounds at {speed:,.0f} GB/s, clips/s: " + ", ".join(f"{kind} {limit:,}" for kind, limit in limits.items()))
    if arguments.out:
        write_json(arguments.out, result)
    return result


if __name__ == "__main__":
    main()
