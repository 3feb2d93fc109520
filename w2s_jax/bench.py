"""The table of what models cost on this machine: parameters, multiply-accumulates, bytes, peak memory, time; and the paper's.

Students are exported with random weights, on which none of these depends. Any other ONNX file with one waveform input can be
measured with them, in onnxruntime and in OpenVINO.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from w2s_jax import __version__, machine, names
from w2s_jax.errors import UsageError
from w2s_jax.files import write_atomic, write_json
from w2s_jax.install import pip_install
from w2s_jax.kinds import FILES, has_parts
from w2s_jax.measure import ENGINES, choose_engines, compare_with_fp32, label_in, make_feeds, measure, same_file
from w2s_jax.operations import count, recorded_parameters
from w2s_jax.runtime.session import open_session

#: arXiv 2408.13920: 5 s of audio, ONNX, one Xeon; CCC on MSP-Podcast v1.7 Test1. Only what is public.
PUBLISHED: dict[str, dict] = {
    "wav2small": {
        "parameters": 72_000, "macs": 0.4e9, "bytes": 120_000, "peak_memory": 9e6, "milliseconds": 9,
        "ccc": {"arousal": 0.66, "valence": 0.37},
    },
    "mobilenet_v4_s": {"parameters": 3_120_000, "peak_memory": 36e6, "milliseconds": 5, "ccc": {"valence": 0.42}},
    "mobilenet_v3_s": {"milliseconds": 11},
}  # fmt: skip
#: The columns of bench.csv; "ratio" only with a reference model.
COLUMNS = (
    "model", "kind", "engine", "parameters", "macs", "bytes", "peak_memory", "milliseconds", "p95_milliseconds",
    "real_time_factor", "ratio", "ccc", "ccc_of", "published_parameters", "published_macs", "published_bytes",
    "published_peak_memory", "published_milliseconds", "published_ccc",
)  # fmt: skip
#: Kinds of students that ``bench`` makes.
KINDS = ("fp32", "int8")


def make(
    name: str, fields: Mapping | None = None, directory: str | Path = ".", kinds: Sequence[str] = ("fp32",)
) -> dict[str, Path]:
    """Export a student with random weights, to know what it costs before it is trained.

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
    variables = _draw_variables(student)
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
        write_atomic(files[kind], lambda temporary, content=content: package.write(content, Path(temporary)))
    return files


