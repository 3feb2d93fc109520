"""How each kind of file is built: from a student to the bytes of one file."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import jax
import numpy as np

from w2s_jax import __version__, machine, models
from w2s_jax.devices import computing
from w2s_jax.errors import UsageError
from w2s_jax.export import direct, litert
from w2s_jax.export import onnx as graph
from w2s_jax.export.c import generate, reference, wasm
from w2s_jax.export.c.network import take_apart
from w2s_jax.export.c.quantise import quantise
from w2s_jax.export.compact import compact
from w2s_jax.export.deploy import deploy, split_at_softmax
from w2s_jax.export.plan import CHANNEL_BLOCK, fill_channels, fold, merge
from w2s_jax.export.quantize import COVERAGE, quantize
from w2s_jax.install import pip_install
from w2s_jax.kinds import INTEGER_KINDS, KINDS
from w2s_jax.metrics import ccc
from w2s_jax.models.plan import Plan
from w2s_jax.runtime import c
from w2s_jax.runtime.predictor import first_state

#: Tokens of a piece of the kind "chunked": about 1 s of Wav2Small's.
CHUNK = 256
#: Largest whole number of a weight with so many bits. 7 are right on every processor, 8 on those of ``machine.EXACT_SUMS``.
LARGEST = {7: 63, 8: 127}


@dataclass(frozen=True)
class Source:
    """What a file is built from; the fields are the arguments of ``build``."""

    student: object
    variables: Mapping
    fp32: object
    calibration: Sequence[np.ndarray]
    message: Callable[[str], object]
    weight_bits: int
    coverages: Sequence[float]

    @cached_property
    def plan(self) -> Plan:
        """The student's plan, merged."""
        return merge(fold(self.student, self.variables))


def fp32_graph(student, variables: Mapping, probes: Sequence[np.ndarray], filled: str | None = None) -> tuple:
    """A student's float32 graph and what each graph pass changed.

    Args:
        student, variables: the student.
        probes: float32 [T] each, to judge passes by.
        filled: as for ``deploy``; default: what suits float32.
    """
    forward, weights = deploy(student, variables, filled or _where_to_fill(student))
    return graph.simplify(graph.convert(forward, weights, student.dimensions, student.minimum_samples), probes)


def _where_to_fill(student) -> str:
    """Where filling up channels makes float32 fast: its convolutions read fewer than 16 as they are, its pooling does not.

    From 16 on they want whole blocks as well; but filling up 24 costs more than it saves.
    """
    if _properties(student) is None:
        return "none"
    channels = direct.trunk_of(models.outline(student))[0].kernel.shape[0]
    if channels < CHANNEL_BLOCK:
        return "pool"
    return "all" if -channels % CHANNEL_BLOCK <= channels / 4 else "none"


def _properties(student) -> tuple[str, ...] | None:
    """``direct.find_properties`` of a student."""
    return direct.find_properties(models.outline(student) if hasattr(student, "fold") else None)


def kinds_of(student) -> list[str]:
    """The kinds that a student can have."""
    found = _properties(student)
    properties = (None,) if found is None else (None, "trunk", *found)
    return [name for name, kind in KINDS.items() if kind.requires in properties]


def missing_tool(kind: str) -> str | None:
    """Why a kind cannot be made or judged in this environment; None where it can, as far as is known beforehand."""
    if kind == "wasm":
        lacking = [name for name in ("ziglang", "wasmtime") if importlib.util.find_spec(name) is None]
        return f"{' and '.join(lacking)} not installed: {pip_install('wasm')}" if lacking else None
    if kind in ("c", "c-int8"):
        try:
            c.compiler()
        except UsageError as error:
            return str(error)
    return None


def require_kind(student, kind: str) -> None:
    """Refuse a kind that a student cannot have.

    Raises:
        UsageError: names those that it can have.
    """
    if kind not in (possible := kinds_of(student)):
        raise UsageError(f"{type(student).__name__} cannot be exported as {kind}; it can as {', '.join(possible)}")


