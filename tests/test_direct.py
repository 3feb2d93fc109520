"""Directly built graphs against the Flax module and the converted graph, on students off the defaults; safety checks."""

import os
import subprocess
import sys

import numpy as np
import pytest

for package in ("tensorflow", "tf2onnx", "onnx"):
    pytest.importorskip(package, reason="needs pip install 'w2s-jax[export]'")

import onnx  # noqa: E402
from test_export import make_student, speech  # noqa: E402

from w2s_jax import checkpoint, machine  # noqa: E402
from w2s_jax.errors import UsageError  # noqa: E402
from w2s_jax.export import direct, export_student, judge, package  # noqa: E402
from w2s_jax.export import onnx as graph  # noqa: E402
from w2s_jax.runtime import Predictor  # noqa: E402

slow = pytest.mark.slow
#: Every field that a graph depends on, off its default.
VARIANTS = {
    "attention": ("wav2small", {"channels": 5, "n_mels": 20, "before": 2, "after": 1}),
    "17k": ("wav2small_17k", {"channels": 20, "kernel": 5, "before": 1, "after": 2}),
    "stride": ("wav2small", {"channels": 5, "stride": 2, "n_mels": 21, "n_fft": 128, "hop": 48}),
    "mean": ("wav2small", {"channels": 5, "pooling": "mean"}),
    "statistics": ("wav2small", {"channels": 5, "pooling": "statistics", "n_mels": 20}),
}


@pytest.fixture(scope="module")
def waves():
    return [speech(seed, seconds) for seed, seconds in enumerate(np.linspace(0.8, 2.0, 24))]


def built(directory, waves, name, fields):
    make_student(directory, name, fields, waves)
    student, variables, _ = checkpoint.load_student(directory)
    fp32, _ = package.fp32_graph(student, variables, waves[:2])
    return student, variables, fp32


def file(kind, student, variables, fp32, waves, directory, **options):
    facts = {"dimensions": "arousal,dominance,valence", "minimum_samples": str(student.minimum_samples)}
    content, how = package.build(kind, student, variables, fp32, facts, waves, **options)
    (directory / f"{kind}.onnx").write_bytes(content)
    return directory / f"{kind}.onnx", how


@pytest.mark.parametrize("variant", [pytest.param(name, marks=() if name == "17k" else slow) for name in VARIANTS])
def test_variants(variant, waves, tmp_path):
    student, variables, fp32 = built(tmp_path / "student", waves, *VARIANTS[variant])
    reference = graph.run(fp32, waves)
    spread = reference.std(axis=0).max()
    for kind in sorted({"int8", "int8-int4", "chunked"} & set(package.kinds_of(student))):
        path, _ = file(kind, student, variables, fp32, waves[::2], tmp_path)
        predictor = Predictor(path)
        found = np.array([list(predictor(wave).values()) for wave in waves])
        if kind == "chunked":
            np.testing.assert_allclose(found, reference, atol=2e-5)
            predictor._chunks._tokens = 7  # many pieces
            np.testing.assert_allclose(list(predictor(waves[-1]).values()), reference[-1], atol=2e-5)
        else:  # seven bits of random weights are a fifth of the spread off, a wrong tap or channel all of it
            assert np.abs(found - reference).mean() < 0.25 * spread, kind
            shift = (found - reference)[::2].mean(axis=0)  # of the waves that it was calibrated on
            np.testing.assert_allclose(shift, 0, atol=1e-5)
    assert ("chunked" in package.kinds_of(student)) == (variant not in ("mean", "statistics"))
    assert ("int8-int4" in package.kinds_of(student)) == (variant in ("attention", "stride"))


def test_kinds_that_a_student_cannot_have(waves, tmp_path):
    make_student(tmp_path / "student", "wav2small_17k", {"channels": 4}, waves)
    for kinds, calibration, says in (
        (["int8-int4"], waves, "Wav2Small17K cannot be exported as int8-int4; it can as fp32, fp16w"),
        (["int8"], None, "the kind int8 rounds, and has to be judged on real audio"),
        (["int9"], waves, "unknown kind 'int9'; there are: fp32, "),
    ):
        with pytest.raises(UsageError, match=says):
            export_student(tmp_path / "student", tmp_path / "model", calibration, kinds=kinds)
    with pytest.raises(UsageError, match="weights have 7 or 8 bits, got 4"):
        export_student(tmp_path / "student", tmp_path / "model", waves, weight_bits=4)


@pytest.fixture(scope="module")
def sharp(tmp_path_factory, waves):
    """A student whose scores are so far apart that exp of them overflows: attention to single tokens."""
    directory = tmp_path_factory.mktemp("sharp")
    make_student(directory, "wav2small", {"channels": 4, "before": 1, "after": 1}, waves)
    student, variables, config = checkpoint.load_student(directory)
    variables["params"]["pool"]["sof"]["kernel"] = variables["params"]["pool"]["sof"]["kernel"] * 1000
    about = {"dimensions": config["dimensions"], "teacher": config["teacher"]}
    checkpoint.save_student(directory / "sharp", "wav2small", {**config["fields"]}, variables, about)
    return directory / "sharp"


def export(student, out, waves, kinds, least):
    return export_student(student, out, waves[::2], waves[1::2], kinds=kinds, min_ccc=least)


@slow
def test_without_the_proof_that_exp_cannot_overflow_the_export_fails(sharp, waves, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "PARITY_LENGTHS", (1021, 31_991))
    export(sharp, tmp_path / "model", waves, ["int8"], -1)
    monkeypatch.setattr(direct, "_exp_is_safe", lambda score, value: True)
    with pytest.warns(UserWarning, match=r"int8 is not written: .*not finite"):
        report = export(sharp, tmp_path / "unsafe", waves, ["int8"], -1)
    assert list(report["failed"]) == ["int8"] and not (tmp_path / "unsafe" / "model.int8.onnx").exists()