def _draw_variables(student) -> dict:
    """Draw variables of a student (kernels as He et al. do) without compiling its ``init``: half a minute on a CPU."""
    import jax
    import jax.numpy as jnp

    from w2s_jax import models
    from w2s_jax.devices import computing
    from w2s_jax.models.frontend import LogMel

    generator = np.random.default_rng(0)
    with computing():
        shapes = models.shapes(student)
        logmel = LogMel(student.n_fft, student.hop, student.n_mels).init(jax.random.key(0), jnp.zeros((1, student.n_fft)))

    def draw_leaf(path, leaf) -> np.ndarray:
        if path[-1].key in ("scale", "var"):
            return np.ones(leaf.shape, np.float32)
        if len(leaf.shape) == 1:
            return np.zeros(leaf.shape, np.float32)
        fan_in = math.prod(leaf.shape[:-1])
        return (generator.standard_normal(leaf.shape) * math.sqrt(2 / fan_in)).astype(np.float32)

    variables = {part: jax.tree_util.tree_map_with_path(draw_leaf, shapes[part]) for part in ("params", "batch_stats")}
    return {**variables, "frontend": {"logmel": logmel["frontend"]}}


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
    message: Callable[[str], object] = lambda line: None,
    progress: Callable[[int, int], object] | None = None,
) -> list[dict]:
    """Measure students and models on this machine; write bench.csv, bench.json, bench.md and bench.png.

    Args:
        students: names, made with random weights.
        models: model directories (all their files of ``kinds.FILES`` and other ONNX files; what has other inputs than one
            waveform is left out, with a line) or files.
        out: where the files go; students' ONNX files go to ``models`` in it.
        kinds: of the students.
        fields: of every student, for example ``{"n_mels": 64}``.
        seconds, runs, threads, against: as in ``measure``.
        engines: of ``ENGINES``; default: onnxruntime, and OpenVINO where it is installed.
        message: called with a line of text at each step.
        progress: as in ``measure``.

    Returns:
        A row for each file and engine, with the keys ``COLUMNS`` (``ratio`` only with ``against``, which has the last row
        unless it is one of the models); what is not known is None.

    Raises:
        UsageError, W2SError: as in ``make``, ``measure`` and ``count``.
    """
    out, engines = Path(out), choose_engines(engines)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; expected a directory for the tables")
    # a wrong reference model is reported before minutes of exports
    rows = {} if against is None else {str(against): _describe(Path(against))}
    files = _find_models(models, rows, message)
    for name in dict.fromkeys(students):
        began = time.perf_counter()
        for kind, file in make(name, fields, out / "models", kinds).items():
            files[f"{name} {kind}"] = file
            rows[f"{name} {kind}"] = {**_describe(file), "model": name, "fields": dict(fields or {}), **_published(name)}
        message(f"{name}: exported in {time.perf_counter() - began:.0f} s")
    if not files:
        raise UsageError("nothing to measure: name a student or a model file")
    message(f"measuring {len(files)} {'file' if len(files) == 1 else 'files'} in {' and '.join(engines)}, {runs} runs each")
    figures = measure(files, seconds, runs, threads, progress=progress, against=against, engines=engines, message=message)
    if against is not None and not any(same_file(file, against) for file in files.values()):
        files[str(against)] = Path(against)
    columns = [column for column in COLUMNS if column != "ratio" or against is not None]
    table, times, once = [], {}, functools.cache(message)
    for label, file in files.items():
        measured = [figures[key] for key in (label_in(label, engine) for engine in ENGINES) if key in figures]
        counted = _count(file, label, seconds, once) if measured else {}
        for costs in measured:
            row = dict.fromkeys(columns) | costs | counted | rows[label]
            table.append(row)
            times.setdefault((file.parent, row["model"], row["engine"]), {})[row["kind"]] = row["milliseconds"]
    for (_, model, engine), of_kinds in times.items():
        if line := compare_with_fp32(of_kinds):
            message(f"{model}, {engine}: {line}")
    about = {"seconds": seconds, "runs": runs, "threads": threads}
    about["machine"] = machine.describe({row["engine"] for row in table})
    _write(table, columns, about | ({"against": str(against)} if against is not None else {}), out, message)
    return table


def _find_models(models: Sequence[str | Path], rows: dict[str, dict], message: Callable[[str], object]) -> dict[str, Path]:
    """Map labels to the files that can be measured; the columns that these describe themselves go to ``rows``."""
    files = {}
    for path in map(Path, models):
        own = [path / name for name in FILES.values() if (path / name).exists()]
        others = sorted(set(path.glob("*.onnx")) - set(own), key=lambda file: (len(file.name), file.name))
        candidates = own + others if path.is_dir() and not has_parts(path) else [path]
        if not candidates or not candidates[0].exists():
            raise UsageError(f"no model at {path}" + (" (it has no .onnx file)" if path.is_dir() else ": no such file"))
        for file in candidates:
            try:
                rows[str(file)] = _describe(file)
            except UsageError as error:
                if not path.is_dir():
                    raise
                message(f"left out: {error}" if str(file) in str(error) else f"left out: {file}: {error}")
            else:
                files[str(file)] = file
    return files


