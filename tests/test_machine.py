"""This machine's memory; 8-bit weights on every processor: who refuses them, and what one without VNNI makes of every kind."""

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from w2s_jax import bench, machine, measure
from w2s_jax.errors import UsageError
from w2s_jax.runtime import Predictor
from w2s_jax.teachers.onnx import OnnxTeacher

onnx = pytest.importorskip("onnx", reason="needs pip install 'w2s-jax[export]'")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

CPUINFO = Path("/proc/cpuinfo")


def test_the_probe_multiplies_what_it_says():
    model = onnx.load_from_string(machine.PROBE)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["ConstantOfShape", "MatMulInteger"]
    assert numpy_helper.to_array(model.graph.initializer[0]).tolist() == [64, 16]
    assert numpy_helper.to_array(model.graph.node[0].attribute[0].t).tolist() == [127]


@pytest.mark.skipif(not CPUINFO.exists(), reason="reads Linux' /proc/cpuinfo")
def test_the_probe_finds_what_the_processor_lacks():
    flags = set(CPUINFO.read_text().split())
    if platform.machine() == "x86_64":
        assert machine.saturates() == (not flags & {"avx512_vnni", "avx_vnni"})
    else:
        assert not machine.saturates()


#: What a file says of itself, and whether a processor whose sums overflow must refuse it.
FILES = {
    "8 bits": ({"kind": "int8", "w2s_jax": "0.1.0", "weight_bits": "8", "needs": machine.EXACT_SUMS}, True),
    "8 bits, a kind to come": ({"kind": "int9", "w2s_jax": "9.0.0", "needs": machine.EXACT_SUMS}, True),
    "7 bits": ({"kind": "int8", "w2s_jax": "0.1.0", "weight_bits": "7"}, False),
    "before it was recorded": ({"kind": "qdq", "w2s_jax": "0.1.0"}, True),
    "before it was recorded, int4": ({"kind": "int8-int4", "w2s_jax": "0.1.0"}, True),
    "computes in float32": ({"kind": "int8w", "w2s_jax": "0.1.0"}, False),
    "of somebody else": ({"kind": "int8"}, False),
}


def toy(path, about):
    """The mean of the waveform under two names, and what the file says of itself."""
    nodes = [
        helper.make_node("ReduceMean", ["signal"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Concat", ["mean", "mean"], ["logits"], axis=1),
    ]
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)]
        for name, shape in (("signal", [1, "time"]), ("logits", [1, 2]))
    ]
    model = helper.make_model(helper.make_graph(nodes, "toy", *ends), opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"dimensions": "a,b", **about})
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("case", FILES)
def test_what_would_be_wrong_here_is_refused(case, tmp_path, monkeypatch):
    """By Predictor, w2s bench and as a teacher, with the way out; where sums are exact, every file runs."""
    about, wrong = FILES[case]
    file = toy(tmp_path / "model.int8.onnx", about)
    uses = {
        "Predictor": lambda: Predictor(tmp_path, kind="int8"),
        "measure": lambda: bench.measure({"model": file}, 0.1, 1, memory=False),
        "bench": lambda: bench.bench([], [file], tmp_path / "out", seconds=0.1, runs=1, engines=["onnxruntime"]),
        "teacher": lambda: OnnxTeacher(file),
    }
    monkeypatch.setattr(machine, "saturates", lambda: True)
    for use in uses.values():
        if wrong:
            with pytest.raises(
                UsageError, match="model.int8.onnx .*x86 without VNNI.*export it again .*fp32 or int8w"
            ) as error:
                use()
            assert "\n" not in str(error.value)
    if not wrong:
        assert Predictor(tmp_path, kind="int8")(np.full(100, 0.5, np.float32)) == {"a": 0.5, "b": 0.5}
        uses["measure"]()
    monkeypatch.setattr(machine, "saturates", lambda: False)
    assert Predictor(tmp_path, kind="int8")(np.full(100, 0.5, np.float32)) == {"a": 0.5, "b": 0.5}


