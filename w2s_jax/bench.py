"""What models cost on this machine: parameters, multiply-accumulates, bytes, peak memory and time, beside the paper's figures.

Students are measured with random weights, on which none of these depends; any ONNX file of one waveform input can stand beside,
in onnxruntime and in OpenVINO.
"""

from __future__ import annotations

import base64
import csv
import functools
import importlib
import importlib.util
import io
import json
import math
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from w2s_jax import SAMPLING_RATE, __version__, names
from w2s_jax.errors import UsageError, W2SError, missing_extra
from w2s_jax.files import write_atomic, write_json
from w2s_jax.install import pip_install
from w2s_jax.kinds import FILES
from w2s_jax.machine import INTEGER_KINDS

#: arXiv 2408.13920: 5 s of audio, ONNX, one Xeon; CCC on MSP-Podcast v1.7 Test1. Only what is public.
PUBLISHED: dict[str, dict] = {
    "wav2small": {
        "parameters": 72_000, "macs": 0.4e9, "bytes": 120_000, "peak_memory": 9e6, "milliseconds": 9,
        "ccc": {"arousal": 0.66, "valence": 0.37},
    },
    "mobilenet_v4_s": {"parameters": 3_120_000, "peak_memory": 36e6, "milliseconds": 5, "ccc": {"valence": 0.42}},
    "mobilenet_v3_s": {"milliseconds": 11},
}  # fmt: skip
#: The columns of bench.csv; "ratio" only with a yardstick.
COLUMNS = (
    "model", "kind", "engine", "parameters", "macs", "bytes", "peak_memory", "milliseconds", "p95_milliseconds",
    "real_time_factor", "ratio", "ccc", "ccc_of", "published_parameters", "published_macs", "published_bytes",
    "published_peak_memory", "published_milliseconds", "published_ccc",
)  # fmt: skip
#: Kinds of students that ``bench`` makes.
KINDS = ("fp32", "int8")
#: What can be asked for. Where that is onnxruntime, a .tflite file runs in LiteRT, as ``Predictor`` does it.
ENGINES = ("onnxruntime", "openvino")
#: An Identity from x [time] to y as ONNX: the model of a process that does nothing.
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
        kinds: of ``kinds.FILES``. Eight-bit ones are calibrated on noise: right in size and time, not in their
            values.

    Returns:
        kind → file.

    Raises:
        UsageError: no such student, field or kind, a kind that the student cannot have, or an environment that cannot export.
    """
    from w2s_jax import models
    from w2s_jax.export import onnx as graph
    from w2s_jax.export import package

    if unknown := sorted(set(kinds) - set(FILES)):
        raise UsageError(f"unknown kind {', '.join(unknown)}; there are: {', '.join(FILES)}")
    graph.require_tools()
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
    fp32, _ = package.fp32_graph(student, variables, noise[:1])
    files = {}
    for kind in kinds:
        content, _ = package.build(kind, student, variables, fp32, facts, noise, coverages=(1.0,))
        files[kind] = Path(directory) / f"{name}.{kind}{Path(FILES[kind]).suffix}"
        write_atomic(files[kind], lambda temporary, content=content: Path(temporary).write_bytes(content))
    return files


def _random_variables(student) -> dict:
    """Variables of a student without compiling its ``init``, which takes a CPU up to half a minute: He's normal kernels."""
    import jax
    import jax.numpy as jnp

    from w2s_jax.devices import computing
    from w2s_jax.models.frontend import LogMel

    generator = np.random.default_rng(0)
    with computing():
        shapes = dict(jax.eval_shape(student.init, jax.random.key(0), jnp.zeros((1, SAMPLING_RATE))))
        logmel = LogMel(student.n_fft, student.hop, student.n_mels).init(jax.random.key(0), jnp.zeros((1, student.n_fft)))

    def drawn(path, leaf) -> np.ndarray:
        if path[-1].key in ("scale", "var"):
            return np.ones(leaf.shape, np.float32)
        if len(leaf.shape) == 1:
            return np.zeros(leaf.shape, np.float32)
        fan_in = math.prod(leaf.shape[:-1])
        return (generator.standard_normal(leaf.shape) * math.sqrt(2 / fan_in)).astype(np.float32)

    variables = {part: jax.tree_util.tree_map_with_path(drawn, shapes[part]) for part in ("params", "batch_stats")}
    return {**variables, "frontend": {"logmel": logmel["frontend"]}}