def _describe(file: Path) -> dict:
    """Columns of a row from the metadata of a file and its directory.

    Raises:
        UsageError, W2SError: it cannot be measured.
    """
    session, path = open_session(file)
    make_feeds(session, path, 1.0)  # refuses what cannot be measured
    metadata = session.get_modelmeta().custom_metadata_map
    kinds = {name: kind for kind, name in FILES.items()}
    row = {"model": file.absolute().parent.name if file.name in kinds else file.name}
    row["kind"] = metadata.get("kind") or kinds.get(file.name)
    if (parameters := recorded_parameters(metadata)) is not None:
        row["parameters"] = parameters
    config = file.parent / "config.json"
    if "student" in metadata and config.is_file():
        scores = json.loads(config.read_text()).get("validation_ccc")
        if scores:
            row["ccc"], row["ccc_of"] = round(scores["mean"], 3), "its own teacher's labels, validation views, mean"
    return row


def _count(file: Path, label: str, seconds: float, message: Callable[[str], object]) -> dict:
    """Columns ``parameters`` and ``macs`` of a row, None where they cannot be counted."""
    unknown = {"parameters": None, "macs": None}
    if file.suffix == ".tflite" or file.is_dir():  # no ONNX graph
        return unknown
    try:
        counted = count(file, seconds)
    except UsageError as error:  # the base install has no onnx: everything else is still worth knowing
        message(f"parameters and MACs are not counted: {error}")
        return unknown
    if counted["uncounted"]:
        message(f"{label}: MACs without those of {', '.join(counted['uncounted'])}")
    return counted


def _published(name: str) -> dict:
    """Columns of a row with the paper's figures for a student."""
    known = PUBLISHED.get(name, {})
    row = {f"published_{key}": known.get(key) for key in ("parameters", "macs", "bytes", "peak_memory", "milliseconds")}
    scores = known.get("ccc", {})
    if scores:
        row["ccc"], row["ccc_of"] = scores["valence"], "published, valence, MSP-Podcast v1.7 Test1"
        row["published_ccc"] = ", ".join(f"{dimension[0].upper()} {score:.2f}" for dimension, score in scores.items())
    return row


def _write(table: list[dict], columns: Sequence[str], about: dict, out: Path, message: Callable[[str], object]) -> None:
    """Write bench.json, bench.csv, bench.md and, where a CCC is known, bench.png."""
    write_json(out / "bench.json", {**about, "rows": table})
    lines = io.StringIO()
    writer = csv.DictWriter(lines, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_atomic(out / "bench.csv", lambda temporary: Path(temporary).write_text(lines.getvalue(), "utf-8"))
    text = f"{about['machine']}; {about['seconds']:g} s of audio, {about['threads']} thread(s), {about['runs']} runs"
    text += f"; ratio: time / time of {about['against']} in onnxruntime" if "against" in about else ""
    write_atomic(out / "bench.md", lambda temporary: Path(temporary).write_text(f"{text}\n\n{markdown(table)}\n", "utf-8"))
    if any(row["ccc"] is not None for row in table):
        try:
            import matplotlib  # noqa: F401 (asks whether it is there)
        except ImportError:
            message(f"no picture: matplotlib is not installed; {pip_install('train')}")
        else:
            draw(table, about["seconds"], out / "bench.png")


#: Column → heading and format of a printed table.
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


def format_row(row: Mapping) -> list[str]:
    """Format a row for people, a cell for each of ``headings``; what is not known is a dash."""
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
    """Headings of the cells of ``format_row``: all rows of a table have the same."""
    return [_SHOWN[key][0] for key in _shown_keys(row)]


def _shown_keys(row: Mapping) -> list[str]:
    return [key for key in _SHOWN if key != "ratio" or "ratio" in row]


def markdown(table: Sequence[Mapping]) -> str:
    """Format a table as Markdown; names of models, which may be anything, have no effect as markup."""
    headline = headings(table[0])
    lines = [headline, ["---"] * len(headline), *([names.markdown(cell) for cell in format_row(row)] for row in table)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def draw(table: Sequence[Mapping], seconds: float, path: str | Path) -> None:
    """Draw time against CCC as PNG, for the rows whose CCC is known: color by model, marker by kind, hollow for OpenVINO.

    All kinds of a model have the same CCC, that of its line. The first one's marker lies on the line, the others' below it, so
    that markers of equal times do not overlap.
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
