"""Scaling on paper: what training Wav2Small on 100,000 hours should cost on 1 to 256 chips. Arithmetic, nothing is run.

    python experiments/scaling.py            prints the tables of experiments/scaling.md (3 s)

The network's arithmetic and activations are counted from its trace; everything else is an assumption with a name, in capitals
below, and each says where it is from. To try another one: ``--bytes 4`` (float32), ``--per-chip 16``, ``--share 0.25``.

A chip's speed is the lower of two bounds, times the share of it that is reached (``--share``, an assumption until measured):
memory traffic, and arithmetic with the zeros that fill up the matrix unit. A step then adds its collectives.
"""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from w2s_jax import SAMPLING_RATE, models
from w2s_jax.models.forms import Dense, FormedConvolution
from w2s_jax.train.loop import training_flops

HOURS, VIEW_SECONDS = 100_000, 5
SAMPLES = VIEW_SECONDS * SAMPLING_RATE
CHIPS = (1, 8, 64, 256)
#: Global batch of the table that keeps it.
BATCH = 4096

#: How often a step moves each element of a convolution's output. As XLA does it, forward: the convolution writes y, the moments
#: read it, normalisation and ReLU read it and write z, the next convolution reads z (5); backward: dz is written, BatchNorm's
#: sums read dz and y, its gradient reads dz and y and writes dy, the kernel's gradient reads dy and its input, the input's
#: gradient reads dy (9).
PASSES = 14
#: With BatchNorm and ReLU computed inside their neighbours: y written, y read; dz written with its sums (reads y), the kernel's
#: gradient reads dz, y and its input, the input's gradient reads dz and y.
PASSES_FUSED = 9
#: One direction of one hop of a collective, and starting one, in seconds; orders of magnitude, not data sheets.
HOP = {"NVLink": 3e-6, "InfiniBand": 10e-6, "ICI": 1e-6}
START = {"gpu": 10e-6, "tpu": 3e-6}
#: Bytes a second that one host gathers from its memory in pieces of 160 kB; an assumption.
HOST_COPY = 20e9


class Chip(NamedTuple):
    """Peak figures of vendors' data sheets, dense; bytes and seconds."""

    name: str
    kind: str
    flops: float  # bfloat16
    bandwidth: float  # of its memory
    memory: float
    link: float  # to other chips, one direction: the slowest on the way, taken for all of it
    in_node: int  # chips of one host
    inflation: float  # multiply-accumulates of the matrix unit for one of the network, zeros included


#: The inflation of an H100: 13 channels in tiles of 16, both ways. Of a TPU: blocks of 7 mel bins as one 3-tap convolution
#: (form "blocks"): K = 9 · 13 = 117 for 3 · 13 that are needed, N = 7 · 13 = 91, in a unit of 128 × 128.
#: H100: NVIDIA's data sheet (SXM); between nodes one 400 Gb/s port a GPU. v5e: cloud.google.com/tpu/docs/v5e; ICI 4 × 400 Gb/s.
H100 = Chip(name="H100", kind="gpu", flops=989e12, bandwidth=3.35e12, memory=80e9, link=50e9, in_node=8,
            inflation=(16 / 13) ** 2)  # fmt: skip
V5E = Chip(name="v5e", kind="tpu", flops=197e12, bandwidth=819e9, memory=16e9, link=200e9, in_node=4,
           inflation=(117 / 39) * (128 / 117) * (128 / 91))  # fmt: skip
#: A direct convolution of 13 to 13 channels on a unit of 128 × 128.
V5E_DIRECT = (128 / 13) ** 2


def activations(student: nn.Module, samples: int = SAMPLES) -> int:
    """Elements that the convolutions of the trunk put out for one clip, counted from the traced network."""
    wave = jax.ShapeDtypeStruct((1, samples), jnp.float32)
    variables = jax.eval_shape(student.init, jax.random.key(0), wave)
    total = 0

    def count(call, args, kwargs, context):
        nonlocal total
        out = call(*args, **kwargs)
        # "mix", the 1×1 convolution, is a Dense of images
        if isinstance(context.module, FormedConvolution) or (isinstance(context.module, Dense) and out.ndim == 4):
            total += math.prod(out.shape)
        return out

    with nn.intercept_methods(count):
        jax.eval_shape(student.apply, variables, wave)
    return total


def speed(chip: Chip, traffic: float, flops: float, inflation: float | None = None) -> tuple[float, float]:
    """Bounds of one chip in clips/s: by memory traffic, and by arithmetic with the matrix unit's zeros."""
    return chip.bandwidth / traffic, chip.flops / (flops * (inflation or chip.inflation))


def collective(chip: Chip, chips: int, size: float) -> float:
    """Seconds of one all-reduce of ``size`` bytes: a ring's traffic, and the hops of a tree (GPU) or a square torus (TPU)."""
    if chips == 1:
        return 0.0
    traffic = 2 * (chips - 1) / chips * size / chip.link
    if chip.kind == "tpu":
        hops = 2 * math.sqrt(chips) * HOP["ICI"]  # to the far end, half of each side, two sides, and back
    else:
        nodes = -(-chips // chip.in_node)
        hops = 2 * (math.log2(min(chips, chip.in_node)) * HOP["NVLink"] + math.log2(nodes) * HOP["InfiniBand"])
    return START[chip.kind] + hops + traffic


def step_seconds(chip: Chip, chips: int, clips_per_second: float, per_chip: int, norms: int, parameters: int) -> tuple:
    """Seconds of a step: computing, gradients' all-reduce, the moments' (each BatchNorm and the loss, forward and backward)."""
    moments = 2 * (norms + 2) * collective(chip, chips, 2 * 13 * 4)
    return per_chip / clips_per_second, collective(chip, chips, 4 * parameters), moments


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["", *(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])]


