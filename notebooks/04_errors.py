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
# # Errors: what a student gets wrong, and when
#
# One CCC says how close a student is to its teacher on average. It does not say whether the student errs on one speaker
# or on all, whether it plays safe, or what a telephone line does to it. This notebook takes the errors of a student
# apart:
#
# 1. errors against the teacher's value, by voice and by length of the clip;
# 2. calibration: are the predictions centred and spread like the teacher's values?
# 3. robustness: gain, noise, a telephone's band, short excerpts;
# 4. what int8 changes.
#
# Use it on your own run by setting `RUN`, `MODEL` and the data below. All errors here are **against the teacher**, and
# the teacher here is a stand-in: a rule that imitates emotion. How far the teacher itself is from people is another
# question, for `w2s eval --teacher` and a corpus with ratings.
#
# Like the first notebook, this one uses the directory that `make quickstart` leaves behind, or the one that
# `W2S_QUICKSTART` names, and makes a small one (40 training steps, about a minute) if neither has a model.

# %%
import os
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from w2s_jax import bank, evaluate, metrics, teachers
from w2s_jax.labels import Labels
from w2s_jax.render import render_on_host
from w2s_jax.runtime import Predictor
from w2s_jax.train import units
from w2s_jax.views import Views

warnings.filterwarnings("ignore", message="IProgress not found")  # of progress bars, and nothing here draws any

QUICKSTART = Path(os.environ.get("W2S_QUICKSTART") or "../quickstart")
if not (QUICKSTART / "model" / "model.onnx").exists():
    from w2s_jax import quickstart

    quickstart.run(QUICKSTART, steps=40)

RUN, MODEL = QUICKSTART / "run", QUICKSTART / "model"
the_bank = bank.Bank(QUICKSTART / "bank")
the_views = Views.read(QUICKSTART / "views.parquet")
the_labels = Labels.read(QUICKSTART / "labels", the_views)

COLOURS = {"arousal": "C0", "dominance": "C1", "valence": "C2"}  # the same in all notebooks
plt.rcParams |= {"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}

infer, dimensions, _ = evaluate.load(RUN)
rows = the_views.where("test")
student, taught = evaluate.predict_views(infer, the_bank, the_views, rows), the_labels.values[rows].astype(float)
clips = the_views.columns["clip"][rows]
voices = the_bank.clips["speaker"][clips]
error = student - taught
low, high = metrics.bootstrap_ccc(student, taught, groups=clips)
print(f"{len(rows)} test views of {len(set(clips))} clips and {len(set(voices))} voices, none of them in the training data")
for at, name in enumerate(dimensions):
    score = metrics.ccc(student, taught)[at]
    print(f"{name:<10} CCC {score:.3f} [{low[at]:.3f}, {high[at]:.3f}]  mean error {error[:, at].mean():+.3f}  ", end="")
    print(f"root mean square {np.sqrt((error[:, at] ** 2).mean()):.3f}")

# %% [markdown]
# ## 1. Errors
#
# ### Against the teacher's value

# %%
def binned(x, y, bins=8):
    """Means of x and y in bins of equally many x, and the standard deviation of y there."""
    parts = np.array_split(np.argsort(x), bins)
    return np.array([(x[part].mean(), y[part].mean(), y[part].std()) for part in parts]).T


TICKS = (0.2, 0.4, 0.6, 0.8)
figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), sharex=True, sharey=True, layout="constrained")
for at, (axis, (name, colour)) in enumerate(zip(axes, COLOURS.items(), strict=True)):
    axis.axhline(0, color="0.5", linewidth=1)
    axis.scatter(taught[:, at], error[:, at], s=8, color=colour, alpha=0.35, edgecolors="none")
    centre, mean, _ = binned(taught[:, at], error[:, at])
    axis.plot(centre, mean, "o-", color="black", markersize=4, linewidth=1.2, label="mean of an eighth of the views")
    axis.set(title=name, xlabel="teacher's value", xlim=(0, 1), xticks=TICKS)
axes[0].set_ylabel("student − teacher")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False)
plt.show()

