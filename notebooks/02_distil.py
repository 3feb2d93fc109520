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
# # Distil: make a student of your own
#
# Distillation needs no human labels. A **teacher**, a large network, listens to audio and writes down what it would
# answer; a **student**, here Wav2Small with 72,659 parameters, learns to give the same answers. The pipeline of this
# package:
#
# ```
# audio → bank → views → labels → training → evaluation → export
# ```
#
# This notebook walks it once, small enough for a minute or two on two cores: 174 short clips of generated speech,
# pieces of one second, a few dozen steps. It works in a temporary directory and leaves nothing behind.
#
# **The teacher here is a stand-in**: a rule that computes three numbers from pitch, spectral balance and speaking rate,
# and calls them arousal, dominance and valence. It only imitates emotion. What it is good for: every step below is the
# real one, and needs no download. The last section says what to change for a real teacher and a real corpus.

# %%
import json
import os
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from w2s_jax import bank, config, corpora, evaluate, export, labelling, metrics, speech, teachers, train, views
from w2s_jax.labels import Labels
from w2s_jax.render import render_on_host
from w2s_jax.runtime import Predictor

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow, which the export uses, is talkative
warnings.filterwarnings("ignore", message="IProgress not found")  # of progress bars, and nothing here draws any

temporary = tempfile.TemporaryDirectory(prefix="w2s-distil-")
work = Path(temporary.name)

COLOURS = {"arousal": "C0", "dominance": "C1", "valence": "C2"}  # the same in all notebooks
plt.rcParams |= {"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}

# %% [markdown]
# ## 1. Audio into a bank
#
# A **bank** is a corpus, decoded once: 16 kHz, mono, int16, memory-mapped. `speech.make_corpus` speaks sentences in
# seven languages with eSpeak NG. The splits share no voice: validation and test voices do not occur in training, so
# the score at the end is one for new speakers.

# %%
corpus = speech.make_corpus(work / "speech", clips=174)
bank.build(corpora.read("csv", corpus), work / "bank", corpus="csv")
the_bank = bank.Bank(work / "bank")
for split in corpora.SPLITS:
    clips = the_bank.clips["split"] == split
    minutes = the_bank.clips["samples"][clips].sum() / 16000 / 60
    print(f"{split:<10} {clips.sum():4d} clips {len(set(the_bank.clips['speaker'][clips])):3d} voices {minutes:5.1f} minutes")

# %% [markdown]
# ## 2. Views
#
# A **view** is a recipe for an exact piece of audio: which clip, from where, how long, how loud. Teacher and student
# see the *same* samples, so a label never belongs to something that the student did not see. Training views are
# random pieces; validation and test views are fixed, evenly spaced and clean.

# %%
the_views = views.draw(the_bank, per_clip=5, eval_per_clip=6, seconds=(1.0,), mix=0.0)
print({split: len(the_views.where(split)) for split in corpora.SPLITS})
first = {name: column[0] for name, column in the_views.columns.items()}
print("the first view:", {name: round(first[name].item(), 1) for name in ("clip", "offset", "samples", "gain_db")})

# %%
clip = the_bank.wave(0)
seconds = np.arange(len(clip)) / 16000
figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 3.4), sharex=True, layout="constrained")
top.plot(seconds[::4], clip[::4], color="0.4", linewidth=0.4)
top.set(ylabel="amplitude", title="a training clip and its five views: pieces of 1 s, each at its own gain")
of_clip = np.flatnonzero(the_views.columns["clip"] == 0)
for number, row in enumerate(of_clip, 1):
    start, gain = the_views.columns["offset"][row] / 16000, the_views.columns["gain_db"][row]
    bottom.barh(number, 1.0, left=start, height=0.8, color="0.7")
    bottom.text(start + 0.5, number, f"{gain:+.1f} dB".replace("-", "−"), ha="center", va="center", fontsize=9)
bottom.set(xlabel="time in seconds", ylabel="view", xlim=(0, seconds[-1]), yticks=range(1, len(of_clip) + 1))
bottom.invert_yaxis()
plt.show()

