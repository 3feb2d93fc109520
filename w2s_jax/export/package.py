"""A model directory: everything that runs, describes and vouches for an exported student."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from w2s_jax import SAMPLING_RATE, __version__, checkpoint, machine
from w2s_jax.devices import computing
from w2s_jax.errors import UsageError, W2SError
from w2s_jax.export import judge
from w2s_jax.export import onnx as graph
from w2s_jax.export.build import LARGEST, build, fp32_graph, kinds_of, make_probes, missing_tool, require_kind, write
from w2s_jax.export.card import collect_facts, compose_audonnx_yaml, compose_card
from w2s_jax.files import write_atomic
from w2s_jax.kinds import DEFAULT, FILES, INTEGER_KINDS, KINDS, size_of
from w2s_jax.measure import make_feeds, measure_kinds
from w2s_jax.names import line
from w2s_jax.runtime import Predictor
from w2s_jax.runtime.session import REPORT, open_session

#: Fewer calibration waves than this say nothing about the ranges, or about a CCC.
LEAST_WAVES = 8


@computing()
def export_student(
    run_or_student_dir: str | Path,
    out: str | Path,
    calibration: Sequence[np.ndarray] | None = None,
    check: Sequence[np.ndarray] | None = None,
    message: Callable[[str], object] | None = None,
    min_ccc: float = 0.99,
    kinds: Sequence[str] | None = None,
    weight_bits: int = 7,
    measure: bool = False,
    against: Path | None = None,
) -> dict:
    """Write a model directory for a trained student.

    Everything is built and checked before ``out`` appears as a whole, or not at all. A model directory that is there already is
    replaced; anything else is left alone. A kind that fails, or that is not good enough, is left out with a warning, unless it
    is "fp32", without which nothing is written.

    Args:
        run_or_student_dir: a run directory, or the student directory in it.
        out: the model directory to make.
        calibration: float32 [T] each at 16 kHz, real audio like that which the model is for, at least 8; lengths may
            differ. They set the ranges of eight-bit numbers; without them there are exact kinds only.
        check: float32 [T] each, on which the kinds that round are judged against fp32. Default: every fourth calibration wave,
            which then sets no ranges.
        message: called with a line of text at each step.
        min_ccc: the least CCC with fp32, in every dimension, of a kind that rounds.
        kinds: keys of ``kinds.FILES``, or "all" that this student can have; "fp32" is always among them, as it is what the
            others are held against. Default: ``DEFAULT``, without "int8" if there is no calibration audio.
        weight_bits: of the weights of "int8", "qdq" and "int8-int4" (the latter's convolutions). 7 are right on every
            processor. 8 are for ARM and x86 with VNNI, which files, card and report say: elsewhere their sums overflow, and
            ``Predictor`` refuses them.
        measure: put time and peak memory of each kind on this machine into the report (``measure.measure_kinds``).
        against: another ONNX file, measured beside them; the report then has the ratio of their times.

    Returns:
        What export.json holds: ``files`` (bytes of each but export.json),
        ``sha256`` (of the same), ``parity`` (limit, max_difference, largest_output,
        lengths, signals; of fp32 against Flax), ``kinds`` (kind → file, bytes, lengths that it was checked on; of exact kinds
        difference_from_flax on these; max_difference, views and ccc per dimension against fp32 on the check waves; how it was
        calibrated or is to be cut; time and memory, if measured), ``failed`` and ``skipped`` (kind → why it is not there),
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
    message = message or (lambda line: None)
    out = Path(out).resolve()
    if out.exists() and not (out / REPORT).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not a model directory (it has no {REPORT}); choose another place")
    _check_replaceable(out)
    if against is not None:
        make_feeds(*open_session(against), 1.0)  # a wrong reference model is reported before minutes of conversion
    student, variables, config = checkpoint.load_student(run_or_student_dir)
    source = checkpoint.find_student(run_or_student_dir)
    calibration, check = _split_waves(calibration, check, student.minimum_samples)
    kinds, skipped = _choose_kinds(kinds, student, bool(calibration))
    if weight_bits not in LARGEST:
        raise UsageError(f"weights have 7 or 8 bits, got {weight_bits}")
    if weight_bits == 8 and set(kinds) & set(INTEGER_KINDS) and machine.saturates():
        raise UsageError(
            "8-bit weights cannot be judged here: their sums overflow on this processor (x86 without VNNI); leave out "
            f"--weight-bits 8, for 7 bits are right everywhere, or export on {machine.EXACT_SUMS}"
        )

    facts = collect_facts(student, config)
    message("fp32: converting")
    fp32, passes = fp32_graph(student, variables, make_probes([*calibration, *check][:4], student.minimum_samples))
    refused = [name for name, change in passes.items() if change > graph.PASS_LIMIT]
    if refused:
        message(f"fp32: left out graph passes that would change the outputs: {', '.join(refused)}")
    cases = judge.make_cases(student, variables, [*check, *calibration])
    report: dict = {"files": {}, "parity": {}, "kinds": {}, "failed": {}, "skipped": skipped}
    report |= {"passes": passes, "versions": _collect_versions()}
    with tempfile.TemporaryDirectory() as place:
        made, files, reference = {}, {}, None
        for kind in kinds:
            file = Path(place) / FILES[kind]
            try:
                content, how = build(kind, student, variables, fp32, facts, calibration, message, weight_bits)
                write(content, file)
                predictor = Predictor(file)
                row = {"file": file.name, "bytes": size_of(file), **how}
                row["lengths"], parity = judge.check_parity(kind, predictor, cases)
                if KINDS[kind].exact:
                    row["difference_from_flax"] = parity["max_difference"]
                outputs = judge.predict(predictor, check)
                if kind == "fp32":
                    reference, report["parity"] = outputs, parity
                elif check:  # without check audio there are exact kinds only
                    row |= judge.compare(outputs, reference, config["dimensions"])
                    judge.require_ccc(kind, row, min_ccc)
            except Exception as error:  # TensorFlow, tf2onnx and onnxruntime raise whatever they like
                if kind == "fp32":  # what the others are held against
                    raise
                report["failed"][kind] = why = _describe_error(error)
                warnings.warn(f"{kind} is not written: {why}", stacklevel=2)
                continue
            if kind == "fp32":
                seconds = max(row["lengths"]) / SAMPLING_RATE
                message(f"fp32: differs from Flax by at most {parity['max_difference']:.1e}, up to {seconds:.0f} s")
            elif check:
                message(f"{kind}: {row['bytes'] / 1000:.1f} kB, CCC with fp32 at least {min(row['ccc'].values()):.5f}")
            made[kind], report["kinds"][kind] = file, row
            files |= {name: (Path(place) / name).read_bytes() for name in KINDS[kind].names}
        for kind, figures in (measure_kinds(made, against, message) if measure or against else {}).items():
            report["kinds"][kind] |= figures
    for kind, why in skipped.items():
        message(f"{kind}: skipped, {why}")

    for name in (checkpoint.WEIGHTS, checkpoint.CONFIG):
        files[name] = (source / name).read_bytes()
    files["model.yaml"] = compose_audonnx_yaml(config["dimensions"]).encode()
    report["files"] = {name: len(content) for name, content in files.items()}
    files["README.md"] = compose_card(out.name, facts, config, report).encode()
    report["files"]["README.md"] = len(files["README.md"])
    report["sha256"] = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files[REPORT] = (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode()
    here = {name.partition("/")[0] for name in files}
    gone = sorted(path.name for path in out.iterdir() if path.name not in here) if out.is_dir() else []
    if gone:
        message(f"{out} is replaced; no longer there: {', '.join(gone)}")
    write_atomic(out, functools.partial(_write, files))
    message(f"wrote {out}")
    return report


def _choose_kinds(kinds: Sequence[str] | None, student, calibrated: bool) -> tuple[list[str], dict[str, str]]:
    """The kinds to build, fp32 first, and those left out with the reason."""
    if kinds is None:
        return (list(DEFAULT), {}) if calibrated else (["fp32"], {"int8": "no calibration audio was given"})
    possible = kinds_of(student)
    if "all" in kinds:
        skipped = {kind: "no calibration audio was given" for kind in possible if not KINDS[kind].exact and not calibrated}
        skipped |= {kind: why for kind in possible if (why := missing_tool(kind))}
        return [kind for kind in possible if kind not in skipped], skipped
    for kind in kinds:
        if kind not in FILES:
            raise UsageError(f"unknown kind {kind!r}; there are: {', '.join(FILES)}")
        require_kind(student, kind)
        if not KINDS[kind].exact and not calibrated:
            raise UsageError(
                f"the kind {kind} rounds, and has to be judged on real audio: give calibration audio (--calibration BANK)"
            )
    return list(dict.fromkeys(["fp32", *kinds])), {}


def _check_replaceable(out: Path) -> None:
    """Refuse to replace a model directory in which somebody has put something else.

    Raises:
        UsageError: names what is neither of the last export nor of an evaluation.
    """
    if not out.is_dir():
        return
    written = {
        *(name for kind in KINDS.values() for name in kind.names),
        checkpoint.WEIGHTS,
        checkpoint.CONFIG,
        "model.yaml",
        "README.md",
        REPORT,
    }
    evaluation = r"eval_\w+\.(json|png)"  # w2s eval puts it beside the model; of a new one it would be wrong
    directories = [kind.file for kind in KINDS.values() if kind.parts]
    paths = [
        inner for path in out.iterdir() for inner in (path.iterdir() if path.name in directories and path.is_dir() else [path])
    ]
    names = [path.relative_to(out).as_posix() for path in paths]
    others = sorted(name for name in names if name not in written and not re.fullmatch(evaluation, name))
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UsageError(
            f"{out} would be replaced as a whole, and holds what no export wrote ({line(', '.join(others[:3]))}{more}); move "
            "it away, or choose another place"
        )


def _write(files: dict[str, bytes], directory: Path) -> None:
    directory.mkdir()
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)


def _split_waves(
    calibration: Sequence[np.ndarray] | None, check: Sequence[np.ndarray] | None, minimum: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Waves for ranges and waves to judge by, checked where they enter."""
    calibration = [_check_wave(wave, f"calibration wave {n}", minimum) for n, wave in enumerate(calibration or ())]
    held_out = [_check_wave(wave, f"check wave {n}", minimum) for n, wave in enumerate(check or ())]
    if calibration and len(calibration) < LEAST_WAVES:
        raise UsageError(f"int8 needs at least {LEAST_WAVES} calibration waves, got {len(calibration)}")
    if held_out and len(held_out) < 2:
        raise UsageError("a CCC needs at least 2 check waves, got 1")
    if calibration and not held_out:
        return [wave for n, wave in enumerate(calibration) if n % 4], calibration[::4]
    return calibration, held_out


def _check_wave(wave: np.ndarray, name: str, minimum: int) -> np.ndarray:
    wave = np.asarray(wave)
    if wave.ndim != 1 or not np.issubdtype(wave.dtype, np.floating) or len(wave) < minimum:
        raise UsageError(f"{name}: expected float32 [T] with T >= {minimum}, got {wave.dtype} {list(wave.shape)}")
    if not np.isfinite(wave).all():
        raise UsageError(f"{name} is not finite")
    return wave.astype(np.float32)


def _describe_error(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, W2SError) else f"{type(error).__name__}: {text}"


def _collect_versions() -> dict[str, str]:
    versions = {"w2s_jax": __version__}
    for package in ("jax", "flax", "tensorflow-cpu", "tensorflow", "tf2onnx", "onnx", "onnxruntime", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # one of the two TensorFlows
            continue
    return versions
