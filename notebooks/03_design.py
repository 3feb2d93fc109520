# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Design: what does a variant cost, before you train it?
#
# A student is a row of numbers: how many channels, how fine the image, how many blocks. Most of its price is known as
# soon as these are written down:
#
# - **parameters** decide the size of the file (4 bytes each in fp32, 1 in int8);
# - **MACs**, multiply-accumulates, decide most of the time and energy;
# - **milliseconds and memory** have to be measured, because a processor likes some shapes better than others.
#
# This notebook makes a table of variants, shows where Wav2Small spends its parameters and MACs, measures a few variants
# as ONNX with *random* weights, and takes one through a training loop of your own. What it cannot tell is how *good* a
# variant becomes: that needs training.
#
# The last section needs data: the directory that `make quickstart` leaves behind, or the one that `W2S_QUICKSTART`
# names. If neither has a model, the next cell makes a small one (about a minute). Its teacher is a stand-in that only
# imitates emotion.

# %%
import os
import tempfile
import warnings
from functools import partial
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from w2s_jax import bank, bench, models, train
from w2s_jax.labels import Labels
from w2s_jax.render import render_on_host
from w2s_jax.views import Views

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow, which the export uses, is talkative
warnings.filterwarnings("ignore", message="IProgress not found")  # of progress bars, and nothing here draws any

QUICKSTART = Path(os.environ.get("W2S_QUICKSTART") or "../quickstart")
if not (QUICKSTART / "model" / "model.onnx").exists():
    from w2s_jax import quickstart

    quickstart.run(QUICKSTART, steps=40)