def measure(
    files: Mapping[str, str | Path],
    seconds: float = 5.0,
    runs: int = 30,
    threads: int = 1,
    memory: bool = True,
    progress: Callable[[int, int], object] | None = None,
    *,
    against: str | Path | None = None,
    engines: Sequence[str] = ("onnxruntime",),
    say: Callable[[str], object] | None = None,
) -> dict[str, dict]:
    """Time and memory of ONNX files on this machine.

    onnxruntime has the settings of ``Predictor``. OpenVINO runs on the CPU for the shortest latency, in float32 wherever a file
    says so: left alone, it computes fp32 files in bfloat16 on CPUs that can, which is another network at another speed. Its
    threads are not pinned to cores, as those of onnxruntime are not.

    Args:
        files: label → file with one float input, the waveform: [time], [1, time] or [1, 1, time].
        seconds: length of the audio (a file with a fixed length hears that length).
        runs: timed runs of each file in each engine. All of them take turns, in another order in each round, so that a drift
            of the machine hits all; the first round is not timed.
        threads: of the engine.
        memory: also measure the peak memory, in ``PROCESSES`` fresh processes each.
        progress: called with (steps done, steps in all).
        against: a yardstick, a file like the others: measured with them in onnxruntime, under its label in ``files`` or, where
            it is not one of them, its path.
        engines: of ``ENGINES``.
        say: called with a line for each file that OpenVINO cannot run; it has no figures then.

    Returns:
        label in onnxruntime, "label openvino" in OpenVINO → ``engine``; ``bytes``; ``milliseconds`` (median) and
        ``p95_milliseconds``; ``real_time_factor`` (time / length of the audio); ``peak_memory`` in bytes above that of a
        process of the same engine that runs an empty model (None where it cannot be known: on Windows, and in LiteRT, of
        which no empty model is at hand to subtract its interpreter, be it small or all of TensorFlow); with a yardstick,
        ``ratio``: the median over the rounds of (time / time of the yardstick in the same round).

    Raises:
        UsageError: no such file or engine, an engine that is not installed, another kind of network, 8-bit weights on a
            processor whose sums of them overflow, or nothing that can run.
        W2SError: onnxruntime cannot run it.
    """
    if seconds <= 0 or runs < 1:
        raise UsageError(f"expected seconds > 0 and runs >= 1, got {seconds} and {runs}")
    _check_engines(engines)
    asked = {_label(label, engine): (file, engine) for label, file in files.items() for engine in dict.fromkeys(engines)}
    if against is not None:
        yardstick = next((label for label, file in files.items() if _same(file, against)), str(against))
        asked.setdefault(yardstick, (against, "onnxruntime"))
    ready = {}  # label → runs it once, seconds that it hears
    for label, (file, engine) in asked.items():
        try:
            ready[label] = _ready(file, seconds, threads, engine)
        except _NotForOpenVINO as error:
            (say or (lambda line: None))(f"{file}: not measured in OpenVINO: {error}")
    if not ready:
        raise UsageError(f"nothing to measure: none of {len(files)} files runs in {' or '.join(engines)}")
    weighed = [label for label in ready if memory and _runtime(*asked[label]) != "litert"]
    total, done = len(ready) * runs + len(weighed) * PROCESSES, 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    @functools.cache
    def empty(engine: str) -> float:
        return statistics.median(_peak(None, seconds, threads, engine) or 0 for _ in range(PROCESSES))

    peaks = dict.fromkeys(ready)
    for label in weighed:
        file, engine = asked[label]
        found = []
        for _ in range(PROCESSES):
            found.append(_peak(file, seconds, threads, engine))
            step()
        if empty(engine):
            peaks[label] = round(statistics.median(found) - empty(engine))
    times: dict[str, list[float]] = {label: [] for label in ready}
    order = random.Random(0)
    for run in range(runs + 1):
        for label in order.sample(list(ready), len(ready)):  # what a run leaves in the caches is not always the same one's luck
            began = time.perf_counter()
            ready[label][0]()
            if run:
                times[label].append(time.perf_counter() - began)
                step()
    result = {}
    for label, (_, heard) in ready.items():
        file, engine = asked[label]
        median, p95 = np.percentile(times[label], [50, 95])
        result[label] = {
            "engine": _runtime(file, engine),
            "bytes": Path(file).stat().st_size,
            "milliseconds": round(1000 * float(median), 3),
            "p95_milliseconds": round(1000 * float(p95), 3),
            "real_time_factor": round(float(median) / heard, 6),
            "peak_memory": peaks[label],
        }
        if against is not None:
            result[label]["ratio"] = round(float(np.median(np.divide(times[label], times[yardstick]))), 4)
    return result