# %% [markdown]
# **What to look at.** A black line that falls from left to right, as for arousal, is *regression to the mean*: low
# values come out too high, high ones too low. Some of it is unavoidable wherever a student is unsure. A line that
# rises, as for dominance here, says that the student overdoes it: low values come out too low, high ones too high
# (section 2 finds out why). A line that lies above or below zero as a whole is bias.
#
# ### By voice and by length
#
# Clips of one voice err together, which an average over all clips hides. This is where a student for new speakers most
# often fails.

# %%
names = sorted(set(voices))
lengths = the_bank.clips["samples"][clips] / 16000
groups = [(name, voices == name) for name in names]
groups += [("below 3.5 s", lengths < 3.5), ("above 4.5 s", lengths > 4.5)]
groups.insert(-1, ("3.5 to 4.5 s", (lengths >= 3.5) & (lengths <= 4.5)))

figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 5), sharex=True, layout="constrained")
places = np.arange(len(groups)) + 0.4 * (np.arange(len(groups)) >= len(names))
for at, (name, colour) in enumerate(COLOURS.items()):
    shift = (at - 1) * 0.26
    mean = [error[of, at].mean() for _, of in groups]
    spread = [error[of, at].std() for _, of in groups]
    top.bar(places + shift, mean, 0.24, yerr=spread, color=colour, label=name, error_kw={"ecolor": "0.35", "elinewidth": 1})
    score = np.array([metrics.ccc(student[of, at], taught[of, at])[0] for _, of in groups])
    limits = [metrics.bootstrap_ccc(student[of, at], taught[of, at], groups=clips[of], draws=300) for _, of in groups]
    whiskers = np.clip([[s - lo[0], hi[0] - s] for s, (lo, hi) in zip(score, limits, strict=True)], 0, None).T
    bottom.bar(places + shift, score, 0.24, yerr=whiskers, color=colour, error_kw={"ecolor": "0.35", "elinewidth": 1})
top.axhline(0, color="0.3", linewidth=1)
top.set(ylabel="student − teacher", title="mean error (line: one standard deviation), by voice and by length of the clip")
bottom.set(ylabel="CCC", title="CCC within the group (line: 95 % interval)", ylim=(min(0, bottom.get_ylim()[0]), 1))
bottom.set_xticks(places, [f"{label}\n({of.sum()} views)" for label, of in groups])
for axis in (top, bottom):
    axis.grid(axis="x", visible=False)
figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
plt.show()

# %% [markdown]
# **What to look at.** A bar in the upper picture far from zero is a voice that the student misjudges *as a whole*;
# within that voice it may still follow the ups and downs. Inside one voice the values vary less than over all voices,
# and CCC is lower for the same errors: compare voices with each other, not with the overall figure. Dominance shows it:
# the student tells the voices apart, and exaggerates the distance. The length of the clip hardly matters, since all
# views are 2 s. Four voices are few; judge on dozens.
#
# ## 2. Calibration
#
# CCC is a product of two parts (Lin 1989): **Pearson's r**, do both rise and fall together, and **C_b**, do they have
# one mean and one spread. Only the second can be mended by shifting and scaling.

