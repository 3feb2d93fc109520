"""Which fields of Wav2Small buy accuracy, and what they cost: a sweep with its Pareto fronts.

Claim: on one bank and with equal training, the published sizes are not on the Pareto front of CCC against multiply-accumulates,
bytes and milliseconds: some cheaper network is as good within the uncertainty of the test split.

    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
    python experiments/variants.py --bank runs/czech/bank --views runs/czech/views.parquet --labels runs/czech/labels \\
        --out runs/variants [--steps 500] [--only published channels_8]

The example's bank is that of experiments/czech_dnsmos.py; any bank will do. To train one variant alone:
``w2s train experiments/variants.py:channels_8``. The script can be killed at any point and goes on when run again; what is
finished is not trained again. It needs the extras train and export.

Hardware: 2 CPU cores. 11 variants with --steps 150 took 12.5 minutes and gave a mean CCC of 0.47 to 0.61
(experiments/README.md); all 14 with 500 steps: not yet run.

Each variant is trained once, so differences between variants contain that between seeds: 0.005 in the mean CCC on the Czech
bank (experiments/README.md). OUT gets a run per variant, with its model directory in it, and variants.json, .csv, .md and .png.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from w2s_jax.config import default
from w2s_jax.errors import UsageError, W2SError
from w2s_jax.files import write_atomic, write_json

#: Fields that differ from the published network's, by the name of the variant.
VARIANTS = {
    "published": {},
    "channels_8": {"channels": 8},
    "channels_16": {"channels": 16},
    "channels_24": {"channels": 24},
    "depth_2+2": {"before": 2, "after": 2},
    "depth_3+2": {"before": 3, "after": 2},
    "kernel_5": {"kernel": 5},
    "mels_13": {"n_mels": 13},
    "mels_40": {"n_mels": 40, "n_fft": 128},  # with n_fft 64, seven bands would lie between frequencies
    "hop_64": {"hop": 64, "n_fft": 128},
    "stride_2": {"stride": 2},
    "mean": {"pooling": "mean"},
    "statistics": {"pooling": "statistics"},
    "17k": {},
}
STUDENTS = {"17k": "wav2small_17k"}

#: What a variant may cost: key of a row, name and unit on the axis.
COSTS = {
    "macs": ("multiply-accumulates for 5 s", ""),
    "bytes": ("fp32 ONNX file", "B"),
    "milliseconds": ("time for 5 s, one thread", "s"),
}


def get_config(variant: str) -> ConfigDict:
    """The settings of experiments/czech_dnsmos.py with fewer steps."""
    config = default(STUDENTS.get(variant, "wav2small"))
    config.update({"learning_rate": 3e-3, "crop": 0.6, "ema": 0.99, "weight_decay": 0.05, "steps": 500, "eval_every": 125})
    config.fields = VARIANTS[variant]
    return config


def pareto(cost: Sequence[float], score: Sequence[float]) -> list[int]:
    """Indices of what nothing else beats, by rising cost: [N] costs and [N] scores, the more the better.

    One beats another if it costs no more and scores no less, and is better in one of the two. Equals do not beat each other.

    >>> pareto([1, 2, 3], [0.5, 0.4, 0.6])
    [0, 2]
    """
    cost, score = np.asarray(cost), np.asarray(score)
    no_worse = (cost[:, None] <= cost) & (score[:, None] >= score)  # [i, j]: i than j
    beaten = (no_worse & ~no_worse.T).any(axis=0)
    return sorted(np.flatnonzero(~beaten).tolist(), key=lambda at: (cost[at], at))


def sweep(
    bank_path: Path, views_path: Path, labels_path: Path, out: Path, names: Sequence[str], steps: int | None
) -> list[dict]:
    """Train, evaluate, export and measure the variants ``names``: a row of figures each."""
    from w2s_jax import bench, evaluate, export, models
    from w2s_jax.bank import Bank
    from w2s_jax.cli.progress import Reporter
    from w2s_jax.labels import Labels
    from w2s_jax.train import train
    from w2s_jax.views import Views

    bank, the_views = Bank(bank_path), Views.read(views_path)
    the_labels = Labels.read(labels_path, the_views)
    rows, files = [], {}
    tested = len(set(the_views.columns["clip"][the_views.where("test")]))
    if tested < evaluate.FEWEST_CLIPS:
        raise UsageError(f"the views are of {tested} test clips; intervals of CCC need {evaluate.FEWEST_CLIPS} at least")
    for name in names:
        config = get_config(name)
        student = models.build(config.student, dimensions=len(the_labels.dimensions), **config.fields)
        parameters, macs = sum(models.count(student).values()), models.macs(student)
        rows.append({"variant": name, "fields": VARIANTS[name], "parameters": parameters, "macs": macs})
    for number, row in enumerate(rows, start=1):
        name = row["variant"]
        config, run = get_config(name), out / name
        config.steps = steps or config.steps
        title = f"{number}/{len(rows)} {name}"
        _say(f"{title}: {row['parameters']:,} parameters, {row['macs'] / 1e6:,.0f} MMAC")
        with Reporter(title, "steps") as reporter:
            train(config, bank, the_views, the_labels, run, progress=reporter.report)
        _say(f"{title}: evaluating on the test split")
        scores = evaluate.evaluate(run, bank, the_views, the_labels, out=run)["teacher"]
        row["mean"] = scores.pop("mean")
        # at least about as wide as the interval of the mean itself: as if the dimensions erred together
        row |= {end: round(float(np.mean([score[end] for score in scores.values()])), 4) for end in ("low", "high")}
        row["ccc"] = scores
        _say(f"{title}: test CCC {row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]")
        files[name] = run / "model" / "model.onnx"
        if not files[name].exists():  # in the run, which trains nothing else ever: what is there is of this student
            export.export_student(run, run / "model", message=lambda line, title=title: _say(f"{title}: {line}"))
    _say("measuring, all variants in turn")
    measured = bench.measure(files, seconds=5.0, runs=30, memory=False)
    for row in rows:
        row |= {key: measured[row["variant"]][key] for key in ("bytes", "milliseconds", "p95_milliseconds")}
    for cost in COSTS:
        front = pareto([row[cost] for row in rows], [row["mean"] for row in rows])
        for at, row in enumerate(rows):
            row.setdefault("pareto", {})[cost] = at in front
    return rows


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def save(rows: list[dict], out: Path) -> str:
    """Write variants.json, .csv, .md and .png; returns the Markdown table."""
    write_json(out / "variants.json", {"variants": rows})
    dimensions = list(rows[0]["ccc"])
    plain = ["variant", "parameters", "macs", "bytes", "milliseconds", "p95_milliseconds", "mean", "low", "high"]

    def write_csv(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            ends = [f"{name}{end}" for name in dimensions for end in ("", "_low", "_high")]
            writer.writerow([*plain, *ends, *(f"pareto_{cost}" for cost in COSTS)])
            for row in rows:
                scores = [row["ccc"][name][end] for name in dimensions for end in ("ccc", "low", "high")]
                writer.writerow([*(row[key] for key in plain), *scores, *(int(row["pareto"][cost]) for cost in COSTS)])

    write_atomic(out / "variants.csv", write_csv)
    lines = [
        f"| variant | parameters | MMAC | kB | ms | {' | '.join(dimensions)} | mean | on the front of |",
        "|---" * (7 + len(dimensions)) + "|",
    ]
    for row in rows:
        fronts = ", ".join({"macs": "MACs", "bytes": "bytes", "milliseconds": "time"}[c] for c in COSTS if row["pareto"][c])
        scores = [f"{row['ccc'][name]['ccc']:.3f}" for name in dimensions]
        mean = f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        costs = [
            f"{row['parameters']:,}",
            f"{row['macs'] / 1e6:.0f}",
            f"{row['bytes'] / 1e3:.0f}",
            f"{row['milliseconds']:.2f}",
        ]
        lines.append(f"| {' | '.join([row['variant'], *costs, *scores, mean, fronts])} |")
    table = "\n".join(lines) + "\n"
    write_atomic(out / "variants.md", lambda temporary: temporary.write_text(table, encoding="utf-8"))
    draw(rows, out / "variants.png")
    return table


def draw(rows: list[dict], path: Path) -> None:
    """Mean CCC against each cost: three panels, the Pareto front as a step line, its members named."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    figure = Figure(figsize=(13, 4.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(COSTS), sharey=True)
    mean, low, high = (np.array([row[key] for row in rows]) for key in ("mean", "low", "high"))
    for axis, (cost, (title, unit)) in zip(axes, COSTS.items(), strict=True):
        values = np.array([row[cost] for row in rows], float) * (1e-3 if unit == "s" else 1)
        front = pareto(values, mean)
        bars = np.maximum([mean - low, high - mean], 0)
        axis.errorbar(values, mean, bars, fmt="o", markersize=4, color="0.6", ecolor="0.85", zorder=1)
        axis.set_xscale("log")
        axis.margins(x=0.15)
        axis.set_xlim(axis.get_xlim())
        edge = [*values[front], axis.get_xlim()[1]], [*mean[front], mean[front[-1]]]
        axis.step(*edge, where="post", color="tab:blue", linewidth=1, zorder=2)
        axis.errorbar(
            values[front], mean[front], bars[:, front], fmt="o", markersize=5, color="tab:blue", elinewidth=1, zorder=3
        )
        left, right = axis.get_xlim()
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if right > 8 * left else MaxNLocator(4))
        axis.xaxis.set_major_formatter(EngFormatter(unit))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(title)
        axis.grid(color="0.93", zorder=0)
    axes[0].set_ylabel("mean CCC with the teacher, test split")
    figure.canvas.draw()  # the layout decides where the labels have room
    figure.set_layout_engine("none")
    for axis, (cost, (_, unit)) in zip(axes, COSTS.items(), strict=True):
        values = np.array([row[cost] for row in rows], float) * (1e-3 if unit == "s" else 1)
        _name(axis, [row["variant"] for row in rows], values, mean, low, high, pareto(values, mean))
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png"))