def _check_engines(engines: Iterable[str]) -> None:
    if unknown := sorted(set(engines) - set(ENGINES)):
        raise UsageError(f"unknown engine {', '.join(unknown)}; there are: {', '.join(ENGINES)}")
    if "openvino" in engines and not _has_openvino():
        raise missing_extra("openvino", "openvino")


def _has_openvino() -> bool:
    return importlib.util.find_spec("openvino") is not None


def _label(label: str, engine: str) -> str:
    return label if engine == "onnxruntime" else f"{label} {engine}"


def _runtime(file: str | Path, engine: str) -> str:
    return "litert" if Path(file).suffix == ".tflite" and engine == "onnxruntime" else engine


def _same(one: str | Path, other: str | Path) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def count(file: str | Path, seconds: float = 5.0) -> dict:
    """Parameters and multiply-accumulates of an ONNX file, from its graph.

    Every convolution and matrix product is counted by the shapes that it really has for ``seconds`` of audio. What depends on
    constants alone is computed when the file is loaded: it is not counted, and weights are those that come out of it.

    Returns:
        ``parameters`` (the number that the file's metadata gives, or else that of the weights that enter its computation),
        ``macs``, and ``uncounted``: operators with products that were not counted, "Conv in Loop" for one in a body.

    Raises:
        UsageError: onnx is not installed, no such file, or another kind of network.
        W2SError: the file is damaged.
    """
    from w2s_jax.runtime.predictor import open_session

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
    graph = model.graph
    stored = {tensor.name: (tuple(tensor.dims), tensor.data_type) for tensor in graph.initializer}
    constants, alive = set(stored), []
    for node in graph.node:  # in the order of computation
        if all(name in constants or not name for name in node.input) and not _bodies(node) and "Random" not in node.op_type:
            constants.update(node.output)
        else:
            alive.append(node)
    products = [node for node in alive if node.op_type in _OPERANDS]
    entering = {name for node in alive for at, name in enumerate(node.input) if name in constants and not _scales(node, at)}
    operands = {node.input[at] for node in products for at in _OPERANDS[node.op_type]}
    wanted = entering | operands | {node.output[0] for node in products}
    wanted -= {value.name for value in (*graph.input, *graph.output)} | set(stored)
    outputs = [value.name for value in graph.output] + sorted(wanted)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(wanted))
    session, path = open_session(model.SerializeToString())
    macs = 0
    for feed in _feeds(session, path, seconds):
        values = dict(zip(outputs, _run(session, feed, file, outputs), strict=True)) | feed
        shapes = {name: np.shape(value) for name, value in values.items()} | {
            name: shape for name, (shape, _) in stored.items()
        }
        macs += sum(_macs(node, shapes) for node in products)
    kinds = {name: onnx.helper.np_dtype_to_tensor_dtype(values[name].dtype) for name in entering - set(stored)}
    kinds |= {name: kind for name, (_, kind) in stored.items()}
    about = {prop.key: prop.value for prop in model.metadata_props}
    # a scalar is a setting, not a weight; int64 are shapes and indices
    weights = sum(math.prod(shapes[name]) for name in entering if shapes[name] and kinds[name] in _WEIGHTS)
    return {
        "parameters": _recorded(about) or weights,
        "macs": macs,
        "uncounted": sorted(set(_uncounted(alive))),
    }