# %%
print(f"{'':<11}{'CCC':>7}{'r':>8}{'C_b':>8}{'spread ratio':>15}{'mean error':>13}")
for at, name in enumerate(dimensions):
    score = metrics.ccc(student[:, at], taught[:, at])[0]
    r = np.corrcoef(student[:, at], taught[:, at])[0, 1]
    ratio = student[:, at].std() / taught[:, at].std()
    print(f"{name:<11}{score:7.3f}{r:8.3f}{score / r:8.3f}{ratio:15.2f}{error[:, at].mean():+13.3f}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 3.6), sharex=True, sharey=True, layout="constrained")
for at, (axis, (name, colour)) in enumerate(zip(axes, COLOURS.items(), strict=True)):
    axis.plot([0, 1], [0, 1], color="0.5", linewidth=1)
    centre, mean, spread = binned(taught[:, at], student[:, at])
    axis.errorbar(centre, mean, spread, fmt="o-", color=colour, markersize=5, capsize=2, label="given the teacher's value")
    centre, mean, _ = binned(student[:, at], taught[:, at])
    style = {"color": "0.35", "markersize": 4, "linewidth": 1, "markerfacecolor": "none"}
    axis.plot(mean, centre, "s--", label="given the prediction", **style)
    axis.set(title=name, xlabel="teacher's value", xlim=(0, 1), ylim=(0, 1), xticks=TICKS, yticks=TICKS, aspect="equal")
axes[0].set_ylabel("student's value")
handles, texts = axes[0].get_legend_handles_labels()
figure.legend(handles, texts, loc="outside lower center", ncols=2, frameon=False)
plt.show()

# %% [markdown]
# **What to look at.** Coloured: among views to which the teacher gives x, the student's mean (and standard deviation).
# Grey, dashed: among views to which the student gives y, the teacher's mean. With an imperfect r not both can lie on
# the diagonal. A student with the teacher's spread has them on either side of it, symmetrically (valence). Both steeper
# than the diagonal: it spreads too much (dominance). Both flatter: it plays safe.
#
# ### What `calibrate` does
#
# On voices that it does not know, a student is less sure, so its predictions spread less than the teacher's values, and
# CCC counts that as an error. After each evaluation in training, `units.calibrate` measures mean and spread on the
# *validation* views and folds a scale and a shift into the output layer: the network stays as small as it was. The
# price: squared error prefers the smaller spread. Here the predictions are shrunk and stretched about their mean:

# %%
ratios = np.linspace(0.4, 2.0, 65)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True, layout="constrained")
for at, (name, colour) in enumerate(COLOURS.items()):
    y, t = student[:, at], taught[:, at]
    now = y.std() / t.std()
    scaled = [y.mean() + ratio / now * (y - y.mean()) for ratio in ratios]
    score = [metrics.ccc(z, t)[0] for z in scaled]
    rms = [np.sqrt(((z - t) ** 2).mean()) for z in scaled]
    left.plot(ratios, score, color=colour, label=name)
    right.plot(ratios, rms, color=colour)
    left.plot(now, metrics.ccc(y, t)[0], "o", color=colour)
    right.plot(now, np.sqrt(((y - t) ** 2).mean()), "o", color=colour)
left.set(title="CCC: best at a ratio of about 1", ylabel="CCC", xlabel="spread ratio, student / teacher")
right.set(title="squared error: best below 1", ylabel="root mean square error", xlabel="spread ratio, student / teacher")
for axis in (left, right):
    axis.axvline(1, color="0.5", linewidth=1)
figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
plt.show()

# %% [markdown]
# The dots are the student as it is. A dot far from 1 says that the test voices are not like the validation voices, on
# which the scale was found. That is what happened to dominance here: **three validation voices are too few** to learn a
# spread from. The remedy is more voices for validation. Do not calibrate on test data: that would be measuring with the
# answer in hand.

# %%
trained = the_views.where("train")[::8]
for split, chosen in (("train", trained), ("validation", the_views.where("validation")), ("test", rows)):
    y, t = evaluate.predict_views(infer, the_bank, the_views, chosen), the_labels.values[chosen]
    print(f"{split:<11}spread ratio", dict(zip(dimensions, (y.std(axis=0) / t.std(axis=0)).round(2).tolist(), strict=True)))

# %% [markdown]
# On the validation views the ratio is 1, by construction. Where it is above 1 on the *training* voices as well, the
# scale stretches too much for everybody but those three.
#
# To see the function at work, take a student whose predictions are all shrunk to 60 %:

# %%
validation = the_views.where("validation")
known = the_labels.values[validation].astype(float)
timid = [
    0.6 * (values - values.mean(axis=0)) + values.mean(axis=0)
    for values in (evaluate.predict_views(infer, the_bank, the_views, validation), student)
]
shift, scale = units.calibrate(timid[0], known, np.ones(3))
print("scale found on validation views:", scale.round(2), " (1 / 0.6 = 1.67)")
for what, values in (("shrunk to 60 %", timid[1]), ("and calibrated", timid[1] * scale + shift), ("as trained", student)):
    print(f"{what:<15} test CCC {metrics.ccc(values, taught).round(3)}  spread {(values.std(0) / taught.std(0)).round(2)}")

# %% [markdown]
# ## 3. Robustness
#
# What happens to the answer when the recording gets worse, while what is said stays the same? The student gets changed
# audio and is compared with the teacher's label of the **clean** audio. Because the teacher here is cheap, it labels the
# changed audio too (dashed): where even the teacher leaves its own clean label, a student that learned from clean
# speech cannot be expected to stay.