# %% [markdown]
# ## 3. Labels
#
# The teacher labels every view once. Its answers are kept with where they come from: the teacher's name, fingerprint and
# licence travel from here to the exported model.

# %%
teacher = teachers.load("acoustic")
about = labelling.label(the_bank, the_views, teacher, work / "labels")
the_labels = Labels.read(work / "labels", the_views)
print(about["count"], "labels by", about["teacher"]["name"], "| licence:", about["teacher"]["licence"])
print("a stand-in:", about["teacher"]["stand_in"])

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 2.6), sharey=True, sharex=True, layout="constrained")
training = the_views.where("train")
for axis, (name, colour) in zip(axes, COLOURS.items(), strict=True):
    axis.hist(the_labels.values[training, the_labels.dimensions.index(name)], bins=np.linspace(0, 1, 21), color=colour)
    axis.set(title=name, xlabel="teacher's value")
axes[0].set_ylabel("number of views")
plt.show()

# %% [markdown]
# **What to look at.** A student can only learn what varies. If one of these were a narrow peak, as valence often is
# with real teachers on calm speech, that dimension would be hard to learn *and* its CCC would be low even for small
# errors: look for more varied audio before you train for longer.
#
# ## 4. Training
#
# The loss is 1 − CCC over the batch. **CCC**, the concordance correlation coefficient, is 1 where the student's values
# equal the teacher's, 0 where they have nothing in common; unlike a correlation it also falls when the values are
# shifted or spread too little.
#
# 50 steps are few: real runs take thousands. `config.default()` lists every setting; a run that is killed goes on from
# its last checkpoint when the same call is made again.

# %%
settings = config.load("wav2small", ["steps=50", "learning_rate=6e-3", "eval_every=10", "log_every=2", "ema=0.9"])
summary = train.train(settings, the_bank, the_views, the_labels, work / "run")
print("best step:", summary["best_step"], "of", summary["steps"])
print("validation CCC:", {name: round(score, 3) for name, score in summary["validation_ccc"].items()})

# %% [markdown]
# Everything that is measured on the way is a line of `metrics.jsonl` (and an event for TensorBoard).

# %%
lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
seen, checked = ([line for line in lines if line["kind"] == kind] for kind in ("train", "validation"))
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.plot([line["step"] for line in seen], [line["loss"] for line in seen], color="0.3")
left.set(title="training: 1 − CCC, plus a little squared error", xlabel="step", ylabel="loss", ylim=(0, None))
for name, colour in COLOURS.items():
    right.plot([line["step"] for line in seen], [line[f"ccc/{name}"] for line in seen], color=colour, alpha=0.3, linewidth=1)
    steps, scores = [line["step"] for line in checked], [line[f"ccc/{name}"] for line in checked]
    right.plot(steps, scores, "o-", color=colour, label=name)
right.set(title="CCC: dots validation, thin training batches", xlabel="step", ylabel="CCC", ylim=(None, 1))
right.legend(frameon=False, loc="lower right")
plt.show()

# %% [markdown]
# **What to look at.** The thin lines are single batches of 16 views and jump; the dots are new voices, judged with an
# average of the recent weights. Dots that still rise: train longer. Dots that fall while the thin lines rise: the
# student learns the training voices by heart; get more audio, or set `crop` below 1.
#
# ## 5. Evaluation
#
# On test voices, with 95 % intervals. They are bootstrapped over *clips*, because the six views of a clip resemble each
# other; a bootstrap over views would claim more certainty than there is. A difference between two students that is
# smaller than these intervals says little.

# %%
report = evaluate.evaluate(work / "run", the_bank, the_views, the_labels)
print(f"{report['views']} views of {report['clips']} clips")
for name in the_labels.dimensions:
    score = report["teacher"][name]
    print(f"{name:<10} CCC {score['ccc']:.3f}   95 % interval {score['low']:.3f} to {score['high']:.3f}")
print(f"mean       CCC {report['teacher']['mean']:.3f}")