@computing()
def build(
    kind: str,
    student,
    variables: Mapping,
    fp32,
    facts: Mapping[str, str],
    calibration: Sequence[np.ndarray] = (),
    message: Callable[[str], object] = lambda line: None,
    weight_bits: int = 7,
    coverages: Sequence[float] = COVERAGE,
) -> tuple[bytes | dict[str, bytes], dict]:
    """One kind of a student.

    Args:
        kind: a key of ``kinds.KINDS``.
        student, variables: the student.
        fp32: its graph, of ``fp32_graph``; not changed.
        facts: what the file says of itself besides its kind.
        calibration: float32 [T] each, for the kinds that are calibrated.
        message: called with a line of text now and then.
        weight_bits: of the kinds that are calibrated.
        coverages: as ``quantize`` takes them.

    Returns:
        The file's content, or the name and content of each of its ``parts``; and a dict for the report.

    Raises:
        UsageError: this student cannot have that kind.
        W2SError: an operator is missing in the format.
    """
    require_kind(student, kind)
    facts, how = {**facts, "kind": kind}, {}
    if KINDS[kind].calibrated:
        how = {"calibration_waves": len(calibration)}
    if kind in INTEGER_KINDS:
        how["weight_bits"], facts["weight_bits"] = weight_bits, str(weight_bits)
        if weight_bits == 8:
            how[machine.NEEDS] = facts[machine.NEEDS] = machine.EXACT_SUMS
    source = Source(
        student, variables, fp32, calibration, lambda line: message(f"{kind}: {line}"), weight_bits, coverages
    )  # fmt: skip
    content, more = BUILDERS[kind](source, facts)
    return content, how | more


def _build_float(source: Source, facts: Mapping[str, str], weights: str = "fp32") -> tuple[bytes, dict]:
    return pack(source.fp32, facts, weights), {}


def _build_int8(source: Source, facts: Mapping[str, str], four_bits: bool = False) -> tuple[bytes, dict]:
    if _properties(source.student) is None:  # onnxruntime makes its own operators of the standard form when it loads the file
        return _build_qdq(source, facts)
    model, how = direct.quantize_direct(
        source.plan, source.fp32, source.calibration, source.message, source.coverages, LARGEST[source.weight_bits], four_bits
    )
    return pack(model, facts), how


def _build_qdq(source: Source, facts: Mapping[str, str]) -> tuple[bytes, dict]:
    student, fp32 = source.student, source.fp32
    # eight-bit convolutions need whole blocks in any case
    if _properties(student) is not None and _where_to_fill(student) != "all":
        fp32, _ = fp32_graph(student, source.variables, make_probes(source.calibration[:2], student.minimum_samples), "all")
    model, how = quantize(fp32, source.calibration, source.message, source.coverages, LARGEST[source.weight_bits])
    return pack(model, facts), how


def _build_litert(source: Source, facts: Mapping[str, str], int8: bool = False) -> tuple[bytes, dict]:
    student = source.student
    content = litert.convert(*deploy(student, source.variables), student.dimensions, student.minimum_samples, facts)
    return litert.quantize_weights(content, facts) if int8 else content, {}


def _build_chunked(source: Source, facts: Mapping[str, str]) -> tuple[bytes, dict]:
    student, plan = source.student, source.plan
    forward, weights, cut = split_at_softmax(fill_channels(plan, _where_to_fill(student)))
    features = jax.eval_shape(forward, weights, np.zeros((1, student.minimum_samples), np.float32))["value"].shape[0]
    shape = (features, "tokens")
    model = graph.convert(forward, weights, {"value": shape, "score": shape}, student.minimum_samples)
    direct.carry_state(model, plan)
    # neither the whole nor a fixed number of tokens: both would look like something that passes can take away
    example = {"state": first_state(features), "first": np.array([1]), "last": np.array([-1])}
    model, _ = graph.simplify(model, make_probes([], student.minimum_samples), example)
    spectrum = plan.layers[1]
    cut |= {"tokens": CHUNK, "hop": spectrum.hop, "n_fft": len(spectrum.real)}
    return pack(model, {**facts, "chunk": json.dumps(cut)}), {"chunk": cut}


