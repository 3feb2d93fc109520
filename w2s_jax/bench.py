"""What models cost on this machine: parameters, multiply-accumulates, bytes, peak memory and time, beside the paper's figures.

Students are measured with random weights, on which none of these depends; any ONNX file of one waveform input can stand beside.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from w2s_jax import SAMPLING_RATE, __version__
from w2s_jax.artifacts import UsageError, W2SError, missing_extra, write_atomic, write_json

#: arXiv 2408.13920: 5 s of audio, ONNX, one Xeon; CCC on MSP-Podcast v1.7 Test1. Only what is public.
PUBLISHED: dict[str, dict] = {
    "wav2small": {
        "parameters": 72_000, "macs": 0.4e9, "bytes": 120_000, "peak_memory": 9e6, "milliseconds": 9,
        "ccc": {"arousal": 0.66, "valence": 0.37},
    },
    "mobilenet_v4_s": {"parameters": 3_120_000, "peak_memory": 36e6, "milliseconds": 5, "ccc": {"valence": 0.42}},
    "mobilenet_v3_s": {"milliseconds": 11},
}  # fmt: skip
#: The columns of bench.csv.
COLUMNS = (
    "model", "kind", "parameters", "macs", "bytes", "peak_memory", "milliseconds", "p95_milliseconds", "real_time_factor",
    "ccc", "ccc_of", "published_parameters", "published_macs", "published_bytes", "published_peak_memory",
    "published_milliseconds", "published_ccc",
)  # fmt: skip
KINDS = ("fp32", "int8")
#: An Identity from x [time] to y as ONNX: the model of an onnxruntime process that does nothing.
EMPTY = base64.b64decode(
    "CAg6QwoQCgF4EgF5IghJZGVudGl0eRIFZW1wdHlaEwoBeBIOCgwIARIICgYSBHRpbWViEwoBeRIOCgwIARIICgYSBHRpbWVCBAoAEBE="
)
#: Fresh processes per model; the median is taken.
PROCESSES = 5


def make(
    name: str, fields: Mapping | None = None, directory: str | Path = ".", kinds: Sequence[str] = ("fp32",)
) -> dict[str, Path]:
    """Export a student with random weights: what it costs is known before it is trained.

    Args:
        name, fields: as ``models.build`` takes them.
        directory: where the files go.
        kinds: of ``KINDS``. int8 is calibrated on noise: right in size and time, not in its values.

    Returns:
        kind → file.

    Raises:
        UsageError: no such student, field or kind, or an environment that cannot export.
    """
    from w2s_jax import models
    from w2s_jax.export import onnx as graph
    from w2s_jax.export import package, quantize
    from w2s_jax.export.deploy import deploy

    if unknown := sorted(set(kinds) - set(KINDS)):
        raise UsageError(f"unknown kind {', '.join(unknown)}; there are: {', '.join(KINDS)}")
    graph.require_tools()
    import onnx

    student = models.build(name, **(fields or {}))
    variables = _random_variables(student)
    generator = np.random.default_rng(0)
    noise = [generator.standard_normal(student.minimum_samples + 16_000 * n).astype(np.float32) for n in (1, 1, 2)]
    facts = {
        "w2s_jax": __version__,
        "student": name,
        "fields": json.dumps(dict(fields or {})),
        "parameters": str(sum(models.count(student).values())),
        "minimum_samples": str(student.minimum_samples),
        "weights": "random",
    }
    files, built = {}, {}
    for kind in kinds:
        block = package.INT8_BLOCK if kind == "int8" else 1
        forward, weights = deploy(student, variables, block)
        shapes = [np.shape(weight) for weight in weights]
        key = str(shapes)  # most students have no other form for int8
        if key not in built:
            model = graph.convert(forward, weights, student.dimensions, student.minimum_samples)
            built[key] = graph.simplify(model, noise[:1])[0]
        model = built[key]
        if kind == "int8":
            model, _ = quantize.quantize(model, noise, coverages=(1.0,))
        onnx.helper.set_model_props(model, {**facts, "kind": kind})
        files[kind] = Path(directory) / f"{name}.{kind}.onnx"
        write_atomic(files[kind], lambda temporary, model=model: onnx.save(model, temporary))
    return files


def _random_variables(student) -> dict:
    """Variables of a student without compiling its ``init``, which takes a CPU up to half a minute: He's normal kernels."""
    import jax
    import jax.numpy as jnp

    from w2s_jax.models.frontend import LogMel

    generator = np.random.default_rng(0)
    shapes = dict(jax.eval_shape(student.init, jax.random.key(0), jnp.zeros((1, SAMPLING_RATE))))

    def drawn(path, leaf) -> np.ndarray:
        if path[-1].key in ("scale", "var"):
            return np.ones(leaf.shape, np.float32)
        if len(leaf.shape) == 1:
            return np.zeros(leaf.shape, np.float32)
        fan_in = math.prod(leaf.shape[:-1])
        return (generator.standard_normal(leaf.shape) * math.sqrt(2 / fan_in)).astype(np.float32)

    logmel = LogMel(student.n_fft, student.hop, student.n_mels).init(jax.random.key(0), jnp.zeros((1, student.n_fft)))
    variables = {part: jax.tree_util.tree_map_with_path(drawn, shapes[part]) for part in ("params", "batch_stats")}
    return {**variables, "frontend": {"logmel": logmel["frontend"]}}