plt.rcParams |= {"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}

# %% [markdown]
# ## A student is made of fields
#
# `models.build(name, **fields)` makes a Flax module and computes nothing yet. Printed, it shows its fields:

# %%
student = models.build("wav2small")
print({key: getattr(student, key) for key in student.__dataclass_fields__ if key not in ("parent", "name", *models.RUNNING)})
print(models.count(student), f"{models.macs(student, 80000):,} MACs for 5 s")

# %% [markdown]
# | field | what it is |
# |---|---|
# | `n_fft`, `hop`, `n_mels` | the log-mel image: samples in a frame, samples from frame to frame, bands |
# | `channels`, `kernel` | of every convolution block: how many feature maps, and how wide a neighbourhood (3: 3×3) |
# | `before`, `after` | blocks before and behind the max pool, which halves time and bands |
# | `stride` | of the first convolution: 2 halves time and bands at once |
# | `pooling` | over time: `"attention"` (learned weights), `"mean"`, `"statistics"` (mean and standard deviation) |
#
# `models.count` needs no weights (`jax.eval_shape` works out the shapes), and `models.macs` reads the traced
# computation. So even the largest student is priced within seconds. MACs are those of 5 s of audio; they grow in
# proportion to its length, the parameters do not.

# %%
VARIANTS = {
    "A": {},
    "B": {"channels": 8},
    "C": {"channels": 20},
    "D": {"n_mels": 16},
    "E": {"n_fft": 128, "n_mels": 40},
    "F": {"hop": 64},
    "G": {"n_fft": 256, "hop": 160},
    "H": {"before": 1, "after": 6},
    "I": {"before": 2, "after": 2},
    "J": {"kernel": 5},
    "K": {"stride": 2},
    "L": {"pooling": "mean"},
    "M": {"pooling": "statistics"},
    "N": {"stride": 2, "pooling": "statistics", "channels": 24},
}


def cost(name, **fields):
    student = models.build(name, **fields)
    return sum(models.count(student).values()), models.macs(student, 80000)


costs = {key: cost("wav2small", **fields) for key, fields in VARIANTS.items()}
base_parameters, base_macs = costs["A"]
print(f"{'':<3}{'wav2small with':<50}{'parameters':>11}{'':>8}{'MMACs':>9}")
for key, fields in VARIANTS.items():
    what = ", ".join(f"{name}={value!r}" for name, value in fields.items()) or "nothing changed: the published one"
    parameters, macs = costs[key]
    print(f"{key:<3}{what:<50}{parameters:11,}{parameters / base_parameters:7.2f}×", end="")
    print(f"{macs / 1e6:9.1f}{macs / base_macs:7.2f}×")

# %% [markdown]
# **What to look at.** The two columns with × move independently. `hop=64` halves the MACs and keeps every parameter;
# `pooling="mean"` throws away four fifths of the parameters and not even a fifth of the MACs. The next picture says
# why. (More bands than 26 need longer frames, as in E: 33 frequencies cannot fill 40 bands, and librosa warns of empty
# ones.)
#
# ## Where the cost is
#
# A convolution or dense layer multiplies its kernel once for each position of its output. So with the shapes of all
# outputs, which `capture_intermediates` gives without computing them, the MACs of each layer are (positions of the
# output) × (size of the kernel).

# %%
PARTS = ["front end", *(f"block {number}" for number in range(1, 8)), "mix", "pooling", "output"]
NAMES = {"pool": "pooling", "adv": "output"}  # as they are called in the paper's code


def by_part(student, samples=80000):
    """{part: [parameters, MACs]} of a Wav2Small; the front end has those MACs that no trained layer accounts for."""
    wave = jax.ShapeDtypeStruct((1, samples), jnp.float32)
    variables = jax.eval_shape(student.init, jax.random.key(0), wave)
    apply = partial(student.apply, capture_intermediates=True, mutable=["intermediates"])
    outputs = flatten_dict(jax.eval_shape(apply, variables, wave)[1]["intermediates"])
    parts = {part: [0, 0] for part in PARTS}
    for path, leaf in flatten_dict(variables["params"]).items():
        part = f"block {path[1][1:]}" if path[0] == "vgg7" else NAMES.get(path[0], path[0])
        parts[part][0] += leaf.size
        if path[-1] == "kernel":
            (output,) = outputs[(*path[:-1], "__call__")]
            parts[part][1] += prod(output.shape[:-1]) * leaf.size
    rest = models.macs(student, samples) - sum(macs for _, macs in parts.values())
    parts["front end"] = [models.count(student)["fixed"], rest]
    return parts


figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained", sharey=True)
for shift, colour, key in ((-0.2, "0.4", "A"), (0.2, "C3", "N")):
    parts = by_part(models.build("wav2small", **VARIANTS[key]))
    label = f"{key}: " + (", ".join(f"{name}={value}" for name, value in VARIANTS[key].items()) or "the published one")
    for at, unit in ((0, 1e3), (1, 1e6)):
        numbers = [parts[part][at] / unit for part in PARTS]
        axes[at].barh(np.arange(len(PARTS)) + shift, numbers, 0.38, color=colour, label=label)
axes[0].set(title="where the parameters are", xlabel="parameters in thousands")
axes[1].set(title="where the MACs are", xlabel="millions of MACs for 5 s of audio")
for axis in axes:
    axis.grid(axis="y", visible=False)
axes[0].set_yticks(range(len(PARTS)), PARTS)
axes[0].invert_yaxis()
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
plt.show()

# %% [markdown]
# **What to look at.** Four fifths of the *parameters* of the published Wav2Small are in the two square matrices of its
# attention pooling (169 × 169 each). Half of the *MACs* are in blocks 2 and 3, which have few parameters and work on
# the full image, before the max pool. Variant N spends both differently: the stride shrinks the image before the
# expensive blocks, statistics need no matrices, and what that saves buys 24 channels.
#
# ## All students
#
# The other architectures of the package, and the variants from above, on one map. Both axes are logarithmic.

# %%
students = {name: cost(name) for name in models.STUDENTS}
students |= {f"{name}, width 0.35": cost(name, width=0.35) for name in ("mobilenet_v3_s", "mobilenet_v4_s")}
print(f"{'':<30}{'parameters':>12}{'MMACs for 5 s':>16}{'fp32 file, about':>19}")
for name, (parameters, macs) in sorted(students.items(), key=lambda item: item[1]):
    print(f"{name:<30}{parameters:12,}{macs / 1e6:16,.0f}{4 * parameters / 1e6:16.2f} MB")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
for name, (parameters, macs) in students.items():
    left.plot(parameters, macs / 1e6, "o", color="C3" if name.startswith("wav2small") else "0.4")
    below = name in ("wav2small_17k", "mobilenet_v4_s")
    label = {"text": name.replace("mobilenet", "mn"), "xytext": (5, -10 if below else 4), "textcoords": "offset points"}
    left.annotate(xy=(parameters, macs / 1e6), fontsize=8, **label)
left.set(title="students (mn: mobilenet)", xscale="log", yscale="log", xlim=(8e3, 1e9), ylim=(20, 2e4))
for key, (parameters, macs) in costs.items():
    right.plot(parameters / 1e3, macs / 1e6, "o", color="C3" if key in "AN" else "0.4")
    offset = (-3, 6) if key in "IL" else (5, 4)
    right.annotate(key, (parameters / 1e3, macs / 1e6), xytext=offset, textcoords="offset points", fontsize=10)
right.set(title="variants of wav2small (letters as above)", xscale="log", yscale="log", ylim=(80, 1300))
left.set(xlabel="parameters", ylabel="millions of MACs for 5 s of audio")
right.set(xlabel="parameters in thousands", ylabel="millions of MACs for 5 s of audio")
right.minorticks_off()
right.set_xticks([15, 25, 50, 100, 150], ["15", "25", "50", "100", "150"])
right.set_yticks([100, 200, 500, 1000], ["100", "200", "500", "1000"])
plt.show()

# %% [markdown]
# **What to look at.** Left: `mobilenet_v3_s` has twenty times the parameters of Wav2Small and fewer MACs. Wav2Small is
# small in *memory*; in time it is an ordinary small network, because it convolves a large image. Right: moves to the
# left save memory, moves downwards save time.
#
# ## What it costs on this machine
#
# MACs are a promise. `bench.make` exports a student with random weights, and `bench.measure` lets the files take turns
# on one thread, with 5 s of audio. Peak memory is measured in fresh processes, above that of an onnxruntime that runs
# nothing. The values that come out are noise; what they cost does not depend on the weights.

# %%
with tempfile.TemporaryDirectory(prefix="w2s-design-") as directory:
    files = {key: bench.make("wav2small", VARIANTS[key], Path(directory) / key)["fp32"] for key in "AKN"}
    measured = bench.measure(files, seconds=5.0, runs=30)
print(f"{'':<3}{'kB':>6}{'MMACs':>8}{'ms for 5 s':>13}{'95 % below':>13}{'× real time':>13}{'peak memory':>14}")
for key, figures in measured.items():
    print(f"{key:<3}{figures['bytes'] / 1000:6.0f}{costs[key][1] / 1e6:8.0f}{figures['milliseconds']:13.1f}", end="")
    peak = figures["peak_memory"] or float("nan")  # not every system tells
    print(f"{figures['p95_milliseconds']:13.1f}{1 / figures['real_time_factor']:13.0f}{peak / 1e6:11.0f} MB")

# %% [markdown]
# **What to look at.** Does time fall as much as MACs do? Where it does not, the processor waits for memory, or runs the
# smaller shapes less efficiently. The file of variant N is half as large, and memory follows the image, which the
# stride has made a quarter of what it was. `w2s bench` makes such a table of whole students, with int8 and with what is
# published beside it.
#
# ## Does it learn?
#
# `train.train` does everything: checkpoints, evaluation, logs. For an experiment that it does not foresee, take its
# step into a loop of your own: `train.train_step` is a pure function, (state, batch) → (state, metrics), and runs under
# `jit`, `pmap` or in a `scan`.

# %%
the_bank = bank.Bank(QUICKSTART / "bank")
the_views = Views.read(QUICKSTART / "views.parquet")
the_labels = Labels.read(QUICKSTART / "labels", the_views)
rows = the_views.where("train")
values = the_labels.values[rows]
targets = (values - values.mean(axis=0)) / values.std(axis=0)  # CCC is the same for standardised labels

student = models.build("wav2small", **VARIANTS["N"])
variables = jax.jit(student.init)(jax.random.key(0), jnp.zeros((1, 32000)))
optimizer = optax.adamw(3e-3)
state = train.initial_state(variables, optimizer)
step = jax.jit(partial(train.train_step, student=student, frontend=variables["frontend"], optimizer=optimizer, l2=0.1))

random = np.random.default_rng(0)
losses = []
for _ in range(20):
    chosen = random.choice(len(rows), 16, replace=False)
    batch = render_on_host(the_bank, the_views, rows[chosen]), targets[chosen]
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
    if int(state.step) in (1, 5, 10, 15, 20):
        print(f"step {int(state.step):2d}  loss {losses[-1]:.3f}  CCC of the batch {np.asarray(metrics['ccc']).round(2)}")

# %% [markdown]
# The loss falls: gradients flow through the variant. Twenty steps say nothing about how good it will be. For that,
# train it in full and compare it with the published student on the same data, and look at the intervals before you
# believe in a difference:
#
# ```
# w2s train wav2small --bank quickstart/bank --views quickstart/views.parquet --labels quickstart/labels \
#     --workdir runs/N --set fields.stride=2 --set fields.pooling=statistics --set fields.channels=24
# w2s eval runs/N --bank quickstart/bank --views quickstart/views.parquet --labels quickstart/labels
# ```
#
# Next: [04_errors](04_errors.ipynb) looks at what a student gets wrong.