def _name(axis, names: list[str], x: np.ndarray, y: np.ndarray, low: np.ndarray, high: np.ndarray, chosen: list[int]) -> None:
    """Write the names of the ``chosen`` points near them, where they cover the least of points, lines and other names."""
    from matplotlib.transforms import Bbox

    pixels = axis.transData.transform
    taken = [Bbox(pixels((a, b)) + np.array([[-5, -5], [5, 5]])) for a, b in zip(x, y, strict=True)]
    taken += [Bbox([pixels((a, b)) - (2, 0), pixels((a, c)) + (2, 0)]) for a, b, c in zip(x, low, high, strict=True)]
    frame = axis.get_window_extent()
    corners = pixels(np.column_stack([x[chosen], y[chosen]]))
    for (left, bottom), (right, top) in zip(corners, [*corners[1:], (frame.x1, corners[-1][1])], strict=True):  # the step line
        taken += [Bbox([(left, bottom - 2), (right, bottom + 2)]), Bbox([(right - 2, bottom), (right + 2, top)])]
    # nearest first, because min() keeps the first of equals
    places = [(r, t) for r in (10, 25, 40, 60, 85, 115, 150) for t in np.radians([45, 135, -45, -135, 90, -90, 0, 180])]
    for at in chosen:
        note = axis.annotate(
            names[at], (x[at], y[at]), (0, 0), textcoords="offset pixels", fontsize=8, zorder=4,
            arrowprops={"arrowstyle": "-", "color": "tab:blue", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip
        size = np.array(note.get_window_extent().size)

        def box(place: tuple[float, float], at: int = at, size: np.ndarray = size) -> Bbox:
            direction = np.array([np.cos(place[1]), np.sin(place[1])])
            corner = pixels((x[at], y[at])) + place[0] * direction + (direction - 1) / 2 * size
            return Bbox([corner, corner + size])

        def fault(place: tuple[float, float], box=box) -> int:
            (left, bottom), (right, top) = box(place).get_points()
            inside = frame.x0 <= left and frame.y0 <= bottom and right <= frame.x1 and top <= frame.y1
            return sum(box(place).overlaps(other) for other in taken) + 100 * (not inside)

        best = box(min(places, key=fault))
        note.set_position(best.p0 - pixels((x[at], y[at])))
        taken.append(best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=Path, required=True)
    parser.add_argument("--views", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="runs, models, table and picture; go on from what is there")
    parser.add_argument("--steps", type=int, help="of each variant; default: 500")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="NAME", help=f"of {', '.join(VARIANTS)}; default: all")
    arguments = parser.parse_args()
    names = list(dict.fromkeys(arguments.only or VARIANTS))
    try:
        rows = sweep(arguments.bank, arguments.views, arguments.labels, arguments.out, names, arguments.steps)
        print(save(rows, arguments.out))
    except W2SError as error:  # a signal too: train says how to go on
        _say(f"error: {error}")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