def test_bench_leaves_one_such_file_of_a_directory_out_and_says_so(tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    toy(model / "model.onnx", {"kind": "fp32"})
    toy(model / "model.int8.onnx", FILES["8 bits"][0])
    monkeypatch.setattr(machine, "saturates", lambda: True)
    monkeypatch.setattr(measure, "PROCESSES", 1)
    said = []
    rows = bench.bench([], [model], tmp_path / "out", seconds=0.1, runs=1, engines=["onnxruntime"], message=said.append)
    assert [row["kind"] for row in rows] == ["fp32"]
    assert [line for line in said if line.startswith("left out: ") and "model.int8.onnx needs ARM, or x86 with VNNI" in line]


def test_memory_of_this_process_and_machine():
    """A block of 64 MB that is written shows in the peak, and in what is in use as long as it is there."""
    code = """
import json, numpy as np
from w2s_jax import machine
before = machine.process_memory()
block = np.ones(1 << 26, np.uint8)
during = machine.process_memory()
del block
print(json.dumps([before, during, machine.process_memory(), machine.total_memory(), machine.free_memory()]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, during, after, total, free = json.loads(done.stdout)
    assert 60e6 < during["peak"] - before["peak"] < 80e6
    assert after["peak"] == pytest.approx(during["peak"], abs=5e6)
    if sys.platform == "linux":
        assert 60e6 < during["in_use"] - before["in_use"] < 80e6
        assert abs(after["in_use"] - before["in_use"]) < 10e6
        kib = int(Path("/proc/meminfo").read_text().split()[1])  # MemTotal is the first line
        assert total == pytest.approx(1024 * kib, rel=0.05)
        assert during["peak"] < free <= total


def test_a_machine_in_words():
    import onnxruntime

    words = machine.describe(("litert", "onnxruntime"))
    version = ".".join(map(str, sys.version_info[:3]))
    assert words.endswith(f", onnxruntime {onnxruntime.__version__}, Python {version}")
    assert "onnxruntime" not in machine.describe(())


#: Students whose every way through onnxruntime's 8-bit kernels is tried.
STUDENTS = {"wav2small": {}, "wav2small_17k": {}, "mobilenet_v4_s": {"width": 0.25}}

#: Run on an emulated processor: a directory with files and a waveform → outputs and errors as JSON. The 8-bit files run without
#: what they say of themselves, to show what the refusal is good for.
EMULATED = """
import json, sys
from pathlib import Path
import numpy as np
from w2s_jax import bench, machine
from w2s_jax.errors import UsageError
from w2s_jax.runtime import Predictor
from w2s_jax.runtime.predictor import open_session

directory = Path(sys.argv[1])
waves = [*np.load(directory / "waves.npy")]
found = {"saturates": machine.saturates(), "outputs": {}, "refused": {}}
for file in sorted(directory.glob("*.onnx")):
    found["outputs"][file.stem] = [Predictor(file)(wave) for wave in waves]
for file in sorted(directory.glob("eight/*.onnx")):
    for use in (Predictor, lambda file: bench.bench([], [file], directory / "out")):
        try:
            use(file)
        except UsageError as error:
            found["refused"].setdefault(file.stem, []).append(str(error))
for file in sorted(directory.glob("silent/*.onnx")):
    session, _ = open_session(file)
    found["outputs"]["eight " + file.stem] = [session.run(None, {"signal": wave[None]})[0].tolist() for wave in waves]
print(json.dumps(found))
"""


def overflowing(name, fields, waves):
    """A student with random weights of nearly equal size, on activations far from 0: sums of products are as large as can be.

    Trained students are like that in some layers; random ones as they come are not, and 8 bits would look right.
    """
    import jax
    import jax.numpy as jnp

    from w2s_jax import models

    student, generator = models.build(name, **fields), np.random.default_rng(2)
    variables = jax.tree.map(np.asarray, dict(jax.jit(student.init)(jax.random.key(1), jnp.zeros((1, 16_000)))))

    def loud(path, leaf):
        if path[-1].key == "kernel" and leaf.ndim == 4:
            size = np.abs(leaf).mean()
            return (np.sign(leaf + 0.3 * size) * size * generator.uniform(0.7, 1, leaf.shape)).astype(np.float32)
        return leaf + np.float32(4) if [part.key for part in path[-2:]] == ["norm", "bias"] else leaf

    variables["params"] = jax.tree_util.tree_map_with_path(loud, variables["params"])
    batch = np.stack([np.resize(wave, 16_000) for wave in waves[:8]])
    _, update = jax.jit(lambda *given: student.apply(*given, train=True, mutable=["batch_stats"]))(variables, batch)
    # what training would converge to, from one step of a running mean with momentum 0.9
    variables["batch_stats"] = jax.tree.map(
        lambda old, new: (np.asarray(new) - 0.9 * old) / 0.1, variables["batch_stats"], update["batch_stats"]
    )
    return student, variables


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator runs this Python, which has to be an x86 one")
@pytest.mark.skipif(not shutil.which("qemu-x86_64"), reason="needs qemu-x86_64 (Debian: apt-get install qemu-user)")
def test_every_kind_of_eight_bits_without_vnni(tmp_path, compiled_at_once):
    """On a Haswell, emulated: 7-bit files give what they give here, 8-bit ones are refused, and would be wrong."""
    for package in ("tensorflow", "tf2onnx"):
        pytest.importorskip(package, reason="needs pip install 'w2s-jax[export]'")
    from test_export import speech

    from w2s_jax.export import onnx as graph
    from w2s_jax.export import package

    waves = [speech(seed, 1.0) for seed in range(8)]
    heard = [wave[:8000] for wave in waves[:3]]
    np.save(tmp_path / "waves.npy", heard)
    for place in ("eight", "silent"):
        (tmp_path / place).mkdir()
    expected = {}
    for name, fields in STUDENTS.items():
        student, variables = overflowing(name, fields, waves)
        fp32, _ = package.fp32_graph(student, variables, waves[:2])
        facts = {"w2s_jax": "0.1.0", "dimensions": "a,b,c", "minimum_samples": str(student.minimum_samples)}
        for kind in sorted(set(machine.INTEGER_KINDS) & set(package.kinds_of(student))):
            expected[f"{name} {kind}"] = graph.run(fp32, heard)
            for bits, place in ((7, tmp_path), (8, tmp_path / "eight")):
                content, _ = package.build(
                    kind, student, variables, fp32, facts, waves, weight_bits=bits, coverages=(1.0,)
                )  # fmt: skip
                (place / f"{name} {kind}.onnx").write_bytes(content)
            model = onnx.load_from_string(content)
            del model.metadata_props[:]
            onnx.save(model, tmp_path / "silent" / f"{name} {kind}.onnx")
    assert len(expected) == 3 + 2 + 2  # int8 and qdq of all, int8-int4 of Wav2Small

    def run(*emulator):
        done = subprocess.run(
            [*emulator, sys.executable, "-c", EMULATED, str(tmp_path)], capture_output=True, text=True, check=True, timeout=600
        )
        return json.loads(done.stdout.splitlines()[-1])

    here, haswell = run(), run("qemu-x86_64", "-cpu", "Haswell")
    assert haswell["saturates"]
    assert here["saturates"] == machine.saturates()
    assert set(haswell["refused"]) == set(expected) and {len(errors) for errors in haswell["refused"].values()} == {2}
    assert all("x86 without VNNI" in error for errors in haswell["refused"].values() for error in errors)
    for label, reference in expected.items():
        seven, same = (np.array([list(values.values()) for values in where["outputs"][label]]) for where in (haswell, here))
        eight = np.concatenate(haswell["outputs"][f"eight {label}"])[:, 0]
        # integers are the same everywhere; the float32 sums around them are added up in another order, a rounding may flip
        scale = np.abs(reference).max()
        np.testing.assert_allclose(seven, same, atol=2e-3 * scale, err_msg=label)
        errors = [np.abs(found - reference).mean() for found in (seven, eight)]
        assert errors[1] > 2 * errors[0], (label, errors)
        assert errors[0] < 0.1 * scale, (label, errors)