def measure(
    files: Mapping[str, str | Path],
    seconds: float = 5.0,
    runs: int = 30,
    threads: int = 1,
    memory: bool = True,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, dict]:
    """Time and memory of ONNX files on this machine, with the onnxruntime settings of ``Predictor``.

    Args:
        files: label → file with one float input, the waveform: [time], [1, time] or [1, 1, time].
        seconds: length of the audio (a file with a fixed length hears that length).
        runs: timed runs of each file. They take turns, so that a drift of the machine hits all; the first of each is not timed.
        threads: of onnxruntime.
        memory: also measure the peak memory, in ``PROCESSES`` fresh processes each.
        progress: called with (steps done, steps in all).

    Returns:
        label → ``bytes``; ``milliseconds`` (median) and ``p95_milliseconds``; ``real_time_factor`` (time / length of the
        audio); ``peak_memory`` in bytes above that of an onnxruntime process that runs nothing (None where it cannot be known).

    Raises:
        UsageError: no such file, or another kind of network.
        W2SError: onnxruntime cannot run it.
    """
    if seconds <= 0 or runs < 1:
        raise UsageError(f"expected seconds > 0 and runs >= 1, got {seconds} and {runs}")
    total, done = len(files) * (runs + (PROCESSES if memory else 0)), 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    peaks = dict.fromkeys(files)
    if memory:
        empty = statistics.median(_peak(None, seconds, threads) or 0 for _ in range(PROCESSES))
        for label, file in files.items():
            found = []
            for _ in range(PROCESSES):
                found.append(_peak(file, seconds, threads))
                step()
            peaks[label] = round(statistics.median(found) - empty) if empty else None
    ready = {label: _ready(file, seconds, threads) for label, file in files.items()}
    times: dict[str, list[float]] = {label: [] for label in files}
    for run in range(runs + 1):
        for label, (session, feed) in ready.items():
            began = time.perf_counter()
            _run(session, feed, files[label])
            if run:
                times[label].append(time.perf_counter() - began)
                step()
    result = {}
    for label, file in files.items():
        heard = next(iter(ready[label][1].values())).shape[-1] / SAMPLING_RATE
        median, p95 = np.percentile(times[label], [50, 95])
        result[label] = {
            "bytes": Path(file).stat().st_size,
            "milliseconds": round(1000 * float(median), 3),
            "p95_milliseconds": round(1000 * float(p95), 3),
            "real_time_factor": round(float(median) / heard, 6),
            "peak_memory": peaks[label],
        }
    return result


