"""Time and peak memory of model files on this machine, in onnxruntime, LiteRT and OpenVINO."""

from __future__ import annotations

import base64
import functools
import importlib.util
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from w2s_jax import SAMPLING_RATE, machine
from w2s_jax.errors import UsageError, W2SError, missing_extra
from w2s_jax.kinds import size_of
from w2s_jax.runtime.c import is_code

#: What can be asked for. Where that is onnxruntime, a .tflite file runs in LiteRT and C runs compiled, as in ``Predictor``.
ENGINES = ("onnxruntime", "openvino")
#: Fresh processes per model; the median of their peaks is taken.
PROCESSES = 5
#: An Identity from x [time] to y as ONNX: the model of a process that does nothing.
EMPTY = base64.b64decode(
    "CAg6QwoQCgF4EgF5IghJZGVudGl0eRIFZW1wdHlaEwoBeBIOCgwIARIICgYSBHRpbWViEwoBeRIOCgwIARIICgYSBHRpbWVCBAoAEBE="
)


class _Candidate(NamedTuple):
    """A file loaded into an engine: ``run()`` computes ``seconds`` of audio."""

    file: Path
    engine: str
    run: Callable[[], object]
    seconds: float

    @property
    def runtime(self) -> str:
        if self.engine == "onnxruntime" and self.file.is_dir():
            return "c" if is_code(self.file) else "wasm"
        return "litert" if self.file.suffix == ".tflite" and self.engine == "onnxruntime" else self.engine


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
    message: Callable[[str], object] = lambda line: None,
) -> dict[str, dict]:
    """Measure time and peak memory of ONNX files.

    onnxruntime has the settings of ``Predictor``. OpenVINO runs on the CPU for the shortest latency, in float32 wherever a file
    says so: left alone, it computes fp32 files in bfloat16 on CPUs that can, which is another network at another speed. Its
    threads are not pinned to cores, as those of onnxruntime are not.

    Args:
        files: label → file with one float input, the waveform: [time], [1, time] or [1, 1, time].
        seconds: length of the audio (a file with a fixed length is given that length).
        runs: timed runs of each file in each engine. All of them take turns, in another order in each round, so that a drift
            of the machine affects all; the first round is not timed.
        threads: of the engine.
        memory: also measure the peak memory, in ``PROCESSES`` fresh processes each.
        progress: called with (steps done, steps in all).
        against: a reference model, a file like the others: measured with them in onnxruntime, under its label in ``files`` or,
            where it is not one of them, its path.
        engines: of ``ENGINES``.
        message: called with a line for each file that OpenVINO cannot run; it has no figures then.

    Returns:
        label in onnxruntime, "label openvino" in OpenVINO → ``engine``; ``bytes``; ``milliseconds`` (median) and
        ``p95_milliseconds``; ``real_time_factor`` (time / length of the audio); ``peak_memory`` in bytes above that of a
        process of the same engine that runs an empty model (None where it cannot be known: on Windows, and in LiteRT, for
        which there is no empty model whose interpreter, be it small or all of TensorFlow, could be subtracted); with a
        reference model, ``ratio``: the median over the rounds of (time / time of the reference model in the same round).

    Raises:
        UsageError: no such file or engine, an engine that is not installed, another kind of network, 8-bit weights on a
            processor whose sums of them overflow, or nothing that can run.
        W2SError: the engine cannot run it.
    """
    if seconds <= 0 or runs < 1:
        raise UsageError(f"expected seconds > 0 and runs >= 1, got {seconds} and {runs}")
    wanted = {label_in(label, engine): (file, engine) for label, file in files.items() for engine in choose_engines(engines)}
    if against is not None:
        reference = next((label for label, file in files.items() if same_file(file, against)), str(against))
        wanted.setdefault(reference, (against, "onnxruntime"))
    candidates = {}
    for label, (file, engine) in wanted.items():
        try:
            candidates[label] = _Candidate(Path(file), engine, *_load(file, seconds, threads, engine))
        except _NotForOpenVINO as error:
            message(f"{file}: not measured in OpenVINO: {error}")
    if not candidates:
        raise UsageError(f"nothing to measure: none of {len(files)} files runs in {' or '.join(engines)}")
    weighed = [label for label, candidate in candidates.items() if memory and candidate.runtime not in ("litert", "wasm")]
    total, done = len(candidates) * runs + len(weighed) * PROCESSES, 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    peaks = _measure_peaks({label: candidates[label] for label in weighed}, seconds, threads, step)
    times = _measure_times(candidates, runs, step)
    result = {}
    for label, candidate in candidates.items():
        median, p95 = np.percentile(times[label], [50, 95])
        result[label] = {
            "engine": candidate.runtime,
            "bytes": size_of(candidate.file),
            "milliseconds": round(1000 * float(median), 3),
            "p95_milliseconds": round(1000 * float(p95), 3),
            "real_time_factor": round(float(median) / candidate.seconds, 6),
            "peak_memory": peaks.get(label),
        }
        if against is not None:
            result[label]["ratio"] = round(float(np.median(np.divide(times[label], times[reference]))), 4)
    return result


