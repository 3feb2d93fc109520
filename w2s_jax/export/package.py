"""A model directory: everything that runs, describes and vouches for an exported student."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from w2s_jax import DIMENSIONS, SAMPLING_RATE, __version__, checkpoint, machine, models
from w2s_jax.devices import computing
from w2s_jax.errors import UsageError, W2SError
from w2s_jax.export import direct, litert
from w2s_jax.export import onnx as graph
from w2s_jax.export.compact import compact
from w2s_jax.export.deploy import deploy, in_chunks
from w2s_jax.export.plan import BLOCK, fill_channels, fold, merge
from w2s_jax.export.quantize import COVERAGE, quantize
from w2s_jax.files import write_atomic
from w2s_jax.kinds import FILES
from w2s_jax.metrics import ccc
from w2s_jax.names import line, markdown
from w2s_jax.runtime import Predictor
from w2s_jax.runtime.predictor import first_state

REPORT = "export.json"
#: What each kind is for, in the card.
PURPOSES = {
    "fp32": "everything that reads ONNX",
    "fp16w": "fp32 in half the bytes",
    "int8w": "fp32 in a quarter of the bytes",
    "int8": "onnxruntime, small and fast",
    "qdq": "8 bits in standard operators: OpenVINO and others",
    "int8-int4": "onnxruntime, smallest",
    "litert": "TensorFlow Lite",
    "litert-int8": "TensorFlow Lite, small and fast",
    "chunked": "recordings of any length, piece by piece",
}
#: What is exported when nothing is said.
DEFAULT = ("fp32", "int8")
#: Kinds that compute what the student computes; the others round, and are judged by their CCC with fp32 on real audio.
EXACT = ("fp32", "litert", "chunked")
#: Kinds whose numbers need ranges that are measured on real audio.
RANGED = machine.INTEGER_KINDS
#: Largest difference between an output of an exact kind and of the Flax module, as a share of the largest output if that is
#: above 1: float32 has no more digits.
PARITY_LIMIT = 1e-4
#: Lengths in samples on which parity is proven, besides the shortest ones: primes, whole seconds, up to a minute.
PARITY_LENGTHS = (127, 1021, 8191, 16_000, 31_991, 80_000, 960_000)
#: Fewer calibration waves than this say nothing about the ranges, or about a CCC.
LEAST_WAVES = 8
#: Tokens of a piece of the kind "chunked": about 1 s of Wav2Small's.
CHUNK = 256
#: Largest whole number of a weight with so many bits. 7 are right on every processor, 8 on those of ``machine.EXACT_SUMS``.
LARGEST = {7: 63, 8: 127}
SOURCE = "arXiv 2408.13920"

#: The licences that Hugging Face knows under these names; any other is named in the card's text only.
_HUB_LICENCES = ("apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "bsd-3-clause")


@computing()
def export_student(
    run_or_student_dir: str | Path,
    out: str | Path,
    calibration: Sequence[np.ndarray] | None = None,
    check: Sequence[np.ndarray] | None = None,
    progress: Callable[[str], object] | None = None,
    min_ccc: float = 0.99,
    kinds: Sequence[str] | None = None,
    weight_bits: int = 7,
    measure: Callable[[Mapping[str, Path]], Mapping[str, dict]] | None = None,
) -> dict:
    """Write a model directory for a trained student.

    Everything is built and checked before ``out`` appears as a whole, or not at all. A model directory that is there already is
    replaced; anything else is left alone. A kind that fails, or that is not good enough, is left out with a warning, unless it
    is "fp32", without which nothing is written.

    Args:
        run_or_student_dir: a run directory, or the student directory in it.
        out: the model directory to make.
        calibration: float32 [T] each at 16 kHz, real audio of the kind that the model will hear, at least 8; lengths may
            differ. They set the ranges of eight-bit numbers; without them there are exact kinds only.
        check: float32 [T] each, on which the kinds that round are judged against fp32. Default: every fourth calibration wave,
            which then sets no ranges.
        progress: called with a line of text at each step.
        min_ccc: the least CCC with fp32, in every dimension, of a kind that rounds.
        kinds: keys of ``kinds.FILES``, or "all" that this student can have; "fp32" is always among them, as it is what the
            others are held against. Default: ``DEFAULT``, without "int8" if there is no calibration audio.
        weight_bits: of the weights of "int8", "qdq" and "int8-int4" (the latter's convolutions). 7 are right on every
            processor. 8 are for ARM and x86 with VNNI, which files, card and report say: elsewhere their sums overflow, and
            ``Predictor`` refuses them.
        measure: called with kind → file before the directory is written; what it returns of a kind is put into the report.

    Returns:
        What export.json holds: ``files`` (bytes of each but export.json),
        ``sha256`` (of the same), ``parity`` (limit, max_difference, largest_output,
        lengths, signals; of fp32 against Flax), ``kinds`` (kind → file, bytes, lengths that it was tried on; of exact kinds
        difference_from_flax on these; max_difference, views and ccc per dimension against fp32 on the check waves; how it was
        calibrated or is to be cut; what ``measure`` found), ``failed`` and ``skipped`` (kind → why it is not there),
        ``passes`` (by how much each graph pass changed the outputs), ``versions``.

    Raises:
        UsageError: no student there, ``out`` holds something else, unfit waves, a kind that does not exist or that this student
            cannot have, 8-bit weights where their sums overflow, or an environment that cannot export.
        W2SError: "fp32" differs from Flax by more than 1e-4 (of the largest output, if that is above 1).

    Warns:
        UserWarning: a kind is not written: an exact one differs from Flax as above, the CCC of another one is below
            ``min_ccc``, or it could not be built.
    """
    graph.require_tools()
    say = progress or (lambda line: None)
    out = Path(out).resolve()
    if out.exists() and not (out / REPORT).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not a model directory (it has no {REPORT}); choose another place")
    student, variables, config = checkpoint.load_student(run_or_student_dir)
    source = Path(run_or_student_dir)
    if (source / "student" / checkpoint.CONFIG).exists():
        source = source / "student"
    calibration, check = _split(calibration, check, student.minimum_samples)
    kinds, skipped = _chosen(kinds, student, bool(calibration))
    if weight_bits not in LARGEST:
        raise UsageError(f"weights have 7 or 8 bits, got {weight_bits}")
    if weight_bits == 8 and set(kinds) & set(RANGED) and machine.saturates():
        raise UsageError(
            "8-bit weights cannot be judged here: their sums overflow on this processor (x86 without VNNI); leave out "
            f"--weight-bits 8, for 7 bits are right everywhere, or export on {machine.EXACT_SUMS}"
        )

    facts = _facts(student, config)
    say("fp32: converting")
    fp32, passes = fp32_graph(student, variables, _probes([*calibration, *check][:4], student.minimum_samples))
    refused = [name for name, change in passes.items() if change > graph.PASS_LIMIT]
    if refused:
        say(f"fp32: left out graph passes that would change the outputs: {', '.join(refused)}")
    cases = _cases(student, variables, [*check, *calibration])
    report: dict = {"files": {}, "parity": {}, "kinds": {}, "failed": {}, "skipped": skipped}
    report |= {"passes": passes, "versions": _versions()}
    with tempfile.TemporaryDirectory() as place:
        made, reference = {}, None
        for kind in kinds:
            file = Path(place) / FILES[kind]
            try:
                content, how = build(kind, student, variables, fp32, facts, calibration, say, weight_bits)
                file.write_bytes(content)
                predictor = Predictor(file)
                row = {"file": file.name, "bytes": len(content), **how}
                row["lengths"], parity = _tried(kind, predictor, cases)
                if kind in EXACT:
                    row["difference_from_flax"] = parity["max_difference"]
                outputs = _outputs(predictor, check)
                if kind == "fp32":
                    reference, report["parity"] = outputs, parity
                elif check:  # without check audio there are exact kinds only
                    row |= _compared(outputs, reference, config["dimensions"])
                    _judge(kind, row, min_ccc)
            except Exception as error:  # the converters of other houses raise whatever they like
                if kind == "fp32":  # what the others are held against
                    raise
                report["failed"][kind] = why = _reason(error)
                warnings.warn(f"{kind} is not written: {why}", stacklevel=2)
                continue
            if kind == "fp32":
                seconds = max(row["lengths"]) / SAMPLING_RATE
                say(f"fp32: differs from Flax by at most {parity['max_difference']:.1e}, up to {seconds:.0f} s")
            elif check:
                say(f"{kind}: {len(content) / 1000:.1f} kB, CCC with fp32 at least {min(row['ccc'].values()):.5f}")
            made[kind], report["kinds"][kind] = file, row
        for kind, figures in (measure(made) if measure else {}).items():
            report["kinds"][kind] |= figures
        files = {file.name: file.read_bytes() for file in made.values()}
    for kind, why in skipped.items():
        say(f"{kind}: skipped, {why}")

    for name in (checkpoint.WEIGHTS, checkpoint.CONFIG):
        files[name] = (source / name).read_bytes()
    files["model.yaml"] = _audonnx_yaml(config["dimensions"]).encode()
    report["files"] = {name: len(content) for name, content in files.items()}
    files["README.md"] = _card(out.name, facts, config, report).encode()
    report["files"]["README.md"] = len(files["README.md"])
    report["sha256"] = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files[REPORT] = (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode()
    write_atomic(out, functools.partial(_write, files))
    say(f"wrote {out}")
    return report


def fp32_graph(student, variables: dict, probes: Sequence[np.ndarray], filled: str | None = None) -> tuple:
    """A student's float32 graph and what each graph pass changed.

    Args:
        student, variables: the student.
        probes: float32 [T] each, to judge passes by.
        filled: as for ``deploy``; default: what suits float32.
    """
    model = graph.convert(*deploy(student, variables, filled or _filled(student)), student.dimensions, student.minimum_samples)
    return graph.simplify(model, probes)


def _filled(student) -> str:
    """Where filling up channels makes float32 fast: its convolutions read fewer than 16 as they are, its pooling does not.

    From 16 on they want whole blocks as well; but filling up 24 costs more than it saves.
    """
    if _properties(student) is None:
        return "none"
    channels = direct.trunk_of(models.outline(student))[0].kernel.shape[0]
    if channels < BLOCK:
        return "pool"
    return "all" if -channels % BLOCK <= channels / 4 else "none"


def _properties(student) -> tuple[str, ...] | None:
    """``direct.properties`` of a student."""
    return direct.properties(models.outline(student) if hasattr(student, "fold") else None)


@computing()
def build(
    kind: str,
    student,
    variables: dict,
    fp32,
    facts: Mapping[str, str],
    calibration: Sequence[np.ndarray] = (),
    say: Callable[[str], object] = lambda line: None,
    weight_bits: int = 7,
    coverages: Sequence[float] = COVERAGE,
) -> tuple[bytes, dict]:
    """One kind of a student.

    Args:
        kind: a key of ``kinds.FILES``.
        student, variables: the student.
        fp32: its graph, of ``fp32_graph``; not changed.
        facts: what the file says of itself besides its kind.
        calibration: float32 [T] each, for the kinds in ``RANGED``.
        say: called with a line of text now and then.
        weight_bits: of the kinds in ``RANGED``.
        coverages: as ``quantize`` takes them.

    Returns:
        The file's content, and a dict for the report.

    Raises:
        UsageError: this student cannot have that kind.
        W2SError: an operator is missing in the format.
    """
    if kind not in kinds_of(student):
        raise _impossible(student, kind)
    facts = {**facts, "kind": kind}
    if kind.startswith("litert"):
        content = litert.convert(*deploy(student, variables), student.dimensions, student.minimum_samples, facts)
        return (content if kind == "litert" else litert.quantized(content, facts)), {}
    if kind == "chunked":
        model, cut = _chunked(student, variables)
        return _packed(model, {**facts, "chunk": json.dumps(cut)}), {"chunk": cut}
    if kind not in RANGED:
        return _packed(fp32, facts, {"fp16w": "fp16", "int8w": "int8"}.get(kind, "fp32")), {}
    told, largest = functools.partial(_told, say, kind), LARGEST[weight_bits]
    how = {"calibration_waves": len(calibration), "weight_bits": weight_bits}
    if weight_bits == 8:
        how[machine.NEEDS] = facts[machine.NEEDS] = machine.EXACT_SUMS
    facts["weight_bits"] = str(weight_bits)
    if kind != "qdq" and _properties(student) is not None:
        four, plan = kind == "int8-int4", merge(fold(student, variables))
        model, chosen = direct.quantize_direct(plan, fp32, calibration, told, coverages, largest, four)
    else:  # of other students int8 is the standard form too: onnxruntime makes its own operators of it when it loads the file
        if (
            _properties(student) is not None and _filled(student) != "all"
        ):  # eight-bit convolutions need whole blocks in any case
            fp32, _ = fp32_graph(student, variables, _probes(calibration[:2], student.minimum_samples), "all")
        model, chosen = quantize(fp32, calibration, told, coverages, largest)
    return _packed(model, facts), how | chosen


def _chunked(student, variables: dict) -> tuple:
    """The graph of the kind "chunked", and how to cut a recording for it."""
    plan = merge(fold(student, variables))
    forward, weights, cut = in_chunks(fill_channels(plan, _filled(student)))
    features = jax.eval_shape(forward, weights, np.zeros((1, student.minimum_samples), np.float32))["value"].shape[0]
    shape = (features, "tokens")
    model = graph.convert(forward, weights, {"value": shape, "score": shape}, student.minimum_samples)
    direct.chunked(model, plan)
    # neither the whole nor a fixed number of tokens: both would look like something that passes can take away
    example = {"state": first_state(features), "first": np.array([1]), "last": np.array([-1])}
    model, _ = graph.simplify(model, _probes([], student.minimum_samples), example)
    return model, {**cut, "tokens": CHUNK, "hop": student.hop, "n_fft": student.n_fft}


def _packed(model, facts: Mapping[str, str], weights: str = "fp32") -> bytes:
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


def _told(say: Callable[[str], object], kind: str, line: str) -> None:
    say(f"{kind}: {line}")


def kinds_of(student) -> list[str]:
    """The kinds that a student can have."""
    properties = _properties(student) or ()
    cannot = {"chunked": "attention" not in properties, "int8-int4": "tokens" not in properties}
    return [kind for kind in FILES if not cannot.get(kind)]


def _impossible(student, kind: str) -> UsageError:
    return UsageError(f"{type(student).__name__} cannot be exported as {kind}; it can as {', '.join(kinds_of(student))}")


def _chosen(kinds: Sequence[str] | None, student, calibrated: bool) -> tuple[list[str], dict[str, str]]:
    """The kinds to build, fp32 first, and those left out with the reason."""
    if kinds is None:
        return (list(DEFAULT), {}) if calibrated else (["fp32"], {"int8": "no calibration audio was given"})
    possible = kinds_of(student)
    if "all" in kinds:
        skipped = {kind: "no calibration audio was given" for kind in possible if kind not in EXACT and not calibrated}
        return [kind for kind in possible if kind not in skipped], skipped
    for kind in kinds:
        if kind not in FILES:
            raise UsageError(f"unknown kind {kind!r}; there are: {', '.join(FILES)}")
        if kind not in possible:
            raise _impossible(student, kind)
        if kind not in EXACT and not calibrated:
            raise UsageError(f"the kind {kind} rounds, and has to be judged on real audio: give calibration audio")
    return list(dict.fromkeys(["fp32", *kinds])), {}


def _write(files: dict[str, bytes], directory: Path) -> None:
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)


def _split(
    calibration: Sequence[np.ndarray] | None, check: Sequence[np.ndarray] | None, minimum: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Waves for ranges and waves to judge by, checked where they enter."""
    calibration = [_checked(wave, f"calibration wave {n}", minimum) for n, wave in enumerate(calibration or ())]
    held_out = [_checked(wave, f"check wave {n}", minimum) for n, wave in enumerate(check or ())]
    if calibration and len(calibration) < LEAST_WAVES:
        raise UsageError(f"int8 needs at least {LEAST_WAVES} calibration waves, got {len(calibration)}")
    if held_out and len(held_out) < 2:
        raise UsageError("a CCC needs at least 2 check waves, got 1")
    if calibration and not held_out:
        return [wave for n, wave in enumerate(calibration) if n % 4], calibration[::4]
    return calibration, held_out


def _checked(wave: np.ndarray, name: str, minimum: int) -> np.ndarray:
    wave = np.asarray(wave)
    if wave.ndim != 1 or not np.issubdtype(wave.dtype, np.floating) or len(wave) < minimum:
        raise UsageError(f"{name}: expected float32 [T] with T >= {minimum}, got {wave.dtype} {list(wave.shape)}")
    if not np.isfinite(wave).all():
        raise UsageError(f"{name} is not finite")
    return wave.astype(np.float32)


def _probes(waves: Sequence[np.ndarray], shortest: int) -> list[np.ndarray]:
    """What graph passes are judged on: the given audio, noise of several lengths, and silence."""
    generator = np.random.default_rng(1)
    noise = [generator.normal(size=max(length, shortest)).astype(np.float32) for length in (1021, 16_000, 31_991)]
    return [*waves, *noise, np.zeros(max(5000, shortest), np.float32)]


def _cases(student, variables: dict, waves: Sequence[np.ndarray]) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """What is heard, a waveform, what the module that was trained says of it: noise, silence and real audio, every length."""
    shortest = student.minimum_samples
    lengths = sorted({shortest, shortest + 1, shortest + student.hop, *(n for n in PARITY_LENGTHS if n > shortest)})
    longest = lengths[-1]
    signals = {
        "noise": np.random.default_rng(0).normal(size=longest).astype(np.float32),
        # a minute of equal frames is the worst case of onnxruntime's float32 sums over time (relative error 3e-5)
        "silence": np.zeros(5 * SAMPLING_RATE, np.float32),
    }
    if len(waves):
        real = np.concatenate(waves[:64])
        signals["audio"] = np.resize(real, longest)  # repeats what is too short
    cases = [(name, signal[:length]) for length in lengths for name, signal in signals.items() if length <= len(signal)]
    reference = jax.jit(student.apply)
    return [(name, wave, np.asarray(reference(variables, wave[None]))[0]) for name, wave in cases]


def _tried(kind: str, predictor: Predictor, cases: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> tuple[list[int], dict]:
    """The lengths on which a model gave finite numbers; and, if its kind is exact, how near to the module's they are."""
    worst, largest = 0.0, 0.0
    for name, wave, expected in cases:
        actual = np.array(list(predictor(wave).values()))
        scale = np.abs(expected).max()
        difference = float(np.abs(actual - expected).max() / max(1.0, scale))
        if kind in EXACT and not difference <= PARITY_LIMIT:  # not a number is no parity either
            raise W2SError(
                f"the {kind} model and the Flax student differ by {difference:.2g} on {len(wave)} samples of {name}; "
                f"the limit is {PARITY_LIMIT:.0e}{', nothing was written' * (kind == 'fp32')}"
            )
        worst, largest = max(worst, difference), max(largest, float(scale))
    lengths = sorted({len(wave) for _, wave, _ in cases})
    signals = list(dict.fromkeys(name for name, _, _ in cases))
    about = {"limit": PARITY_LIMIT, "max_difference": worst, "largest_output": largest, "lengths": lengths, "signals": signals}
    return lengths, about


def _outputs(predictor: Predictor, waves: Sequence[np.ndarray]) -> np.ndarray:
    """[waves, dimensions]"""
    return np.array([list(predictor(wave).values()) for wave in waves])


def _compared(outputs: np.ndarray, reference: np.ndarray, dimensions: Sequence[str]) -> dict:
    """CCC and largest difference of a kind's outputs from fp32's, both [waves, dimensions]."""
    scores = {name: float(score) for name, score in zip(dimensions, ccc(outputs, reference), strict=True)}
    return {"ccc": scores, "max_difference": float(np.abs(outputs - reference).max()), "views": len(outputs)}


def _judge(kind: str, row: dict, least: float) -> None:
    """Refuse a kind whose row in the report has a CCC below ``least``, with the options that may help."""
    worst = min(row["ccc"], key=row["ccc"].get)
    if not row["ccc"][worst] >= least:
        ways = ["give --calibration audio of the kind that the student was trained on"]
        if kind in RANGED:
            ways.append("take --kind int8w, whose weights alone are rounded")
        ways.append(f"or accept it with a lower --min-ccc than {least:g}")
        raise W2SError(
            f"too far from fp32: CCC {row['ccc'][worst]:.4f} in {worst} on {row['views']} waves, at least {least:g} expected; "
            + ", ".join(ways)
        )


def _reason(error: Exception) -> str:
    """An error in one line."""
    said = " ".join(str(error).split())[:500]
    return said if isinstance(error, W2SError) else f"{type(error).__name__}: {said}"


def _facts(student, config: dict) -> dict[str, str]:
    """What a reader of the .onnx file alone should know; strings, as the format has it."""
    teacher = config["teacher"]
    return {
        "w2s_jax": __version__,
        "student": config["student"],
        "fields": json.dumps(config["fields"]),
        "dimensions": ",".join(config["dimensions"]),
        "sampling_rate": str(config["sampling_rate"]),
        "minimum_samples": str(student.minimum_samples),
        "parameters": str(sum(models.count(student).values())),
        "teacher": teacher["name"],
        "teacher_fingerprint": teacher["fingerprint"],
        **({"pretrained": _started(pretrained)} if (pretrained := config.get("pretrained")) else {}),
        "licence": _licence(config),
        "stand_in": "true" if teacher["stand_in"] else "false",
        "source": SOURCE,
    }


def _started(pretrained: dict) -> str:
    return f"{pretrained['what']} ({pretrained['source']}, fingerprint {pretrained['fingerprint']})"


def _licence(config: dict) -> str:
    """The terms that a student inherits: its teacher's, and those of the weights that its training started from."""
    teacher, pretrained = config["teacher"], config.get("pretrained")
    if not pretrained or pretrained["licence"] == teacher["licence"]:
        return teacher["licence"]
    return f"{teacher['licence']} (teacher); {pretrained['licence']} (weights that it started from)"


def _audonnx_yaml(dimensions: Sequence[str]) -> str:
    """The object file that audEERING's ``audonnx.load`` reads beside model.onnx; JSON strings are YAML strings."""
    return (
        "$audonnx.core.model.Model==1.0.1:\n"
        f"  path: {FILES['fp32']}\n"
        "  labels:\n"
        f"    {graph.LOGITS}: {json.dumps(list(dimensions))}\n"
        "  transform: null\n"
    )


def _row(kind: str, row: dict) -> str:
    """A kind's line in the card."""
    if kind in EXACT:
        off = f"at most {row['difference_from_flax']:.1e} from the Flax student"
    else:
        off = f"at most {row['max_difference']:.2g} from fp32"
    scores = ", ".join(f"{markdown(name)} {score:.4f}" for name, score in row.get("ccc", {}).items())
    scores = f"{scores} ({row['views']} clips)" if scores else None
    time = f"{row['milliseconds']:.1f} ms for {row['seconds']:g} s" if "milliseconds" in row else None
    if "ratio" in row:
        time += f", {row['ratio']:.2f} of {row['against']}"
    memory = f"{row['peak_memory'] / 1e6:.1f} MB" if row.get("peak_memory") is not None else None
    cells = (
        kind,
        PURPOSES[kind],
        row["file"],
        f"{row['bytes'] / 1000:.0f} kB",
        row.get(machine.NEEDS, "any"),
        off,
        scores,
        time,
        memory,
    )
    return "| " + " | ".join(cell or "–" for cell in cells) + " |"


def _versions() -> dict[str, str]:
    found = {"w2s_jax": __version__}
    for package in ("jax", "flax", "tensorflow-cpu", "tensorflow", "tf2onnx", "onnx", "onnxruntime", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # one of the two TensorFlows
            continue
    return found


def _card(name: str, facts: dict[str, str], config: dict, report: dict) -> str:
    """The model card, with the front matter that Hugging Face reads."""
    teacher, dimensions = config["teacher"], config["dimensions"]
    licence, pretrained = _licence(config), config.get("pretrained")
    slug = re.sub(r"[\s_]+", "-", teacher["licence"].split("(")[0].strip().lower())  # "MIT (whose)" is MIT
    if licence != teacher["licence"]:  # two licences have no name there
        slug = "other"
    emotion = tuple(dimensions) == DIMENSIONS
    head = {
        "license": slug if slug in _HUB_LICENCES else "other",
        "library_name": "onnx",
        "pipeline_tag": "audio-classification",
        "tags": [*(["speech-emotion"] if emotion else []), "knowledge-distillation", "wav2small", "onnx", *dimensions],
    }
    if slug not in _HUB_LICENCES:
        head["license_name"] = line(licence)
    if "/" in teacher["name"]:  # a model of the hub has an owner
        head["base_model"] = teacher["name"]
    if validation := config.get("validation_ccc"):  # a run without validation views has none
        metrics = [
            {"type": "ccc", "name": f"CCC {dimension}", "value": round(validation[dimension], 4)} for dimension in dimensions
        ]
        data = {"name": "labels of the teacher", "type": "private", "split": "validation"}
        head["model-index"] = [
            {"name": name, "results": [{"task": {"type": "audio-classification"}, "dataset": data, "metrics": metrics}]}
        ]
    front = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items())  # JSON is YAML

    warning, caution, started = "", "", ""
    if pretrained:
        terms = f"its licence, whose terms this model inherits too: {markdown(pretrained['licence'])}"
        started = f"- Started from: {markdown(_started(pretrained))}; {terms}\n"
    if emotion:
        caution = (
            "- The values describe how speech sounds to listeners on average. They are not a measure of what a person feels;\n"
            "  do not decide about a person by them.\n"
        )
    if teacher["stand_in"]:
        warning = (
            "\n> **Stand-in teacher.** The labels behind this model only imitate a real teacher. It shows that the chain "
            "works; its values mean nothing else.\n"
        )
    # strings that a teacher brings are shown as they are, whatever they would mean in Markdown, HTML or Python
    names, shown = markdown(", ".join(dimensions)), {key: markdown(teacher[key]) for key in ("name", "fingerprint", "licence")}
    outputs = ", ".join(f"{json.dumps(dimension, ensure_ascii=False)}: ..." for dimension in dimensions)
    table = "\n".join(_row(kind, row) for kind, row in report["kinds"].items())
    needs = ""
    if narrow := [kind for kind, row in report["kinds"].items() if machine.NEEDS in row]:
        needs = (
            f" The weights of {', '.join(narrow)} have 8 bits: they need {machine.EXACT_SUMS} (AMD from Zen 4, Intel from\n"
            "Ice Lake and Cascade Lake on). On other x86 processors their sums overflow and the values are wrong; `Predictor`\n"
            "refuses them there."
        )
    failed = "".join(f"\n\nNot here: {kind}, {why}." for kind, why in report["failed"].items())
    return f"""---
{front}
---
# {name}

{config["student"]} ({int(facts["parameters"]):,} parameters, {SOURCE}): 16 kHz mono speech in, {names} out.
{warning}
```python
from w2s_jax.runtime import Predictor

predictor = Predictor({json.dumps(name)})
print(predictor(wave, 16000))  # {{{outputs}}}
```

Input `signal`, float32 `[1, time]`, any length from {facts["minimum_samples"]} samples on; output `logits`,
`[1, {len(dimensions)}]`, not clipped. The network normalises each recording, so its level does not matter.

| kind | for | file | size | right on | how far it is off | CCC against fp32 | time | peak memory |
|---|---|---|---|---|---|---|---|---|
{table}

`Predictor({json.dumps(name)}, kind=...)` takes another kind than fp32.{needs}{failed}

- Teacher: {shown["name"]} (fingerprint {shown["fingerprint"]}). The student learned its outputs, not human labels.
- Licence of the teacher, whose terms this model inherits: {shown["licence"]}
{started}{caution}- Made with w2s_jax {__version__}; how it was checked is in {REPORT}. `audonnx.load` reads this directory too.
"""