def test_with_a_softmax_in_eight_bits_the_export_fails(waves, tmp_path, monkeypatch):
    """The weights of the softmax, rounded to 1/255 as a careless range of 0 to 1 has it."""
    monkeypatch.setattr(judge, "PARITY_LENGTHS", (1021, 31_991))
    make_student(tmp_path / "student", "wav2small", {"channels": 4, "before": 1, "after": 1}, waves)
    report = export(tmp_path / "student", tmp_path / "model", waves, ["int8"], 0.95)
    assert min(report["kinds"]["int8"]["ccc"].values()) > 0.95
    node = direct.GraphBuilder.node

    def careless(self, op_type, *inputs, **options):
        if op_type != "Exp":
            return node(self, op_type, *inputs, **options)
        weight = node(self, "Exp", *inputs)
        weight = node(self, "Div", weight, node(self, "ReduceSum", weight, np.array([0]), keepdims=1))
        step = (np.float32(1 / 255), np.array(0, np.uint8))
        weight = node(self, "DequantizeLinear", node(self, "QuantizeLinear", weight, *step), *step)
        return node(self, "Max", weight, np.float32(1e-9))  # where all of them vanish

    monkeypatch.setattr(direct.GraphBuilder, "node", careless)
    with pytest.warns(UserWarning, match=r"int8 is not written: too far from fp32: CCC -?0\.\d+ .* at least 0.95 expected"):
        report = export(tmp_path / "student", tmp_path / "careless", waves, ["int8"], 0.95)
    assert list(report["failed"]) == ["int8"] and not (tmp_path / "careless" / "model.int8.onnx").exists()


@slow
def test_seven_bits_never_overflow_sixteen(waves, tmp_path):
    """x86 without VNNI adds two products of a u8 and an s8 in 16 bits, which saturates silently."""
    student, variables, fp32 = built(tmp_path / "student", waves, *VARIANTS["attention"])
    largest = {}
    for bits in package.LARGEST:
        for kind in ("int8", "qdq"):
            path, how = file(kind, student, variables, fp32, waves[::2], tmp_path, weight_bits=bits)
            assert how["weight_bits"] == bits
            model = onnx.load(path)
            weights = [w for w in model.graph.initializer if w.data_type == onnx.TensorProto.INT8 and len(w.dims) > 1]
            largest[bits, kind] = max(np.abs(onnx.numpy_helper.to_array(w).astype(int)).max() for w in weights)
            if bits == 7 or not machine.saturates():
                found, reference = graph.run(model, waves), graph.run(fp32, waves)
                assert np.abs(found - reference).mean() < 0.3 * reference.std(axis=0).max()
    for kind in ("int8", "qdq"):
        assert 2 * 255 * largest[7, kind] < 2**15 < 2 * 255 * largest[8, kind]


#: Run in a process of its own: bytes that are resident after each tenth of the calls.
MEMORY = """
import sys
import numpy as np
from w2s_jax.runtime import Predictor

def resident():
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

predictor, lengths = Predictor(sys.argv[1]), np.random.default_rng(0).integers(64, int(sys.argv[3]), int(sys.argv[2]))
wave = np.random.default_rng(1).normal(size=int(sys.argv[3])).astype(np.float32)
for call, length in enumerate(lengths, start=1):
    predictor(wave[:length])
    if call % (len(lengths) // 10) == 0:
        print(resident())
"""


def test_four_bits_err_less_together_than_alone():
    """On inputs that correlate; and a column of zeros stays one."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(500, 4)) @ generator.normal(size=(4, 30)) + 0.1 * generator.normal(size=(500, 30))
    weights = generator.normal(size=(30, 8))
    weights[:, 3] = 0
    numbers, scales = direct._round_together(weights, inputs.T @ inputs / len(inputs))
    assert numbers.min() >= -8 and numbers.max() <= 7 and not numbers[:, 3].any() and np.isfinite(scales).all()
    alone = np.clip(np.rint(weights / scales), -8, 7)
    errors = [np.square(inputs @ (found * scales - weights)).mean() for found in (numbers, alone)]
    assert errors[0] < 0.5 * errors[1]


@slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux' /proc")
@pytest.mark.parametrize("kind", ["fp32", "int8", "qdq", "chunked"])
def test_many_lengths_reach_a_plateau(kind, waves, tmp_path):
    """W2S_CALLS=10000 is the full number; what would grow from call to call shows with fewer."""
    student, variables, fp32 = built(tmp_path / "student", waves, "wav2small", {})
    path, _ = file(kind, student, variables, fp32, waves, tmp_path)
    calls = os.environ.get("W2S_CALLS", "2000")
    done = subprocess.run([sys.executable, "-c", MEMORY, path, calls, "32000"], capture_output=True, text=True, check=True)
    sizes = np.array([int(line) for line in done.stdout.split()]) / 1e6
    assert len(sizes) == 10
    assert sizes[-1] - sizes[2] < 2, sizes  # MB over the last seven tenths of the calls


@slow
def test_ten_minutes(waves, tmp_path):
    """fp32 and chunked against Flax on 600 s; pieces against the whole."""
    import jax

    student, variables, fp32 = built(tmp_path / "student", waves, "wav2small", {})
    wave = np.resize(np.concatenate(waves), 9_600_000)
    expected = np.asarray(jax.jit(student.apply)(variables, wave[None]))[0]
    for kind in ("fp32", "chunked"):
        path, _ = file(kind, student, variables, fp32, waves, tmp_path)
        np.testing.assert_allclose(list(Predictor(path)(wave).values()), expected, atol=1e-4)