#: Operators of products → where their two operands are.
_OPERANDS = {
    "Conv": (0, 1), "ConvInteger": (0, 1), "QLinearConv": (0, 3), "ConvTranspose": (0, 1),
    "MatMul": (0, 1), "MatMulInteger": (0, 1), "QLinearMatMul": (0, 3), "Gemm": (0, 1), "QGemm": (0, 3), "FusedConv": (0, 1),
}  # fmt: skip
_NOT_COUNTED = ("LSTM", "GRU", "RNN", "Einsum", "Attention", "DFT", "STFT")
#: Operators of onnxruntime's own domain without products of two tensors; any other may hide some.
_PLAIN = (
    "NhwcMaxPool", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearSoftmax", "QLinearSigmoid", "QLinearLeakyRelu",
    "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearReduceMean", "QuantizeLinear", "DequantizeLinear", "Gelu",
    "FastGelu", "BiasGelu", "QuickGelu",
)  # fmt: skip
#: Types of weights, as numbers of onnx.TensorProto: FLOAT, UINT8, INT8, INT32, FLOAT16, DOUBLE, BFLOAT16, UINT4, INT4.
_WEIGHTS = (1, 2, 3, 6, 10, 11, 16, 21, 22)


def _scales(node, at: int) -> bool:
    """Whether an input of a quantised operator is a scale or a zero point, one number for a tensor or a channel."""
    if node.op_type in ("ConvInteger", "MatMulInteger"):
        return at >= 2
    bias = {"QLinearConv": 8, "QGemm": 6}.get(node.op_type)
    return ("Linear" in node.op_type or node.op_type == "QGemm") and at not in (0, 3, bias)


def _bodies(node) -> list:
    return [attribute.g for attribute in node.attribute if attribute.HasField("g")]


def _uncounted(nodes, where: str = "") -> Iterator[str]:
    for node in nodes:
        known = node.op_type in _OPERANDS
        foreign = node.domain not in ("", "ai.onnx") and node.op_type not in _PLAIN
        if where if known else foreign or node.op_type in _NOT_COUNTED:
            yield node.op_type + where
        for body in _bodies(node):
            yield from _uncounted(body.node, f" in {node.op_type}{where}")


def _macs(node, shapes: dict[str, tuple]) -> int:
    left, right = (shapes[node.input[at]] for at in _OPERANDS[node.op_type])
    if node.op_type == "ConvTranspose":
        return math.prod(left) * math.prod(right[1:])
    if "Conv" in node.op_type:  # weights are [out, in / groups, …], also where onnxruntime's QLinearConv has its channels last
        return math.prod(shapes[node.output[0]]) * math.prod(right[1:])
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return math.prod(shapes[node.output[0]]) * left[-2 if transposed else -1]


