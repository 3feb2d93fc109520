"""Pictures of a training run and of an evaluation."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from w2s_jax.errors import UsageError
from w2s_jax.files import write_atomic
from w2s_jax.log import read_log


def plot_run(workdir: str | os.PathLike) -> Path:
    """Draw a run's metrics.jsonl as ``workdir``/training.png: loss, CCC, learning rate, gradient norm and speed over steps.

    Returns:
        The path of the picture.

    Raises:
        UsageError: the run has no log yet.
    """
    path = Path(workdir) / "metrics.jsonl"
    lines, _ = read_log(path)
    if not lines:
        raise UsageError(f"nothing to draw in {workdir}: it has no metrics.jsonl, or no whole line is in it")
    train = [line for line in lines if line.get("kind") == "train"]
    validation = [line for line in lines if line.get("kind") == "validation"]
    figure = _new_figure(12.5, 6.6)
    panels = figure.subplot_mosaic([["loss", "ccc", "ccc"], ["gradient", "rate", "speed"]], width_ratios=(1, 0.8, 1.2))
    _panel(panels["loss"], "loss (1 − CCC + l2 · squared error)", _series(train, "loss"), log=True)
    _panel(panels["gradient"], "global norm of the gradient", _series(train, "gradient_norm"), log=True)
    _panel(panels["rate"], "learning rate", _series(train, "learning_rate"), smooth=False)
    _panel(panels["speed"], "training speed, clips/s", _series(train, "clips_per_second"), smooth=False)
    panels["rate"].ticklabel_format(axis="y", scilimits=(-2, 3))
    for name in ("rate", "speed"):
        panels[name].set_ylim(bottom=0)
    _shares(panels["speed"], train)
    _concordance(panels["ccc"], train, validation)
    last = max(line["step"] for line in lines)
    for panel in panels.values():
        panel.set_xlim(0, 1.02 * max(last, 1))
        panel.set_xlabel("step", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(color="0.93")
        panel.set_axisbelow(True)
    figure.suptitle(f"{Path(workdir).resolve().name}: {last:,} steps", fontsize=10)
    picture = Path(workdir) / "training.png"
    write_atomic(picture, lambda temporary: figure.savefig(temporary, format="png"))
    return picture


def _series(lines: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one quantity, from the lines in which it is a number that can be drawn."""
    found = [(line["step"], line[key]) for line in lines if type(line.get(key)) in (int, float) and abs(line[key]) < 1e100]
    found.sort(key=lambda pair: pair[0])
    return np.array([step for step, _ in found], float), np.array([value for _, value in found], float)


def _panel(axis, name: str, series: tuple[np.ndarray, np.ndarray], *, log: bool = False, smooth: bool = True) -> None:
    """Draw one quantity over steps: light as logged, strong its running mean; with points where there are few."""
    step, value = series
    axis.set_ylabel(name, fontsize=9)
    if not len(step):
        axis.text(0.5, 0.5, "nothing logged", transform=axis.transAxes, ha="center", va="center", color="0.6", fontsize=9)
        axis.set_yticks([])
        return
    many = smooth and len(step) >= 30
    _line(axis, step, value, color="tab:blue", alpha=0.3 if many else 1, linewidth=1)
    if many:
        axis.plot(step, _smooth(value), color="tab:blue", linewidth=1.6)
    if log and value.min() > 0 and value.max() > 3 * value.min():
        from matplotlib.ticker import LogLocator, NullFormatter

        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())


def _line(axis, step: np.ndarray, value: np.ndarray, **look) -> None:
    axis.plot(step, value, marker="o" if len(step) < 30 else "", markersize=3, **look)


def _smooth(value: np.ndarray) -> np.ndarray:
    """Mean of the nearest fifteenth of the points, of fewer at the ends; few points stay as they are."""
    width = len(value) // 15 | 1
    ones = np.ones(width)
    return np.convolve(value, ones, "same") / np.convolve(np.ones(len(value)), ones, "same")