def count(file: str | Path, seconds: float = 5.0) -> dict:
    """Parameters and multiply-accumulates of an ONNX file, from its graph.

    Every convolution and matrix product is counted by the shapes that it really has for ``seconds`` of audio.

    Returns:
        ``parameters`` (weights in the file), ``macs``, and ``uncounted``: operators with products that were not counted.

    Raises:
        UsageError: onnx is not installed, no such file, or another kind of network.
        W2SError: the file is damaged.
    """
    try:
        import onnx
    except ImportError as error:
        raise missing_extra("onnx", "export") from error
    try:
        model = onnx.load(str(file))
    except FileNotFoundError as error:
        raise UsageError(f"no model at {file}: no such file") from error
    except Exception as error:  # protobuf's exceptions share no base
        raise W2SError(f"{file} is damaged or not an ONNX model") from error
    stored = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
    small = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    # not scales and zero points, one number for a tensor or a channel each
    scales = {name for node in model.graph.node if "Linear" in node.op_type for name in node.input[1:]}
    parameters = sum(
        math.prod(tensor.dims)
        for tensor in model.graph.initializer
        if tensor.data_type in floats + small + (onnx.TensorProto.INT32,) and tensor.dims and tensor.name not in scales
    )
    products = [node for node in model.graph.node if node.op_type in _OPERANDS]
    wanted = {node.output[0] for node in products}
    wanted |= {node.input[at] for node in products for at in _OPERANDS[node.op_type] if node.input[at] not in stored}
    wanted -= {value.name for value in (*model.graph.input, *model.graph.output)}
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(wanted))
    session, feed = _ready(model.SerializeToString(), seconds, 1)
    names = sorted(wanted | known)
    shapes = {name: np.shape(value) for name, value in zip(names, _run(session, feed, file, names), strict=True)}
    shapes |= {name: value.shape for name, value in feed.items()} | stored
    uncounted = {node.op_type for node in model.graph.node if node.op_type in _NOT_COUNTED or node.domain == "com.microsoft"}
    macs = sum(_macs(node, shapes) for node in products)
    return {"parameters": parameters, "macs": macs, "uncounted": sorted(uncounted - set(_OPERANDS))}


#: Operators of products → where their two operands are.
_OPERANDS = {
    "Conv": (0, 1), "ConvInteger": (0, 1), "QLinearConv": (0, 3), "ConvTranspose": (0, 1),
    "MatMul": (0, 1), "MatMulInteger": (0, 1), "QLinearMatMul": (0, 3), "Gemm": (0, 1), "QGemm": (0, 3), "FusedConv": (0, 1),
}  # fmt: skip
_NOT_COUNTED = ("LSTM", "GRU", "RNN", "Einsum", "Attention", "DFT", "STFT")


def _macs(node, shapes: dict[str, tuple]) -> int:
    left, right = (shapes[node.input[at]] for at in _OPERANDS[node.op_type])
    if node.op_type == "ConvTranspose":
        return math.prod(left) * math.prod(right[1:])
    if "Conv" in node.op_type:
        return math.prod(shapes[node.output[0]]) * math.prod(right[1:])  # [out, in / groups, …]
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return math.prod(shapes[node.output[0]]) * left[-2 if transposed else -1]