def _build_c(source: Source, facts: Mapping[str, str]) -> tuple[dict[str, bytes], dict]:
    return generate.generate(fold(source.student, source.variables), facts), {}


def _build_c_int8(source: Source, facts: Mapping[str, str]) -> tuple[dict[str, bytes], dict]:
    """Of the coverages that with the best CCC, its outputs shifted back by what rounding does to their mean."""
    plan = fold(source.student, source.variables)
    network, waves = take_apart(plan), source.calibration
    ends, _ = direct.measure_ranges(source.fp32, waves, source.coverages)
    wanted, best, scores = graph.run(source.fp32, waves), None, {}
    for coverage in source.coverages:
        numbers = quantise(network, ends[coverage])
        outputs = np.array([reference.predict(network, numbers, wave) for wave in waves])
        shift = (wanted - outputs).mean(axis=0)
        scores[str(coverage)] = score = float(ccc(outputs + shift, wanted).min())
        source.message(f"ranges over {coverage:.2%} of the values give CCC {score:.5f} against fp32")
        if best is None or score > scores[str(best[0])]:
            best = coverage, numbers, shift
    coverage, numbers, shift = best
    return generate.generate_int8(plan, numbers, facts, shift), {"coverage": coverage, "candidates": scores}


def _build_wasm(source: Source, facts: Mapping[str, str]) -> tuple[dict[str, bytes], dict]:
    files = generate.generate(fold(source.student, source.variables), facts, packed=True)
    return wasm.compile_module(files, facts), {}


#: kind → (source, facts) → the file's content, or that of each of its parts; and a dict for the report.
BUILDERS: dict[str, Callable[[Source, Mapping[str, str]], tuple[bytes | dict[str, bytes], dict]]] = {
    "fp32": _build_float,
    "fp16w": partial(_build_float, weights="fp16"),
    "int8w": partial(_build_float, weights="int8"),
    "int8": _build_int8,
    "qdq": _build_qdq,
    "int8-int4": partial(_build_int8, four_bits=True),
    "litert": _build_litert,
    "litert-int8": partial(_build_litert, int8=True),
    "chunked": _build_chunked,
    "c": _build_c,
    "c-int8": _build_c_int8,
    "wasm": _build_wasm,
}


def write(content: bytes | Mapping[str, bytes], file: Path) -> None:
    """Write what ``build`` returns: a file, or a directory."""
    if isinstance(content, bytes):
        file.write_bytes(content)
        return
    file.mkdir()
    for name, part in content.items():
        (file / name).write_bytes(part)


def pack(model, facts: Mapping[str, str], weights: str = "fp32") -> bytes:
    """The file of a graph, its constants packed; ``model`` is not changed."""
    import onnx

    packed = type(model)()
    packed.CopyFrom(model)
    compact(packed, weights)
    onnx.helper.set_model_props(packed, dict(facts))
    packed.producer_name, packed.producer_version = "w2s_jax", __version__
    packed.doc_string = ""
    onnx.checker.check_model(packed)
    return packed.SerializeToString()


def make_probes(waves: Sequence[np.ndarray], shortest: int) -> list[np.ndarray]:
    """What graph passes are judged on: the given audio, noise of several lengths, and silence."""
    generator = np.random.default_rng(1)
    noise = [generator.normal(size=max(length, shortest)).astype(np.float32) for length in (1021, 16_000, 31_991)]
    return [*waves, *noise, np.zeros(max(5000, shortest), np.float32)]