def _shares(axis, train: list[dict]) -> None:
    """Beside the speed, shares in per cent: of the arithmetic limit, and of the time spent waiting for data."""
    shares = {"arithmetic_share": ("of the arithmetic limit", "tab:orange"), "waiting_share": ("waiting for data", "tab:red")}
    found = {key: _series(train, key) for key in shares if len(_series(train, key)[0])}
    if not found:
        return
    right = axis.twinx()
    for key, (step, value) in found.items():
        name, color = shares[key]
        _line(right, step, 100 * value, color=color, linewidth=1, label=name)
    right.set_ylabel("share, %", fontsize=9)
    right.set_ylim(0, max(1.15 * right.get_ylim()[1], 1e-3))
    right.tick_params(labelsize=8)
    right.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.99), ncols=2, frameon=False)


def _concordance(axis, train: list[dict], validation: list[dict]) -> None:
    """CCC per dimension: training light, validation strong, the best mean marked."""
    names = list(dict.fromkeys(key for line in [*validation, *train] for key in line if key.startswith("ccc/")))
    dimensions = [name for name in names if name != "ccc/mean"]
    axis.set_ylabel("CCC with the teacher's labels", fontsize=9)
    drawn = []
    for at, name in enumerate(dimensions[:9]):
        color, title = f"C{at}", name.removeprefix("ccc/").replace("$", r"\$")
        step, value = _series(train, name)
        value = _smooth(value) if len(value) else value  # batches are small: single ones would hide the validation
        _line(axis, step, value, color=color, alpha=0.4, linewidth=1, label=None if validation else title)
        drawn.append(value)
        step, value = _series(validation, name)
        _line(axis, step, value, color=color, linewidth=1.8, label=title if validation else None)
        drawn.append(value)
    step, value = _series(validation, "ccc/mean")
    if len(step):
        best = int(np.argmax(value))
        _line(axis, step, value, color="black", linewidth=1.8, linestyle="--", label="mean")
        axis.plot(step[best], value[best], marker="*", markersize=13, color="black", linestyle="",
                  label=f"best mean: {value[best]:.3f}\nat step {step[best]:,.0f}")  # fmt: skip
        drawn.append(value)
    values = np.concatenate([*drawn, np.empty(0)])
    if not len(values):
        axis.text(0.5, 0.5, "nothing logged", transform=axis.transAxes, ha="center", va="center", color="0.6", fontsize=9)
        return
    # CCC lies in −1…1; outliers far below belong to the first steps
    axis.set_ylim(max(min(0.0, float(np.percentile(values, 2)) - 0.02), -1.02), 1.02)
    title = "strong: validation\nlight: training batches" if validation else "training batches"
    axis.legend(fontsize=8, title=title, title_fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def scatter(path: Path, panels: list, title: str, who: str = "student") -> None:
    """Draw prediction against target, a row per comparison and a panel per dimension, as PNG.

    ``panels`` is a list of (what the target is, names, predicted [N, D], target [N, D], scores).
    """
    columns = max(len(names) for _, names, *_ in panels)
    figure = _new_figure(3.4 * columns, 3.6 * len(panels))
    axes = figure.subplots(len(panels), columns, squeeze=False)
    for row, (what, names, predicted, target, scores) in zip(axes, panels, strict=True):
        for at, axis in enumerate(row):
            if at >= len(names):
                axis.set_visible(False)
                continue
            x, y = target[:, at], predicted[:, at]
            low, high = min(x.min(), y.min()), max(x.max(), y.max())
            margin = 0.05 * (high - low) or 0.05
            axis.plot([low, high], [low, high], color="0.6", linewidth=1, zorder=1)
            axis.scatter(x, y, s=7, alpha=min(1.0, 0.15 + 60 / len(x)), color="tab:blue", edgecolors="none", zorder=2)
            score = scores[names[at]]
            interval = "" if score["low"] is None else f" [{score['low']:.3f}, {score['high']:.3f}]"
            axis.set_title(f"{names[at]}: CCC {score['ccc']:.3f}{interval}", fontsize=9)
            axis.set_xlabel(what, fontsize=9)
            axis.set_xlim(low - margin, high + margin)
            axis.set_ylim(low - margin, high + margin)
            axis.set_aspect("equal")
        row[0].set_ylabel(who, fontsize=9)
    figure.suptitle(title, fontsize=10)
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png"))


def _new_figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