def duration(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e6:.3g} µs" if seconds else "–"


def report(size: int, per_chip: int, share: float) -> str:
    """The tables as Markdown; ``size`` is that of an activation in bytes."""
    student = models.build("wav2small")
    shapes = jax.eval_shape(student.init, jax.random.key(0), jnp.zeros((1, SAMPLES)))
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))
    norms = len(jax.tree.leaves(shapes["batch_stats"])) // 2  # a mean and a variance each
    elements, flops, clips = activations(student), training_flops(student, SAMPLES), HOURS * 3600 // VIEW_SECONDS
    traffic, fused, audio = elements * size * PASSES, elements * size * PASSES_FUSED, 2 * SAMPLES
    rate = {chip: share * min(speed(chip, traffic, flops)) for chip in (H100, V5E)}

    out = ["### One clip of 5 s"]
    rows = [
        ["multiply-accumulates, forward", f"{models.macs(student, SAMPLES) / 1e6:,.0f} M"],
        ["floating-point operations of a step (3 passes, 2 each)", f"{flops / 1e9:.2f} GFLOP"],
        ["outputs of convolutions", f"{elements / 1e6:.2f} M elements"],
        [f"memory traffic, {size} bytes an element, {PASSES} passes", f"{traffic / 1e6:.0f} MB"],
        [f"the same with BatchNorm in its neighbours, {PASSES_FUSED} passes", f"{fused / 1e6:.0f} MB"],
        ["arithmetic per byte of traffic", f"{flops / traffic:.0f} FLOP/B"],
        ["audio, int16 (a mixture reads twice as much)", f"{audio / 1e3:.0f} kB"],
        ["trained parameters; gradients in float32", f"{parameters:,}; {4 * parameters / 1e3:.0f} kB"],
        ["BatchNorms; collectives of a step", f"{norms}; {2 * (norms + 2) + 1}"],
    ]
    out += table(["what", "how much"], rows)

    out += ["", "### One chip, clips/s"]
    rows = []
    for chip in rate:
        memory, arithmetic = speed(chip, traffic, flops)
        bounds = [memory, speed(chip, fused, flops)[0], arithmetic]
        direct = speed(chip, traffic, flops, V5E_DIRECT)[1] if chip is V5E else arithmetic
        ratio = chip.flops / chip.bandwidth
        rows.append([chip.name, *(f"{bound:,.0f}" for bound in [*bounds, direct, ratio, rate[chip]])])
    head = ["chip", "by traffic", "BatchNorm fused", "by arithmetic", "13 channels direct", "FLOP/B of the chip"]
    out += table([*head, f"assumed: {share:.0%} of the lower bound"], rows)

    def steps(sizes) -> list[str]:
        rows = []
        for chip in rate:
            for chips, each in sizes:
                compute, gradients, moments = step_seconds(chip, chips, rate[chip], each, norms, parameters)
                step, batch = compute + gradients + moments, each * chips
                parts = [duration(part) for part in (compute, gradients, moments)]
                counts = [
                    f"{compute / step:.0%}",
                    f"{batch / step:,.0f}",
                    f"{clips // batch:,}",
                    duration(clips / batch * step),
                ]
                rows.append([f"{chips} {chip.name}", f"{batch:,}", *parts, *counts])
        head = ["chips", "global batch", "computing", "gradients", "moments", "of it computing", "clips/s", "steps", "epoch"]
        return table(head, rows)

    out += ["", f"### {per_chip} clips per chip", *steps([(chips, per_chip) for chips in CHIPS])]
    out += ["", f"### A global batch of {BATCH:,}", *steps([(chips, BATCH // chips) for chips in CHIPS])]

    out += ["", "### Where the bank lies"]
    rows, total = [], HOURS * 3600 * SAMPLING_RATE * 2
    for chip in rate:
        for chips in CHIPS:
            each, of_host = total / chips, min(chips, chip.in_node)
            chip_reads = 2 * audio * rate[chip]  # a mixture reads two clips
            host_reads = chip_reads * of_host
            fits = "device" if each <= chip.memory / 2 else "device, bank_gib set" if each <= 0.8 * chip.memory else "host"
            keeps = "yes" if host_reads <= HOST_COPY else f"no, {HOST_COPY / host_reads:.0%} of it"
            sizes = [f"{each / 1e9:,.0f} GB", f"{chip.memory / 1e9:.0f} GB", fits, f"{each * of_host / 1e9:,.0f} GB"]
            rows.append([f"{chips} {chip.name}", *sizes, f"{chip_reads / 1e9:.1f} GB/s", f"{host_reads / 1e9:.1f} GB/s", keeps])
    head = ["chips", "bank per chip", "memory", "placement", "bank per host", "audio to a chip", "from a host", "host keeps up"]
    out += table(head, rows)
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=2, help="of an activation: 2 for bfloat16, 4 for float32")
    parser.add_argument("--per-chip", type=int, default=64, help="clips per chip and step")
    parser.add_argument("--share", type=float, default=0.5, help="of the lower bound that is reached; an assumption")
    arguments = parser.parse_args()
    print(report(arguments.bytes, arguments.per_chip, arguments.share), end="")


if __name__ == "__main__":
    main()
