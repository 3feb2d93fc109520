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
# # Predict: arousal, dominance and valence over time
#
# A model of this package is a directory with an ONNX file in it. It needs numpy and onnxruntime, nothing else: no JAX,
# no PyTorch. This notebook loads one, asks it about a recording, first as a whole and then window by window, and draws
# the answer.
#
# The three dimensions, each on a scale of about 0 to 1:
#
# | | low | high |
# |---|---|---|
# | **arousal** | calm, sleepy | agitated, excited |
# | **dominance** | weak, timid | in control, forceful |
# | **valence** | unpleasant | pleasant |
#
# **The model here is a stand-in.** It was distilled from a rule that computes three numbers from pitch, spectral
# balance and speaking rate. The rule imitates emotion and knows nothing of it. The steps are the same with a model that
# had a real teacher.
#
# The next cell uses the directory that `make quickstart` leaves behind, or the one that the environment variable
# `W2S_QUICKSTART` names. If neither has a model, it makes a small one (40 training steps, about a minute on two cores).

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from w2s_jax import audio
from w2s_jax.runtime import Predictor

QUICKSTART = Path(os.environ.get("W2S_QUICKSTART") or "../quickstart")
if not (QUICKSTART / "model" / "model.onnx").exists():
    from w2s_jax import quickstart

    quickstart.run(QUICKSTART, steps=40)

COLOURS = {"arousal": "C0", "dominance": "C1", "valence": "C2"}  # the same in all notebooks
plt.rcParams |= {"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}

# %% [markdown]
# ## The model says what it is
#
# Print a model before you trust it: who taught it, under which licence, and what input it expects.

# %%
predictor = Predictor(QUICKSTART / "model")
print(predictor)

# %% [markdown]
# ## A whole file
#
# `audio.load` reads whatever libsndfile reads (WAV, FLAC, Ogg, MP3, …), mixes it down to mono and resamples it to 16
# kHz. The predictor maps the samples to one value per dimension. The voice `en+f2` does not occur in the training data.

# %%
files = sorted((QUICKSTART / "speech" / "audio" / "en+f2").glob("*.wav"))[:4]
for file in files:
    wave = audio.load(file)
    values = predictor(wave)
    print(f"{file.name}  {len(wave) / 16000:.1f} s  ", "  ".join(f"{name} {value:.3f}" for name, value in values.items()))

# %% [markdown]
# How to read these numbers:
#
# - **Compare, do not interpret one alone.** 0.62 is more aroused than 0.48 *on this teacher's scale*. Another teacher
#   has another scale.
# - The values are **not clipped**; a little below 0 or above 1 can happen.
# - The **level does not matter**: the network normalises every recording, so a whisper close to the microphone is not
#   "quiet".
# - **Silence has no emotion.** The network still answers, always the same numbers. Leave silent parts out.
# - How far a value may be off is a property of model and data: `w2s eval` measures it, and [04_errors](04_errors.ipynb)
#   shows what such errors look like.

# %%
louder = predictor(10 * wave)
print("ten times louder:", {name: f"{louder[name] - values[name]:+.1e}" for name in values})
print("silence:", {name: round(value, 3) for name, value in predictor(np.zeros(32000, np.float32)).items()})

# %% [markdown]
# ## Over time
#
# `predictor.windows` slides a window over the recording and judges each position for itself. Here the four files are
# played one after the other (dashed lines: where one ends), each with its own sentences, rate, pitch and intonation.

# %%
waves = [audio.load(file) for file in files]
wave = np.concatenate(waves)
borders = np.cumsum([len(part) for part in waves])[:-1] / 16000

window, hop = 2.0, 0.25
rows = list(predictor.windows(wave, 16000, window=window, hop=hop))
middle = np.array([(start + end) / 2 for start, end, _ in rows])
start, end, values = rows[0]
print(f"{len(rows)} windows; the first, {start:g} s to {end:g} s:", {name: round(value, 3) for name, value in values.items()})

# %%
seconds = np.arange(len(wave)) / 16000
figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 5), sharex=True, height_ratios=(1, 2.5), layout="constrained")
top.plot(seconds[::8], wave[::8], color="0.4", linewidth=0.4)
top.set_ylabel("amplitude")
top.set_title(f"{len(files)} recordings of one held-out voice, windows of {window:g} s every {hop:g} s")
for name, colour in COLOURS.items():
    bottom.plot(middle, [values[name] for *_, values in rows], color=colour, label=name, linewidth=2)
for border in borders:
    top.axvline(border, color="0.3", linestyle="--", linewidth=1)
    bottom.axvline(border, color="0.3", linestyle="--", linewidth=1)
bottom.set(xlabel="time in seconds (middle of the window)", ylabel="value", xlim=(0, seconds[-1]), ylim=(0, 1))
figure.legend(*bottom.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
plt.show()

# %% [markdown]
# **What to look at.** Near a dashed line a window covers the end of one recording and the beginning of the next, and
# its value lies somewhere between theirs. So what jumps in the speech becomes a ramp of two seconds: the fourth
# recording is spoken higher and faster than the third, and arousal climbs all the way from 11 s to 13 s. Inside a
# recording the lines wander too, because every window has other words in it, arousal by about 0.1 and valence by up to
# 0.3 here. Do not read meaning into steps of that size.
#
# ## How long a window?
#
# Short windows follow every syllable and wobble; long ones are steady and blur. The model was trained on pieces of 2 s,
# and is best at about that length.

# %%
LENGTHS = ((0.5, 0.8, 0.4), (2.0, 1.8, 1.0), (4.0, 3.5, 0.4))  # seconds, width of the line, its opacity
figure, axes = plt.subplots(1, 3, figsize=(9, 3.3), sharey=True, sharex=True, layout="constrained")
for axis, (name, colour) in zip(axes, COLOURS.items(), strict=True):
    for length, width, shade in LENGTHS:
        found = list(predictor.windows(wave, 16000, window=length, hop=0.25))
        times, level = [(s + e) / 2 for s, e, _ in found], [values[name] for *_, values in found]
        axis.plot(times, level, color=colour, alpha=shade, linewidth=width)
    axis.set(title=name, xlabel="time in seconds", ylim=(0, 1))
axes[0].set_ylabel("value")
shades = [plt.Line2D([], [], color="0.2", alpha=shade, linewidth=width) for _, width, shade in LENGTHS]
figure.legend(shades, [f"{length:g} s window" for length, *_ in LENGTHS], loc="outside lower center", ncols=3, frameon=False)
plt.show()

# %% [markdown]
# ## Your own recording
#
# Put a path in and run the cell again. Any sampling rate and number of channels will do.

# %%
YOURS = None  # for example "interview.wav"

path = Path(YOURS) if YOURS else files[0]
for start, end, values in predictor.windows(audio.blocks(path), window=2.0, hop=1.0):
    print(f"{start:6.2f} s to {end:6.2f} s  ", "  ".join(f"{name} {value:.3f}" for name, value in values.items()))

# %% [markdown]
# - `audio.blocks` reads piece by piece, so an hour of audio needs no more memory than a few seconds.
# - Samples that you have already: `predictor(samples, sampling_rate)`, floating point in about −1 to 1.
# - To hear a file here: `IPython.display.Audio(path)`.
# - Without Python: `w2s predict quickstart/model interview.wav --window 2 --hop 1 --format csv`.
# - The smaller, faster file of the directory: `Predictor(QUICKSTART / "model", kind="int8")`.
#
# Next: [02_distil](02_distil.ipynb) makes such a model from nothing.
