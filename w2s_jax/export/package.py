"""A model directory: everything that runs, describes and vouches for an exported student."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from w2s_jax import DIMENSIONS, SAMPLING_RATE, __version__, checkpoint, models
from w2s_jax.artifacts import UsageError, W2SError, write_atomic
from w2s_jax.export import onnx as graph
from w2s_jax.export.deploy import deploy
from w2s_jax.export.quantize import quantize
from w2s_jax.metrics import ccc

FP32, INT8, REPORT = "model.onnx", "model.int8.onnx", "export.json"
#: Largest difference between an output of the ONNX file and of the Flax module, as a share of the largest output if that is
#: above 1: float32 has no more digits.
PARITY_LIMIT = 1e-4
#: Lengths in samples on which parity is proven, besides the shortest ones: primes, whole seconds, up to a minute.
PARITY_LENGTHS = (127, 1021, 8191, 16_000, 31_991, 80_000, 960_000)
#: Fewer calibration waves than this say nothing about the ranges, or about a CCC.
LEAST_WAVES = 8
#: Zeros fill the int8 trunk's channels to this multiple, which onnxruntime's fast int8 convolution needs.
INT8_BLOCK = 16
SOURCE = "arXiv 2408.13920"

#: The licences that Hugging Face knows under these names; any other is named in the card's text only.
_HUB_LICENCES = ("apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "bsd-3-clause")


def export_student(
    run_or_student_dir: str | Path,
    out: str | Path,
    calibration: Sequence[np.ndarray] | None = None,
    check: Sequence[np.ndarray] | None = None,
    progress: Callable[[str], object] | None = None,
    min_int8_ccc: float = 0.95,
) -> dict:
    """Write a model directory for a trained student.

    Everything is built and checked in memory first: ``out`` appears as a whole, or not at all. A model directory that is
    there already is replaced; anything else is left alone.

    Args:
        run_or_student_dir: a run directory, or the student directory in it.
        out: the model directory to make.
        calibration: float32 [T] each at 16 kHz, real audio of the kind that the model will hear, at least 8; lengths may
            differ. They set the ranges of the int8 model; without them there is none.
        check: float32 [T] each, on which int8 is judged against fp32. Default: every fourth calibration wave, which then sets
            no ranges.
        progress: called with a line of text at each step.
        min_int8_ccc: the least CCC of int8 against fp32, in every dimension.

    Returns:
        What export.json holds: ``files`` (bytes of each but export.json), ``parity`` (limit, max_difference, largest_output,
        lengths, signals),
        ``int8`` (ccc per dimension, max_difference, views, calibration_waves, coverage, candidates; or ``skipped``),
        ``passes`` (by how much each graph pass changed the outputs), ``versions``.

    Raises:
        UsageError: no student there, ``out`` holds something else, unfit waves, or an environment that cannot export.
        W2SError: ONNX and Flax differ by more than 1e-4 (of the largest output, if that is above 1), or int8 is too far from
            fp32.
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
    shortest = student.minimum_samples
    calibration, check = _split(calibration, check, shortest)

    say("fp32: converting")
    outputs = len(config["dimensions"])
    probes = _probes([*calibration, *check][:4], shortest)
    plain = graph.convert(*deploy(student, variables), outputs, shortest)
    fp32, passes = graph.simplify(plain, probes)
    refused = [name for name, change in passes.items() if change > graph.PASS_LIMIT]
    if refused:
        say(f"fp32: left out graph passes that would change the outputs: {', '.join(refused)}")
    parity = _parity(fp32, student, variables, [*check, *calibration], say)

    facts = _facts(student, config)
    files = {FP32: _finished(fp32, {**facts, "kind": "fp32"})}
    if calibration:
        say("int8: converting")
        blocked, _ = graph.simplify(graph.convert(*deploy(student, variables, INT8_BLOCK), outputs, shortest), probes)
        int8, choice = quantize(blocked, calibration, say)
        judged = _judge(int8, fp32, check, config["dimensions"], min_int8_ccc)
        files[INT8] = _finished(int8, {**facts, "kind": "int8"})
        eight = {**judged, "calibration_waves": len(calibration), **choice}
    else:
        eight = {"skipped": "no calibration audio was given"}
        say("int8: skipped, no calibration audio was given")

    for name in (checkpoint.WEIGHTS, checkpoint.CONFIG):
        files[name] = (source / name).read_bytes()
    files["model.yaml"] = _audonnx_yaml(config["dimensions"]).encode()
    report = {
        "files": {name: len(content) for name, content in files.items()},
        "parity": parity,
        "int8": eight,
        "passes": passes,
        "versions": _versions(),
    }
    files["README.md"] = _card(out.name, facts, config, report).encode()
    report["files"]["README.md"] = len(files["README.md"])
    files[REPORT] = (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode()
    write_atomic(out, functools.partial(_write, files))
    say(f"wrote {out}")
    return report


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


def _parity(model, student, variables: dict, waves: Sequence[np.ndarray], say: Callable[[str], object]) -> dict:
    """Compare the ONNX model with the module that was trained, on noise, silence and the given audio, at every length."""
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
    worst, largest = 0.0, 0.0
    for (name, wave), actual in zip(cases, graph.run(model, [wave for _, wave in cases]), strict=True):
        expected = np.asarray(reference(variables, wave[None]))[0]
        largest = max(largest, float(np.abs(expected).max()))
        difference = np.abs(actual - expected).max() / max(1.0, np.abs(expected).max())
        if not difference <= PARITY_LIMIT:  # not a number is no parity either
            raise W2SError(
                f"the ONNX model and the Flax student differ by {difference:.2g} on {len(wave)} samples of {name}; "
                f"the limit is {PARITY_LIMIT:.0e}, nothing was written"
            )
        worst = max(worst, float(difference))
    say(f"fp32: differs from Flax by at most {worst:.1e}, from {shortest} samples to {longest / SAMPLING_RATE:.0f} s")
    return {
        "limit": PARITY_LIMIT,
        "max_difference": worst,
        "largest_output": largest,
        "lengths": lengths,
        "signals": list(signals),
    }


def _judge(int8, fp32, check: Sequence[np.ndarray], dimensions: Sequence[str], least: float) -> dict:
    quantised, reference = graph.run(int8, check), graph.run(fp32, check)
    scores = {name: float(score) for name, score in zip(dimensions, ccc(quantised, reference), strict=True)}
    worst = min(scores, key=scores.get)
    if not scores[worst] >= least:
        raise W2SError(
            f"int8 is too far from fp32: CCC {scores[worst]:.4f} in {worst} on {len(check)} waves, at least {least} expected; "
            "give calibration audio of the kind that the student was trained on, or export without calibration"
        )
    return {"ccc": scores, "max_difference": float(np.abs(quantised - reference).max()), "views": len(check)}


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


def _finished(model, facts: dict[str, str]) -> bytes:
    import onnx

    onnx.helper.set_model_props(model, facts)
    model.producer_name, model.producer_version = "w2s_jax", __version__
    model.doc_string = ""
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _audonnx_yaml(dimensions: Sequence[str]) -> str:
    """The object file that audEERING's ``audonnx.load`` reads beside model.onnx; JSON strings are YAML strings."""
    return (
        "$audonnx.core.model.Model==1.0.1:\n"
        f"  path: {FP32}\n"
        "  labels:\n"
        f"    {graph.LOGITS}: {json.dumps(list(dimensions))}\n"
        "  transform: null\n"
    )


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
        head["license_name"] = licence
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
        terms = f"its licence, whose terms this model inherits too: {pretrained['licence']}"
        started = f"- Started from: {_started(pretrained)}; {terms}\n"
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
    sizes, parity, int8 = report["files"], report["parity"], report["int8"]
    rows = [f"| {FP32} | {sizes[FP32] / 1000:.0f} kB | at most {parity['max_difference']:.1e} from the Flax student |"]
    if "ccc" in int8:
        scores = ", ".join(f"{dimension} {score:.4f}" for dimension, score in int8["ccc"].items())
        rows.append(
            f"| {INT8} | {sizes[INT8] / 1000:.0f} kB | CCC against fp32 on {int8['views']} clips: {scores}; "
            f"at most {int8['max_difference']:.3f} apart |"
        )
    table = "\n".join(rows)
    return f"""---
{front}
---
# {name}

{config["student"]} ({int(facts["parameters"]):,} parameters, {SOURCE}): 16 kHz mono speech in, {", ".join(dimensions)} out.
{warning}
```python
from w2s_jax.runtime import Predictor

predictor = Predictor({json.dumps(name)})
print(predictor(wave, 16000))  # {{{", ".join(f'"{dimension}": ...' for dimension in dimensions)}}}
```

Input `signal`, float32 `[1, time]`, any length from {facts["minimum_samples"]} samples on; output `logits`,
`[1, {len(dimensions)}]`, not clipped. The network normalises each recording, so its level does not matter.

| file | size | how far it is off |
|---|---|---|
{table}

- Teacher: {teacher["name"]} (fingerprint {teacher["fingerprint"]}). The student learned its outputs, not human labels.
- Licence of the teacher, whose terms this model inherits: {teacher["licence"]}
{started}{caution}- Made with w2s_jax {__version__}; how it was checked is in {REPORT}. `audonnx.load` reads this directory too.
"""