def _recorded(about: Mapping[str, str]) -> int | None:
    """The parameters that a file's metadata gives."""
    return int(about["parameters"]) if about.get("parameters", "").isdigit() else None


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
    against: str | Path | None = None,
    engines: Sequence[str] | None = None,
    say: Callable[[str], object] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> list[dict]:
    """The table of students and models on this machine; written to bench.csv, bench.json, bench.md and bench.png.

    Args:
        students: names, made with random weights.
        models: model directories (all their files of ``kinds.FILES`` and other ONNX files; what has other inputs than one
            waveform is left out, with a line) or files.
        out: where the files go; students' ONNX files go to ``models`` in it.
        kinds: of the students.
        fields: of every student, for example ``{"n_mels": 64}``.
        seconds, runs, threads, against: as in ``measure``.
        engines: of ``ENGINES``; default: onnxruntime, and OpenVINO where it is installed.
        say: called with a line of text at each step.
        progress: as in ``measure``.

    Returns:
        A row for each file and engine, with the keys ``COLUMNS`` (``ratio`` only with ``against``, which has the last row
        unless it is one of the models); what is not known is None.

    Raises:
        UsageError, W2SError: as in ``make``, ``measure`` and ``count``.
    """
    say, out = say or (lambda line: None), Path(out)
    engines = engines or (ENGINES if _has_openvino() else ENGINES[:1])
    _check_engines(engines)
    # a wrong yardstick is found before minutes of exports
    files, rows = {}, {} if against is None else {str(against): _described(Path(against))}
    for path in map(Path, models):
        found = _found(path) if path.is_dir() else [path]
        if not found or not found[0].is_file():
            raise UsageError(f"no model at {path}" + (" (it has no .onnx file)" if path.is_dir() else ": no such file"))
        for file in found:
            try:
                rows[str(file)] = _described(file)
            except UsageError as error:
                if not path.is_dir():
                    raise
                say(f"left out: {error}" if str(file) in str(error) else f"left out: {file}: {error}")
            else:
                files[str(file)] = file
    for name in dict.fromkeys(students):
        began = time.perf_counter()
        for kind, file in make(name, fields, out / "models", kinds).items():
            files[f"{name} {kind}"] = file
            rows[f"{name} {kind}"] = {**_described(file), "model": name, "fields": dict(fields or {}), **_published(name)}
        say(f"{name}: exported in {time.perf_counter() - began:.0f} s")
    if not files:
        raise UsageError("nothing to measure: name a student or a model file")
    say(f"measuring {len(files)} files in {' and '.join(dict.fromkeys(engines))}, {runs} runs each")
    figures = measure(files, seconds, runs, threads, progress=progress, against=against, engines=engines, say=say)
    if against is not None and not any(_same(file, against) for file in files.values()):
        files[str(against)] = Path(against)
    columns = [column for column in COLUMNS if column != "ratio" or against is not None]
    table, together, once = [], {}, functools.cache(say)
    for label, file in files.items():
        measured = [figures[key] for key in (_label(label, engine) for engine in ENGINES) if key in figures]
        counted = _counted(file, label, seconds, once) if measured else {}
        for found in measured:
            row = dict.fromkeys(columns) | found | counted | rows[label]
            table.append(row)
            together.setdefault((file.parent, row["model"], row["engine"]), {})[row["kind"]] = row["milliseconds"]
    for (_, model, engine), times in together.items():
        if line := slower(times):
            say(f"{model}, {engine}: {line}")
    about = {"seconds": seconds, "runs": runs, "threads": threads, "machine": machine({row["engine"] for row in table})}
    about |= {"against": str(against)} if against is not None else {}
    write_json(out / "bench.json", {**about, "rows": table})
    lines = io.StringIO()
    writer = csv.DictWriter(lines, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_atomic(out / "bench.csv", lambda temporary: Path(temporary).write_text(lines.getvalue(), "utf-8"))
    text = f"{about['machine']}; {seconds:g} s of audio, {threads} thread(s), {runs} runs"
    text += f"; ratio: time / time of {against} in onnxruntime" if against is not None else ""
    text += f"\n\n{markdown(table)}\n"
    write_atomic(out / "bench.md", lambda temporary: Path(temporary).write_text(text, "utf-8"))
    if any(row["ccc"] is not None for row in table):
        try:
            import matplotlib  # noqa: F401 (asks whether it is there)
        except ImportError:
            say(f"no picture: matplotlib is not installed; {pip_install('train')}")
        else:
            picture(table, seconds, out / "bench.png")
    return table


def slower(times: Mapping[str, float]) -> str | None:
    """What is to be said where eight bits do not pay: kind → milliseconds; None where they do."""
    # what multiplies integers is to be faster than fp32; the other kinds of 8 bits and less only save bytes
    found = [f"{times[kind]:.2f} ms of {kind}" for kind in INTEGER_KINDS if times.get(kind, 0) > times.get("fp32", math.inf)]
    return f"fp32 is faster here: {times['fp32']:.2f} ms against {', '.join(found)}" if found else None


def _found(directory: Path) -> list[Path]:
    """The models in a directory: those of ``kinds.FILES`` in its order, then other ONNX files."""
    own = [directory / name for name in FILES.values() if (directory / name).is_file()]
    return own + sorted(set(directory.glob("*.onnx")) - set(own), key=lambda file: (len(file.name), file.name))  # fp32 first


def _counted(file: Path, label: str, seconds: float, say: Callable[[str], object]) -> dict:
    """What ``count`` finds, or None where it cannot."""
    unknown = {"parameters": None, "macs": None}
    if file.suffix == ".tflite":  # no ONNX graph
        return unknown
    try:
        counted = count(file, seconds)
    except UsageError as error:  # the base install has no onnx: everything else is still worth knowing
        say(f"parameters and MACs are not counted: {error}")
        return unknown
    if counted["uncounted"]:
        say(f"{label}: MACs without those of {', '.join(counted['uncounted'])}")
    return counted


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

    session, path = open_session(file)
    _feeds(session, path, 1.0)  # refuses what cannot be measured
    about = session.get_modelmeta().custom_metadata_map
    kinds = {name: kind for kind, name in FILES.items()}
    row = {"model": file.absolute().parent.name if file.name in kinds else file.name}
    row["kind"] = about.get("kind") or kinds.get(file.name)
    if (parameters := _recorded(about)) is not None:
        row["parameters"] = parameters
    config = file.parent / "config.json"
    if "student" in about and config.is_file():
        scores = json.loads(config.read_text("utf-8")).get("validation_ccc")
        if scores:
            row["ccc"], row["ccc_of"] = round(scores["mean"], 3), "its own teacher's labels, validation views, mean"
    return row


def machine(engines: Iterable[str] = ("onnxruntime",)) -> str:
    """This machine's processor and the versions that matter, in words."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next((line.partition(":")[2].strip() for line in cpuinfo.open() if line.startswith("model name")), name)
    used = [engine for engine in ENGINES if engine in engines]
    # "2026.4.1-22982-…": the rest is OpenVINO's build
    versions = [f"{engine} {importlib.import_module(engine).__version__.split('-')[0]}" for engine in used]
    return ", ".join([name, platform.system(), *versions, f"Python {platform.python_version()}"])


#: Heading and how a value is written, for people.
_SHOWN: dict[str, tuple[str, Callable]] = {
    "model": ("model", str),
    "kind": ("kind", str),
    "engine": ("engine", str),
    "parameters": ("parameters", "{:,}".format),
    "macs": ("GMAC", lambda value: f"{value / 1e9:.3f}"),
    "bytes": ("kB", lambda value: f"{value / 1000:,.0f}"),
    "peak_memory": ("peak MB", lambda value: f"{value / 1e6:.1f}"),
    "milliseconds": ("ms", "{:.2f}".format),
    "p95_milliseconds": ("p95", "{:.2f}".format),
    "real_time_factor": ("RTF", "{:.5f}".format),
    "ratio": ("ratio", "{:.2f}".format),
    "published": ("paper says", str),
}


def shown(row: Mapping) -> list[str]:
    """A row as people read it; columns as ``headings`` of it. What is not known is a dash."""
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
    return [_SHOWN[key][1](filled[key]) if filled.get(key) is not None else "–" for key in _shown_keys(row)]


def headings(row: Mapping) -> list[str]:
    """The headings of ``shown``: all rows of a table have the same."""
    return [_SHOWN[key][0] for key in _shown_keys(row)]


def _shown_keys(row: Mapping) -> list[str]:
    return [key for key in _SHOWN if key != "ratio" or "ratio" in row]


def markdown(table: Sequence[Mapping]) -> str:
    """The table in Markdown; names of models, which may be strangers', show as they are."""
    headline = headings(table[0])
    lines = [headline, ["---"] * len(headline), *([names.markdown(cell) for cell in shown(row)] for row in table)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def picture(table: Sequence[Mapping], seconds: float, path: str | Path) -> None:
    """Draw time against CCC, for the rows whose CCC is known, as PNG: a color is a model, a marker a kind, hollow is OpenVINO.

    All kinds of a model have one CCC, that of its line: the first lies on it, the next ones below it: equal times stay apart.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.transforms import ScaledTranslation

    known = [row for row in table if row["ccc"] is not None]
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    models: dict[tuple, list] = {}
    markers: dict[str, str] = {}
    for row in known:
        models.setdefault((row["model"], row["ccc"], bool(row["published_ccc"])), []).append(row)
    for at, ((name, ccc, published), rows) in enumerate(models.items()):
        kinds = list(dict.fromkeys(row["kind"] or "other" for row in rows))
        for row in rows:
            kind = row["kind"] or "other"
            marker = markers.setdefault(kind, "osD^vP*X<>"[len(markers) % 10])
            place = axis.transData + ScaledTranslation(0, -kinds.index(kind) * 8 / 72, figure.dpi_scale_trans)
            fill = "white" if row["engine"] == "openvino" else f"C{at}"
            axis.plot(row["milliseconds"], ccc, marker, color=f"C{at}", mfc=fill, ms=7, transform=place)
        label = f"{name}: {ccc:.2f} ({'paper' if published else 'own teacher'})"
        spread = [row["milliseconds"] for row in rows]
        axis.hlines(ccc, min(spread), max(spread), color=f"C{at}", linewidth=0.8)
        axis.annotate(label, (max(spread), ccc), (9, -3), textcoords="offset points", color=f"C{at}", fontsize=8)
    for kind, marker in markers.items():
        axis.plot([], [], marker, color="0.3", label=kind)
    if any(row["engine"] == "openvino" for row in known):
        axis.plot([], [], "o", color="0.3", mfc="white", label="hollow: OpenVINO")
    figure.legend(loc="outside right upper", fontsize=8, title="kind")
    axis.set_xlabel(f"milliseconds for {seconds:g} s of audio on this machine, median")
    axis.set_ylabel("CCC (lines; the kinds of a model hang below its line)")
    times = [row["milliseconds"] for row in known]
    axis.set_xlim(0, 1.6 * max(times))
    axis.set_ylim(max(-1, min(row["ccc"] for row in known) - 0.15), min(1, max(row["ccc"] for row in known) + 0.1))
    axis.grid(alpha=0.3)
    axis.set_title(
        "not comparable: CCC of the paper (valence, MSP-Podcast Test1), with the own teacher (mean, validation)",
        fontsize=8,
    )
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


class _NotForOpenVINO(W2SError):
    """OpenVINO cannot run a file that may well run in its own engine."""


def _ready(file: str | Path | bytes, seconds: float, threads: int, engine: str) -> tuple[Callable[[], object], float]:
    """A function that runs a model once on noise, and the seconds of audio that it hears."""
    if engine == "openvino":
        return _openvino(file, seconds, threads)
    from w2s_jax.runtime.predictor import Pieces, in_pieces, open_session

    session, path = open_session(file, threads)
    if in_pieces([end.name for end in session.get_inputs()]):
        wave = _wave(seconds)
        return functools.partial(Pieces(session, path), wave), len(wave) / SAMPLING_RATE
    (feed,) = _feeds(session, path, seconds)
    return functools.partial(_run, session, feed, file), next(iter(feed.values())).shape[-1] / SAMPLING_RATE


def _feeds(session, path: str, seconds: float) -> list[dict[str, np.ndarray]]:
    """What a session is fed to hear noise: once, or piece by piece."""
    from w2s_jax.runtime.predictor import Pieces, in_pieces

    inputs = [(end.name, end.type, end.shape) for end in session.get_inputs()]
    if in_pieces([name for name, _, _ in inputs]):
        return list(Pieces(session, path).feeds(_wave(seconds)))
    return [_noise(path, inputs, seconds)]


def _wave(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(round(seconds * SAMPLING_RATE)).astype(np.float32)


def _noise(path: str, inputs: Sequence[tuple], seconds: float) -> dict[str, np.ndarray]:
    """What a model is fed, where its inputs (name, type, shape) are one waveform."""
    if len(inputs) != 1 or inputs[0][1] != "tensor(float)" or len(inputs[0][2]) not in (1, 2, 3):
        found = ", ".join(f"{name} {kind} {shape}" for name, kind, shape in inputs)
        raise UsageError(f"{path}: expected one float input, the waveform [time], [1, time] or [1, 1, time]; got {found}")
    ((name, _, sizes),) = inputs
    *others, length = (size if isinstance(size, int) else None for size in sizes)
    shape = [size or 1 for size in others] + [length or round(seconds * SAMPLING_RATE)]
    return {name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}


def _run(session, feed: dict, file, outputs: list[str] | None = None) -> list:
    try:
        return session.run(outputs, feed)
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise W2SError(f"{file} failed: {str(error).splitlines()[0]}") from error


def _openvino(file: str | Path | bytes, seconds: float, threads: int) -> tuple[Callable[[], object], float]:
    """As ``_ready``, in OpenVINO.

    Raises:
        UsageError: no such file, or another kind of network.
        _NotForOpenVINO: it cannot run the file; says why.
    """
    import openvino

    if not isinstance(file, bytes):
        if not Path(file).is_file():
            raise UsageError(f"no model at {file}: no such file")
        if Path(file).suffix == ".tflite":
            raise _NotForOpenVINO("it is made for LiteRT")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # the default is bfloat16 where the CPU has it, float16 on ARM
        "ENABLE_CPU_PINNING": False,  # of two processes on one core, the pinned one cannot move away
    }
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(file if isinstance(file, bytes) else str(file)), "CPU", settings)
        inputs = []
        for end in compiled.inputs:
            kind = "tensor(float)" if end.element_type == openvino.Type.f32 else str(end.element_type)
            sizes = [None if size.is_dynamic else size.get_length() for size in end.partial_shape]
            inputs.append((end.any_name, kind, sizes))
        if len(inputs) > 1:
            from w2s_jax.runtime.predictor import in_pieces  # onnxruntime's memory is not to be counted for all the others

            if in_pieces([name for name, _, _ in inputs]):
                raise _NotForOpenVINO("it hears a recording piece by piece, which Predictor does in onnxruntime")
        feed = _noise(str(file), inputs, seconds)
        request = compiled.create_infer_request()
        run = functools.partial(request.infer, feed, share_inputs=True)
        run()
    except RuntimeError as error:
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if "operations:" in line), lines[-1])
        note = " (operators that only onnxruntime has)" if "com.microsoft" in reason else ""
        raise _NotForOpenVINO(reason + note) from error
    (wave,) = feed.values()
    return run, wave.shape[-1] / SAMPLING_RATE


def _peak(file: str | Path | None, seconds: float, threads: int, engine: str) -> int | None:
    """Peak memory in bytes of a fresh process that loads a model (None: an empty one) and runs it once."""
    call = "from w2s_jax.bench import _child; import sys; _child(*sys.argv[1:])"
    command = [sys.executable, "-c", call, str(file or ""), str(seconds), str(threads), engine]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise W2SError(f"measuring the memory of {file or 'an empty process'} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def _child(file: str, seconds: str, threads: str, engine: str) -> None:
    run, _ = _ready(file or EMPTY, float(seconds), int(threads), engine)
    run()
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