def bench(
    students: Sequence[str],
    models: Sequence[str | Path] = (),
    out: str | Path = "bench",
    *,
    kinds: Sequence[str] = KINDS,
    fields: Mapping | None = None,
    seconds: float = 5.0,
    runs: int = 30,
    threads: int = 1,
    say: Callable[[str], object] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> list[dict]:
    """The table of students and models on this machine; written to bench.csv, bench.json, bench.md and bench.png.

    Args:
        students: names, made with random weights.
        models: model directories (all their ONNX files) or ONNX files.
        out: where the files go; students' ONNX files go to ``models`` in it.
        kinds: of the students.
        fields: of every student, for example ``{"n_mels": 64}``.
        seconds, runs, threads: as in ``measure``.
        say: called with a line of text at each step.
        progress: as in ``measure``.

    Returns:
        A row for each file, with the keys ``COLUMNS``; what is not known is None.

    Raises:
        UsageError, W2SError: as in ``make``, ``measure`` and ``count``.
    """
    say, out = say or (lambda line: None), Path(out)
    files, rows = {}, {}
    for path in map(Path, models):
        found = sorted(path.glob("*.onnx"), key=lambda file: len(file.name)) if path.is_dir() else [path]  # fp32 first
        if not found or not found[0].is_file():
            raise UsageError(f"no model at {path}" + (" (it has no .onnx file)" if path.is_dir() else ": no such file"))
        for file in found:
            files[str(file)] = file
            rows[str(file)] = _described(file)
    for name in dict.fromkeys(students):
        began = time.perf_counter()
        for kind, file in make(name, fields, out / "models", kinds).items():
            files[f"{name} {kind}"] = file
            rows[f"{name} {kind}"] = {**_described(file), "model": name, "fields": dict(fields or {}), **_published(name)}
        say(f"{name}: exported in {time.perf_counter() - began:.0f} s")
    if not files:
        raise UsageError("nothing to measure: name a student or a model file")
    say(f"measuring {len(files)} files, {runs} runs each")
    figures = measure(files, seconds, runs, threads, progress=progress)
    table = []
    for label, file in files.items():
        try:
            counted = count(file, seconds)
        except UsageError as error:  # the base install has no onnx: everything else is still worth knowing
            say(f"parameters and MACs are not counted: {error}")
            counted = {"parameters": None, "macs": None}
        row = dict.fromkeys(COLUMNS) | figures[label] | counted | rows[label]
        if counted.get("uncounted"):
            say(f"{label}: MACs without those of {', '.join(counted['uncounted'])}")
        table.append(row)
    about = {"seconds": seconds, "runs": runs, "threads": threads, "machine": machine(), "rows": table}
    write_json(out / "bench.json", about)
    lines = io.StringIO()
    writer = csv.DictWriter(lines, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_atomic(out / "bench.csv", lambda temporary: Path(temporary).write_text(lines.getvalue()))
    text = f"{about['machine']}; {seconds:g} s of audio, {threads} thread(s), {runs} runs\n\n{markdown(table)}\n"
    write_atomic(out / "bench.md", lambda temporary: Path(temporary).write_text(text))
    if any(row["ccc"] is not None for row in table):
        try:
            import matplotlib  # noqa: F401 (asks whether it is there)
        except ImportError:
            say("no picture: matplotlib is not installed; pip install 'w2s-jax[train]'")
        else:
            picture(table, seconds, out / "bench.png")
    return table


def _published(name: str) -> dict:
    known = PUBLISHED.get(name, {})
    row = {f"published_{key}": known.get(key) for key in ("parameters", "macs", "bytes", "peak_memory", "milliseconds")}
    scores = known.get("ccc", {})
    if scores:
        row["ccc"], row["ccc_of"] = scores["valence"], "published, valence, MSP-Podcast v1.7 Test1"
        row["published_ccc"] = ", ".join(f"{dimension[0].upper()} {score:.2f}" for dimension, score in scores.items())
    return row


def _described(file: Path) -> dict:
    """What a file and its directory say of themselves."""
    from w2s_jax.runtime.predictor import open_session

    about = open_session(file)[0].get_modelmeta().custom_metadata_map
    row = {"model": file.parent.name if file.name in ("model.onnx", "model.int8.onnx") else file.name}
    row["kind"] = about.get("kind")
    if about.get("parameters", "").isdigit():
        row["parameters"] = int(about["parameters"])
    config = file.parent / "config.json"
    if "student" in about and config.is_file():
        scores = json.loads(config.read_text()).get("validation_ccc")
        if scores:
            row["ccc"], row["ccc_of"] = round(scores["mean"], 3), "its own teacher's labels, validation views, mean"
    return row


def machine() -> str:
    """This machine's processor and the versions that matter, in words."""
    import onnxruntime

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next((line.partition(":")[2].strip() for line in cpuinfo.open() if line.startswith("model name")), name)
    return f"{name}, {platform.system()}, onnxruntime {onnxruntime.__version__}, Python {platform.python_version()}"


#: Heading and how a value is written, for people.
_SHOWN: dict[str, tuple[str, Callable]] = {
    "model": ("model", str),
    "kind": ("kind", str),
    "parameters": ("parameters", "{:,}".format),
    "macs": ("GMAC", lambda value: f"{value / 1e9:.3f}"),
    "bytes": ("kB", lambda value: f"{value / 1000:,.0f}"),
    "peak_memory": ("peak MB", lambda value: f"{value / 1e6:.1f}"),
    "milliseconds": ("ms", "{:.2f}".format),
    "p95_milliseconds": ("p95", "{:.2f}".format),
    "real_time_factor": ("RTF", "{:.5f}".format),
    "published": ("paper says", str),
}


def shown(row: Mapping) -> list[str]:
    """A row as people read it; columns as ``headings``. What is not known is a dash."""
    notes = []
    for key, form in (
        ("macs", "{:.1f} GMAC"),
        ("bytes", "{:.0f} kB"),
        ("peak_memory", "{:.0f} MB"),
        ("milliseconds", "{:g} ms"),
    ):
        value = row.get(f"published_{key}")
        if value is not None:
            notes.append(form.format(value / {"macs": 1e9, "bytes": 1e3, "peak_memory": 1e6, "milliseconds": 1}[key]))
    if row.get("published_ccc"):
        notes.append(f"CCC {row['published_ccc']}")
    filled = {**row, "published": "; ".join(notes) or None}
    return [form(filled[key]) if filled.get(key) is not None else "–" for key, (_, form) in _SHOWN.items()]


def headings() -> list[str]:
    """The headings of ``shown``."""
    return [heading for heading, _ in _SHOWN.values()]


def markdown(table: Sequence[Mapping]) -> str:
    """The table in Markdown."""
    lines = [headings(), ["---"] * len(_SHOWN), *(shown(row) for row in table)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def picture(table: Sequence[Mapping], seconds: float, path: str | Path) -> None:
    """Draw time against CCC, for the rows whose CCC is known, as PNG; a line joins a model's kinds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = [row for row in table if row["ccc"] is not None]
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    colors: dict[str, str] = {}
    for row in known:
        color = colors.setdefault(row["model"], f"C{len(colors)}")
        marker = "o" if row["published_ccc"] else "s"
        filled = color if row["kind"] != "int8" else "white"
        axis.plot(row["milliseconds"], row["ccc"], marker, color=color, markerfacecolor=filled, markersize=8)
    for name, color in colors.items():
        rows = [row for row in known if row["model"] == name]
        axis.plot([row["milliseconds"] for row in rows], [row["ccc"] for row in rows], color=color, linewidth=1)
        last = max(rows, key=lambda row: row["milliseconds"])
        axis.annotate(name, (last["milliseconds"], last["ccc"]), xytext=(8, 4), textcoords="offset points", color=color)
    for marker, filled, label in (
        ("o", "0.3", "circle: CCC as published (valence, MSP-Podcast v1.7 Test1)"),
        ("s", "0.3", "square: CCC with its own teacher (mean, validation views)"),
        ("o", "white", "hollow: int8"),
    ):
        axis.plot([], [], marker, color="0.3", markerfacecolor=filled, label=label, linestyle="none")
    axis.legend(loc="lower right", fontsize=8)
    axis.set_xlabel(f"milliseconds for {seconds:g} s of audio on this machine, median")
    axis.set_ylabel("CCC")
    times = [row["milliseconds"] for row in known]
    axis.set_xlim(0, 1.35 * max(times))
    axis.set_ylim(max(-1, min(row["ccc"] for row in known) - 0.15), min(1, max(row["ccc"] for row in known) + 0.1))
    axis.grid(alpha=0.3)
    axis.set_title("time against CCC; circles and squares are not comparable", fontsize=10)
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def _ready(file: str | Path | bytes, seconds: float, threads: int):
    """A session and what it is fed: noise."""
    from w2s_jax.runtime.predictor import open_session

    session, path = open_session(file, threads)
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) not in (1, 2, 3):
        found = ", ".join(f"{end.name} {end.type} {end.shape}" for end in inputs)
        raise UsageError(f"{path}: expected one float input, the waveform [time], [1, time] or [1, 1, time]; got {found}")
    *others, length = (size if isinstance(size, int) else None for size in inputs[0].shape)
    shape = [size or 1 for size in others] + [length or round(seconds * SAMPLING_RATE)]
    return session, {inputs[0].name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}


def _run(session, feed: dict, file, names: list[str] | None = None) -> list:
    try:
        return session.run(names, feed)
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise W2SError(f"{file} failed: {str(error).splitlines()[0]}") from error


def _peak(file: str | Path | None, seconds: float, threads: int) -> int | None:
    """Peak memory in bytes of a fresh process that loads a model (None: an empty one) and runs it once."""
    call = "from w2s_jax.bench import _child; import sys; _child(*sys.argv[1:])"
    command = [sys.executable, "-c", call, str(file or ""), str(seconds), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise W2SError(f"measuring the memory of {file or 'an empty process'} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def _child(file: str, seconds: str, threads: str) -> None:
    session, feed = _ready(file or EMPTY, float(seconds), int(threads))
    session.run(None, feed)
    print(json.dumps(_own_peak()))


def _own_peak() -> int | None:
    status = Path("/proc/self/status")
    if status.exists():  # Linux: ru_maxrss would count what this process was before it became Python
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