def measure_kinds(
    files: Mapping[str, Path], against: Path | None = None, message: Callable[[str], object] = lambda line: None
) -> dict[str, dict]:
    """Measure the kinds of an exported student for its report: 5 s of audio, one thread, 20 runs.

    Args:
        files: kind → file.
        against: a reference model, as in ``measure``.
        message: called with a line of text.

    Returns:
        kind → ``milliseconds``, ``peak_memory``, ``seconds``, ``machine``; with a reference model ``ratio`` and ``against``.

    Raises:
        UsageError, W2SError: as in ``measure``.
    """
    message(f"measuring {len(files)} {'file' if len(files) == 1 else 'files'}")
    figures = measure(files, 5.0, 20, 1, against=against)
    if line := compare_with_fp32({kind: figures[kind]["milliseconds"] for kind in files}):
        message(line)
    keys = ("milliseconds", "peak_memory", *(["ratio"] if against else []))
    setting = {"seconds": 5.0, "machine": machine.describe()} | ({"against": against.name} if against else {})
    return {kind: {key: figures[kind][key] for key in keys} | setting for kind in files}


def compare_with_fp32(times: Mapping[str, float]) -> str | None:
    """A line that names the integer kinds slower than fp32: kind → milliseconds; None where there is none."""
    # kinds that multiply integers should be faster than fp32; the other kinds of 8 bits and less only save bytes
    slower = [
        f"{times[kind]:.2f} ms of {kind}" for kind in machine.INTEGER_KINDS if times.get(kind, 0) > times.get("fp32", math.inf)
    ]
    return f"fp32 is faster here: {times['fp32']:.2f} ms against {', '.join(slower)}" if slower else None


def choose_engines(engines: Collection[str] | None) -> tuple[str, ...]:
    """The engines to measure in, each once; None stands for onnxruntime, and OpenVINO where it is installed.

    Raises:
        UsageError: an engine that does not exist, or is not installed.
    """
    if engines is None:
        return ENGINES if _has_openvino() else ENGINES[:1]
    if unknown := sorted(set(engines) - set(ENGINES)):
        raise UsageError(f"unknown engine {', '.join(unknown)}; there are: {', '.join(ENGINES)}")
    if "openvino" in engines and not _has_openvino():
        raise missing_extra("openvino", "openvino")
    return tuple(dict.fromkeys(engines))


def label_in(label: str, engine: str) -> str:
    """The key of a file's figures for an engine in what ``measure`` returns."""
    return label if engine == "onnxruntime" else f"{label} {engine}"


def same_file(one: str | Path, other: str | Path) -> bool:
    """Whether two paths lead to the same place."""
    return Path(one).resolve() == Path(other).resolve()


def make_feeds(session, path: str, seconds: float) -> list[dict[str, np.ndarray]]:
    """Noise for the inputs of an onnxruntime session: once, or for each chunk of the kind "chunked".

    Raises:
        UsageError: its inputs are not one waveform; ``path`` is for the message.
    """
    from w2s_jax.runtime.predictor import ChunkRunner, is_chunked

    inputs = [(end.name, end.type, end.shape) for end in session.get_inputs()]
    if is_chunked([name for name, _, _ in inputs]):
        return list(ChunkRunner(session, path).feeds(_noise((round(seconds * SAMPLING_RATE),))))
    return [_make_feed(path, inputs, seconds)]


def _measure_times(candidates: Mapping[str, _Candidate], runs: int, step: Callable[[], None]) -> dict[str, list[float]]:
    """Seconds of each timed run of each candidate; run i of all belongs to one round."""
    times: dict[str, list[float]] = {label: [] for label in candidates}
    order = random.Random(0)
    for run in range(runs + 1):
        # in another order each time: no file always runs on the caches that the same other one leaves
        for label in order.sample(list(candidates), len(candidates)):
            began = time.perf_counter()
            candidates[label].run()
            if run:
                times[label].append(time.perf_counter() - began)
                step()
    return times


