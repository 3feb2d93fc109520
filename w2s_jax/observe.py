"""What a training run shows of itself: its log, its picture, its arithmetic, its memory, and a trace of where time goes."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax import models
from w2s_jax.errors import UsageError, W2SError
from w2s_jax.files import write_atomic

#: Peak dense FLOP/s of one JAX device: what ``device_kind`` matches, float32 as XLA computes it by default, bfloat16 (None: no
#: unit for it). By default XLA multiplies float32 in TF32 on NVIDIA's Ampere and later, in one bfloat16 pass on TPUs
#: (docs.jax.dev, jax.lax.Precision). NVIDIA: data sheets of H100, H200, A100, V100, T4, L4 and the whitepaper of Ada
#: (appendix A); where a sheet counts sparse products, half of it. TPU: cloud.google.com/tpu/docs/system-architecture, pages v2
#: to v6e; a JAX device is half a chip in v2 and v3.
PEAKS: tuple[tuple[str, float, float | None], ...] = (
    (r"\bH200 NVL\b", 417.5e12, 835.5e12),
    (r"\bH200\b", 494.5e12, 989e12),
    (r"\bH100 NVL\b", 417.5e12, 835.5e12),
    (r"\bH100 PCIe\b", 378e12, 756e12),
    (r"\bH100\b", 494.5e12, 989e12),
    (r"\bA100\b", 156e12, 312e12),
    (r"\bV100-PCIE\b", 14e12, None),
    (r"\bV100\b", 15.7e12, None),
    (r"\bT4\b", 8.1e12, None),
    (r"\bL4\b", 60e12, 121e12),
    (r"\bRTX 4090$", 82.6e12, 165.2e12),
    (r"^TPU v2\b", 22.5e12, 22.5e12),
    (r"^TPU v3\b", 61.5e12, 61.5e12),
    (r"^TPU v4$", 275e12, 275e12),
    (r"^TPU v5( lite|e)", 197e12, 197e12),
    (r"^TPU v5p?$", 459e12, 459e12),
    (r"^TPU v6( lite|e)", 918e12, 918e12),
)


class Log:
    """A run's metrics.jsonl and TensorBoard events; after a resumption, nothing of the steps that are run again.

    A line is ``{"step", "kind", figure: value, …}``, kind ``train`` or ``validation``.

    Args:
        workdir: of the run.
        done: steps that the run has behind it; lines of later steps, and what a kill left of a line, are dropped.
        active: False makes a log that writes nothing, for all processes of a run but the first.
    """

    def __init__(self, workdir: str | os.PathLike, done: int, *, active: bool = True) -> None:
        self._open = contextlib.ExitStack()
        self._file = self._board = None
        if not active:
            return
        self._path, self._events = Path(workdir) / "metrics.jsonl", Path(workdir) / "tensorboard"
        lines, lost = _lines(self._path)
        if lost:
            warnings.warn(f"{self._path} is damaged: {lost} lines of it cannot be read and are left out", stacklevel=2)
        if done and not lines:
            warnings.warn(f"{self._path} has no line of the {done} steps that are done", stacklevel=2)
        kept = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= done)
        write_atomic(self._path, lambda temporary: temporary.write_text(kept, encoding="utf-8"))
        with _told(self._path):
            # unbuffered: what could not be written would be written once more at the end
            self._file = self._open.enter_context(self._path.open("ab", buffering=0))
        with _told(self._events):
            self._board = _Board(self._events, done)
            self._open.callback(self._board.close)

    def write(self, kind: str, step: int, figures: dict[str, float]) -> None:
        """Add a line; it is on its way to the disk when this returns.

        Raises:
            W2SError: the disk is full; names the file.
        """
        if self._file is None:
            return
        line = {"step": step, "kind": kind, **{key: round(value, 6) for key, value in figures.items()}}
        left = (json.dumps(line) + "\n").encode()
        with _told(self._path):
            while left:
                left = left[self._file.write(left) :]
        with _told(self._events):
            self._board.add({f"{kind}/{key}": value for key, value in figures.items()}, step)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_) -> None:
        self._open.close()


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the system says against writing is told with the path."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(path.parent).free / 2**20
        raise W2SError(
            f"cannot write {path}: {error.strerror or error} ({free:.1f} MiB free); the last whole checkpoint is kept, and the "
            "same command goes on from it"
        ) from error


class _Board:
    """TensorBoard's events, in this thread: that of tensorboardX's own writer ends at an error, which nobody hears of."""

    def __init__(self, directory: Path, done: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        directory.mkdir(parents=True, exist_ok=True)
        self._event, self._scalar = event_pb2.Event, scalar
        self._writer = EventsWriter(str(directory / "events"))
        if done:  # events of later steps, which a kill left, are hidden
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.write_event(event_pb2.Event(step=done + 1, file_version="brain.Event:2"))
            self._writer.write_event(event_pb2.Event(step=done + 1, session_log=start))

    def add(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            event = self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value))
            self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # all was flushed, or could not be, and that was told
            self._writer.close()


def _lines(path: Path) -> tuple[list[dict], int]:
    """The lines of a log that are whole: objects with a step. And how many others there are, but for half a last one."""
    found, lost = [], 0
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    parts = text.split("\n")
    for number, part in enumerate(parts, start=1):
        try:
            line = json.loads(part)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] < 2**53:
            found.append(line)
        elif number < len(parts):  # the last can be what a kill left
            lost += 1
    return found, lost


def flops(student: nn.Module, samples: int) -> int:
    """Floating-point operations of training on one clip: 2 a multiply-accumulate, three times those of the forward pass.

    The three are the forward pass, the gradient of the inputs and that of the weights. The front end's are counted as if it
    were trained, too: 3 % of Wav2Small. Optimiser, BatchNorm and activations are not counted.

    Args:
        student: from ``models.build``.
        samples: of the clip, at 16 kHz.

    Raises:
        UsageError: the clip is too short for the student.

    Example:
        >>> flops(models.build("wav2small"), 80_000)
        2345802246
    """
    return 2 * 3 * models.macs(student, samples)


def peak_flops(device: jax.Device, dtype: str = "float32") -> float | None:
    """What a device can compute at most, in FLOP/s.

    Args:
        device: of ``jax.devices()``. Accelerators are looked up (``PEAKS``); a CPU is measured once, 0.3 s of matrix products
            on all of its cores, and is as busy as the machine is then.
        dtype: float32 (as XLA multiplies it by default: TF32 on NVIDIA's Ampere and later, bfloat16 on TPUs) or bfloat16.

    Returns:
        FLOP/s of dense products, or None: the device is not in the table, a part of one (MIG), or has no unit for ``dtype``.

    Raises:
        UsageError: another dtype.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UsageError(f"dtype is {dtype!r}; limits are known for float32 and bfloat16")
    if device.platform == "cpu":
        return _measured(device, dtype)
    kind = device.device_kind
    if "MIG" in kind:
        return None
    return next((peaks[dtype == "bfloat16"] for pattern, *peaks in PEAKS if re.search(pattern, kind)), None)


@functools.cache
def _measured(device: jax.Device, dtype: str) -> float:
    size = 1024
    with jax.default_device(device):
        matrix = jnp.ones((size, size), dtype)
        product = jax.jit(jnp.dot)
        product(matrix, matrix).block_until_ready()  # compiles
        fastest, began = np.inf, time.perf_counter()
        while time.perf_counter() - began < 0.3:
            start = time.perf_counter()
            product(matrix, matrix).block_until_ready()
            fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def memory(devices: Sequence[jax.Device]) -> dict[str, int]:
    """Bytes of memory of the fullest of ``devices``: ``in_use``, ``peak`` and ``limit``, as far as it tells.

    For CPUs these are the process's resident memory, its largest, and the machine's.
    """
    if all(device.platform == "cpu" for device in devices):
        return _process_memory()
    told = [stats for device in devices if (stats := device.memory_stats())]
    names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use", "limit": "bytes_limit"}
    fullest = {name: max((stats.get(key, 0) for stats in told), default=0) for name, key in names.items()}
    return {name: value for name, value in fullest.items() if value}


def _process_memory() -> dict[str, int]:
    limit = {}
    with contextlib.suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf
        limit = {"limit": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}
    try:
        status = Path("/proc/self/status").read_text()
        kib = {name: int(value) for name, value in re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", status, re.M)}
        return {"in_use": kib["VmRSS"] * 1024, "peak": kib["VmHWM"] * 1024, **limit}
    except (OSError, KeyError):  # not Linux: only the largest is known
        try:
            import resource
        except ImportError:
            return limit
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"peak": peak, **limit}


@contextlib.contextmanager
def trace(directory: str | os.PathLike, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Record what devices and host do inside the ``with`` block, into ``directory``/plugins/profile/DATE.

    Keep the block to a few dispatches that are compiled already: a trace takes megabytes a second. Wait for the last result
    inside it (``jax.block_until_ready``), or its end is missing.

    Args:
        directory: usually WORKDIR/profile.
        say: called at the end with a line that tells how to open the trace.
    """
    with jax.profiler.trace(os.fspath(directory)):
        yield
    # jaxlib puts a bool where TensorFlow, if it is installed, has a function, and then no model can be converted any more
    hook = sys.modules.get("tensorflow.python.profiler.trace")
    if hook is not None and not callable(hook.enabled):
        hook.enabled = hook._pywrap_traceme.traceme_enabled
    if say:
        files = sorted(Path(directory).glob("plugins/profile/*/*.trace.json.gz"))
        where = files[-1] if files else directory
        say(
            f"trace: open {where} at ui.perfetto.dev, or pip install tensorboard tensorboard-plugin-profile and "
            f"run tensorboard --logdir {directory}"
        )


def plot(workdir: str | os.PathLike) -> Path:
    """Draw a run's metrics.jsonl as ``workdir``/training.png: loss, CCC, learning rate, gradient norm and speed over steps.

    Returns:
        The path of the picture.

    Raises:
        UsageError: the run has no log yet.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(workdir) / "metrics.jsonl"
    lines, _ = _lines(path)
    if not lines:
        raise UsageError(f"nothing to draw in {workdir}: it has no metrics.jsonl, or no whole line is in it")
    train = [line for line in lines if line.get("kind") == "train"]
    validation = [line for line in lines if line.get("kind") == "validation"]
    figure = Figure(figsize=(12.5, 6.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
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
    """Steps and values of a figure, where a line has it as a number that can be drawn."""
    found = [(line["step"], line[key]) for line in lines if type(line.get(key)) in (int, float) and abs(line[key]) < 1e100]
    found.sort(key=lambda pair: pair[0])
    return np.array([step for step, _ in found], float), np.array([value for _, value in found], float)


def _panel(axis, name: str, series: tuple[np.ndarray, np.ndarray], *, log: bool = False, smooth: bool = True) -> None:
    """One figure over steps: light as logged, strong its running mean; points where there are few."""
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
    # CCC lies in −1…1; what is far below the bulk belongs to the first steps
    axis.set_ylim(max(min(0.0, float(np.percentile(values, 2)) - 0.02), -1.02), 1.02)
    title = "strong: validation\nlight: training batches" if validation else "training batches"
    axis.legend(fontsize=8, title=title, title_fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