# %%
infer, *_ = evaluate.load(work / "run")
rows = the_views.where("test")
student, taught = evaluate.predict_views(infer, the_bank, the_views, rows), the_labels.values[rows]
TICKS = (0.2, 0.4, 0.6, 0.8)
figure, axes = plt.subplots(1, 3, figsize=(9, 3.3), sharex=True, sharey=True, layout="constrained")
for at, (axis, (name, colour)) in enumerate(zip(axes, COLOURS.items(), strict=True)):
    axis.plot([0, 1], [0, 1], color="0.5", linewidth=1)
    axis.scatter(taught[:, at], student[:, at], s=14, color=colour, alpha=0.5, edgecolors="none")
    score = report["teacher"][name]
    axis.set(title=f"{name}\nCCC {score['ccc']:.2f} [{score['low']:.2f}, {score['high']:.2f}]", xlabel="teacher's value")
    axis.set(xlim=(0, 1), ylim=(0, 1), xticks=TICKS, yticks=TICKS, aspect="equal")
axes[0].set_ylabel("student's value")
plt.show()

# %% [markdown]
# **What to look at.** Points on the grey line are perfect. A cloud that is flatter than the line means that the student
# plays safe; one that is steeper, as for dominance here, that it overdoes it; one beside the line, that it is biased.
# [04_errors](04_errors.ipynb) takes such errors apart.
#
# ## 6. Export
#
# The student becomes ONNX: once in fp32, once in int8 with ranges from training audio. The export compares fp32 with
# Flax on lengths from 64 samples to a minute and int8 with fp32 on validation audio, and writes nothing if they differ
# too much.

# %%
excerpts = {"calibration": the_bank.excerpts("train", 32, 2.0), "check": the_bank.excerpts("validation", 18, 2.0)}
exported = export.export_student(work / "run", work / "model", **excerpts)
for name in ("model.onnx", "model.int8.onnx"):
    print(f"{name:<16} {exported['files'][name] / 1000:6.1f} kB")
print("int8 against fp32, CCC:", {name: round(score, 4) for name, score in exported["kinds"]["int8"]["ccc"].items()})

# %% [markdown]
# ## 7. Use
#
# From here on JAX is no longer needed.

# %%
predictor = Predictor(work / "model", kind="int8")
print(str(predictor).replace(f"{work}{os.sep}", ""))
wave = render_on_host(the_bank, the_views, rows[:1])[0]
print("\nstudent:", {name: round(value, 3) for name, value in predictor(wave).items()})
print("teacher:", {name: round(float(teacher(wave[None])[0, at]), 3) for at, name in enumerate(teacher.dimensions)})

# %% [markdown]
# The predictor in ONNX int8 agrees with the Flax student of section 5:

# %%
int8 = np.array([list(predictor(wave).values()) for wave in render_on_host(the_bank, the_views, rows)])
print("int8 against Flax:   ", metrics.ccc(int8, student).round(4))
print("int8 against teacher:", metrics.ccc(int8, taught).round(3))
print("Flax against teacher:", metrics.ccc(student, taught).round(3))
temporary.cleanup()

# %% [markdown]
# ## For real
#
# | here | for a student that is worth keeping |
# |---|---|
# | `speech.make_corpus` | your audio: `corpora.read("folder", "my_audio/")`, or `"csv"`, `"msp-podcast"`, `"iemocap"` |
# | `teachers.load("acoustic")` | `"wavlm"` (MIT), `"paper"` (CC BY-NC-SA 4.0: not for products), `"onnx:teacher.onnx"` |
# | 174 clips, views of 1 s, `mix=0.0` | hours of varied speech; `seconds=(2.0, 5.0)`, `mix=0.5`: mixtures, labelled as mixed |
# | 50 steps | `config.load("wav2small")`: 2000 steps; more for more audio |
#
# Before labelling for hours, `w2s teacher check wavlm` downloads the teacher and says what it costs on your machine. A
# student inherits its teacher's licence. Every call above is also a command (`w2s bank build`, `w2s views draw`, `w2s
# label`, `w2s train`, `w2s eval`, `w2s export`), with progress, and each continues when it was killed.
#
# Next: [03_design](03_design.ipynb) changes the student itself.