def _measure_peaks(
    candidates: Mapping[str, _Candidate], seconds: float, threads: int, step: Callable[[], None]
) -> dict[str, int]:
    """Peak memory of each candidate in bytes, above that of an empty model in the same engine; none where unknown."""

    @functools.cache
    def empty(engine: str) -> float:
        return statistics.median(_measure_peak(None, seconds, threads, engine) or 0 for _ in range(PROCESSES))

    peaks = {}
    for label, candidate in candidates.items():
        bytes_used = []
        for _ in range(PROCESSES):
            bytes_used.append(_measure_peak(candidate.file, seconds, threads, candidate.engine))
            step()
        if empty(candidate.runtime):
            peaks[label] = round(statistics.median(bytes_used) - empty(candidate.runtime))
    return peaks


def _measure_peak(file: Path | None, seconds: float, threads: int, engine: str) -> int | None:
    """Peak memory in bytes of a fresh process that loads a model (None: an empty one) and runs it once."""
    call = "from w2s_jax.measure import _run_and_print_peak; import sys; _run_and_print_peak(*sys.argv[1:])"
    command = [sys.executable, "-c", call, str(file or ""), str(seconds), str(threads), engine]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        reason = process.stderr.strip().splitlines()[-1]
        raise W2SError(f"measuring the memory of {file or 'an empty process'} failed: {reason}")
    return json.loads(process.stdout)


def _run_and_print_peak(file: str, seconds: str, threads: str, engine: str) -> None:
    run, _ = _load(file or EMPTY, float(seconds), int(threads), engine)
    run()
    print(json.dumps(machine.process_memory().get("peak")))


def _load(file: str | Path | bytes, seconds: float, threads: int, engine: str) -> tuple[Callable[[], object], float]:
    """A function that runs a model once on noise, and the seconds of audio that this is."""
    if engine == "openvino":
        return _load_openvino(file, seconds, threads)
    from w2s_jax.runtime.predictor import ChunkRunner, is_chunked
    from w2s_jax.runtime.session import onnxruntime_errors, open_session

    if engine == "c":  # the process that does nothing: what is compiled needs no interpreter
        return lambda: None, seconds
    session, path = open_session(file, threads)
    if is_chunked([end.name for end in session.get_inputs()]):
        wave = _noise((round(seconds * SAMPLING_RATE),))
        return functools.partial(ChunkRunner(session, path), wave), len(wave) / SAMPLING_RATE
    (feed,) = make_feeds(session, path, seconds)

    def run() -> list[np.ndarray]:
        with onnxruntime_errors(f"{path} failed"):
            return session.run(None, feed)

    return run, next(iter(feed.values())).shape[-1] / SAMPLING_RATE


def _make_feed(path: str, inputs: Sequence[tuple], seconds: float) -> dict[str, np.ndarray]:
    """Noise for a model whose inputs (name, type, shape) are one waveform."""
    if len(inputs) != 1 or inputs[0][1] != "tensor(float)" or len(inputs[0][2]) not in (1, 2, 3):
        got = ", ".join(f"{name} {kind} {shape}" for name, kind, shape in inputs)
        raise UsageError(f"{path}: expected one float input, the waveform [time], [1, time] or [1, 1, time]; got {got}")
    ((name, _, sizes),) = inputs
    *others, length = (size if isinstance(size, int) else None for size in sizes)
    return {name: _noise((*(size or 1 for size in others), length or round(seconds * SAMPLING_RATE)))}


def _noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _has_openvino() -> bool:
    return importlib.util.find_spec("openvino") is not None


class _NotForOpenVINO(W2SError):
    """OpenVINO cannot run a file that may well run in its own engine."""


def _load_openvino(file: str | Path | bytes, seconds: float, threads: int) -> tuple[Callable[[], object], float]:
    """As ``_load``, in OpenVINO.

    Raises:
        UsageError: no such file, or another kind of network.
        _NotForOpenVINO: it cannot run the file; says why.
    """
    import openvino

    if not isinstance(file, bytes):
        if Path(file).is_dir():
            raise _NotForOpenVINO("it is C or WebAssembly")
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
            from w2s_jax.runtime.predictor import is_chunked  # else onnxruntime's memory would be counted as OpenVINO's

            if is_chunked([name for name, _, _ in inputs]):
                raise _NotForOpenVINO("it takes a recording piece by piece, which Predictor does in onnxruntime")
        feed = _make_feed(str(file), inputs, seconds)
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