# %%
some = rows[:: max(1, len(rows) // 100)]
waves = render_on_host(the_bank, the_views, some)
clean = the_labels.values[some].astype(float)
teacher = teachers.load("acoustic")
predictor = Predictor(MODEL)


def by_student(waves):
    """[B, T] → [B, 3]"""
    return np.array([list(predictor(wave).values()) for wave in waves])


reference = by_student(waves)
for decibels in (-60, -40, -20, 20, 40):
    changed = by_student(waves * np.float32(10 ** (decibels / 20)))
    largest, score = np.abs(changed - reference).max(), metrics.ccc(changed, clean).round(3)
    print(f"gain {decibels:+d} dB: largest change of a value {largest:.0e}, CCC with the label {score}")
print("CCC as recorded:                                          ", metrics.ccc(reference, clean).round(3))

# %% [markdown]
# **Gain must change nothing**, because the network divides each recording by its own level. Upwards only rounding is
# left. Downwards there is a limit: before it divides, the network adds 1e-7 to the power, so that silence stays
# silence. A recording whose power is near that (an RMS of 0.0003, −70 dB of full scale) is no longer brought to the
# full level; a microphone's noise lies there as well. If your recordings are that quiet, scale them first. (Overdrive
# is another thing: a clipped recording is a different sound.)

# %%
def noisy(waves, snr_db):
    """White noise at a signal-to-noise ratio."""
    noise = np.random.default_rng(0).standard_normal(waves.shape).astype(np.float32)
    level = np.sqrt((waves**2).mean(axis=1, keepdims=True)) * np.float32(10 ** (-snr_db / 20))
    return waves + level * noise


def band(waves, low, high):
    """Only the frequencies from low to high, in Hz."""
    spectrum = np.fft.rfft(waves)
    frequencies = np.fft.rfftfreq(waves.shape[1], 1 / 16000)
    return np.fft.irfft(spectrum * ((frequencies >= low) & (frequencies <= high)), waves.shape[1]).astype(np.float32)


ratios = [80, 70, 60, 50, 40, 30, 20, 10, 0]
noised = [(by_student(changed), teacher(changed)) for changed in (noisy(waves, ratio) for ratio in ratios)]
seconds = [0.25, 0.5, 1.0, 1.5, 2.0]
cut = [(by_student(part), teacher(part)) for part in (waves[:, : round(s * 16000)] for s in seconds)]

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
for at, (name, colour) in enumerate(COLOURS.items()):
    for axis, x, pairs in ((left, ratios, noised), (right, seconds, cut)):
        axis.plot(x, [metrics.ccc(y[:, at], clean[:, at])[0] for y, _ in pairs], "o-", color=colour, label=name)
        axis.plot(x, [metrics.ccc(t[:, at], clean[:, at])[0] for _, t in pairs], "--", color=colour, linewidth=1)
left.set(title="white noise", xlabel="signal-to-noise ratio in dB", ylabel="CCC with the clean label")
left.set(xlim=(83, -3), ylim=(min(-0.1, left.get_ylim()[0]), 1.03))
right.set(title="only the beginning of the view", xlabel="seconds heard of 2 s")
handles, texts = left.get_legend_handles_labels()
handles += [plt.Line2D([], [], color="0.3", marker="o"), plt.Line2D([], [], color="0.3", linestyle="--", linewidth=1)]
figure.legend(handles, [*texts, "student", "teacher itself"], loc="outside lower center", ncols=5, frameon=False)
plt.show()

# %% [markdown]
# **What to look at.** Where does a curve leave its plateau? That is the noise that the application may have. The
# student leaves it long before its teacher: synthetic speech has perfect digital silence between the words, nothing
# else occurred in training, and noise that no ear would notice fills those gaps in the log-mel image. Real recordings
# in training, and mixtures (`w2s views draw --mix 0.5`), are the remedy. At 10 dB the teacher goes too: the rule
# *measures* spectral balance, and white noise changes exactly that.
#
# On the right, much of the loss is not the student's: half a second is simply not the same utterance, for the teacher
# either.

# %%
hum = np.sin(2 * np.pi * 50 / 16000 * np.arange(waves.shape[1]), dtype=np.float32)
hum = 0.1 * hum * np.sqrt(2 * (waves**2).mean(axis=1, keepdims=True))
conditions = {
    "as recorded": waves,
    "gain −20 dB": waves * np.float32(0.1),
    "0 to 4 kHz": band(waves, 0, 4000),
    "telephone\n0.3 to 3.4 kHz": band(waves, 300, 3400),
    "8 bits": np.round(waves * 128) / np.float32(128),
    "hum of 50 Hz,\n20 dB SNR": waves + hum,
}
figure, axis = plt.subplots(figsize=(9, 3.8), layout="constrained")
for at, (name, colour) in enumerate(COLOURS.items()):
    for place, changed in enumerate(conditions.values()):
        y, t = by_student(changed)[:, at], teacher(changed)[:, at]
        x = place + (at - 1) * 0.26
        axis.bar(x, metrics.ccc(y, clean[:, at])[0], 0.24, color=colour, label=name if place == 0 else None)
        score = metrics.ccc(t, clean[:, at])[0]
        label = "teacher itself" if (at, place) == (2, 0) else None
        axis.plot([x - 0.12, x + 0.12], [score, score], color="black", label=label)
axis.axhline(0, color="0.3", linewidth=1)
axis.set(ylabel="CCC with the clean label")
axis.set_xticks(range(len(conditions)), conditions)
axis.grid(axis="x", visible=False)
figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
plt.show()

# %% [markdown]
# **What to look at.** Short black lines: the teacher on the same changed audio. A bar far below its line is the
# student's own weakness, and training on such audio can mend it. A line that is low itself is a limit of the teacher.
# For telephone speech, train on telephone speech: band-limit the corpus before `w2s bank build`, and let the teacher
# listen to what the student will get.
#
# ## 4. int8 against fp32
#
# The small file computes with 8-bit integers. Is its rounding visible beside the student's error?

# %%
all_waves = render_on_host(the_bank, the_views, rows)
by_kind = {
    kind: np.array([list(run(wave).values()) for wave in all_waves])
    for kind, run in ((kind, Predictor(MODEL, kind=kind)) for kind in ("fp32", "int8"))
}
difference = by_kind["int8"] - by_kind["fp32"]
print(f"{'':<11}{'CCC fp32':>9}{'CCC int8':>10}{'int8 with fp32':>16}{'rms int8 − fp32':>18}{'rms fp32 − teacher':>20}")
for at, name in enumerate(dimensions):
    fp32, int8 = by_kind["fp32"][:, at], by_kind["int8"][:, at]
    with_teacher = [metrics.ccc(values, taught[:, at])[0] for values in (fp32, int8)]
    own, rms = np.sqrt((difference[:, at] ** 2).mean()), np.sqrt(((fp32 - taught[:, at]) ** 2).mean())
    print(f"{name:<11}{with_teacher[0]:9.3f}{with_teacher[1]:10.3f}{metrics.ccc(int8, fp32)[0]:16.4f}{own:18.4f}{rms:20.4f}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), sharex=True, sharey=True, layout="constrained")
bins = np.linspace(-0.25, 0.25, 51)
for at, (axis, (name, colour)) in enumerate(zip(axes, COLOURS.items(), strict=True)):
    axis.hist(np.clip(by_kind["fp32"][:, at] - taught[:, at], -0.249, 0.249), bins, color="0.75", label="fp32 − teacher")
    axis.hist(np.clip(difference[:, at], -0.249, 0.249), bins, histtype="step", linewidth=1.6, color=colour)
    axis.set(title=name, xlabel="difference in value", yscale="log")
axes[0].set_ylabel("number of views")
handles = [plt.Rectangle((0, 0), 1, 1, color="0.75"), plt.Line2D([], [], color="0.2", linewidth=1.6)]
figure.legend(handles, ["fp32 − teacher", "int8 − fp32"], loc="outside lower center", ncols=2, frameon=False)
plt.show()

# %% [markdown]
# **What to look at.** The outlined histogram (rounding) should be much narrower than the grey one (the student's
# error). Then the smaller, faster file costs nothing that can be measured. If it does not, give the export more
# calibration audio, of the kind that the model will get.
