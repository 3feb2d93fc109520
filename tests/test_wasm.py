"""A student as WebAssembly: in wasmtime and in node, against Flax, the C kind and itself."""

from __future__ import annotations

import json
import shutil
import subprocess

import numpy as np
import pytest
from conftest import voice
from test_plan import drawn

from w2s_jax import models
from w2s_jax.errors import UsageError, W2SError
from w2s_jax.export.build import write
from w2s_jax.export.c import generate, wasm
from w2s_jax.export.plan import fold
from w2s_jax.kinds import KINDS, MODULE, WASM
from w2s_jax.runtime import Predictor

pytest.importorskip("ziglang", reason="needs pip install 'w2s-jax[wasm]'")
pytest.importorskip("wasmtime", reason="needs pip install 'w2s-jax[wasm]'")
FACTS = {
    "dimensions": "arousal,dominance,valence",
    "student": "wav2small",
    "teacher": "a ’teacher’",
    "licence": "MIT",
    "kind": "wasm",
}
FACTS |= {"minimum_samples": "64", "sampling_rate": "16000"}


@pytest.fixture(scope="module")
def student():
    student = models.build("wav2small", channels=5, before=1, after=1)
    return student, drawn(student)


@pytest.fixture(scope="module")
def module(student, tmp_path_factory):
    """A directory of the kind wasm."""
    directory = tmp_path_factory.mktemp("wasm") / KINDS["wasm"].file
    write(wasm.compile_module(generate.generate(fold(*student), FACTS, packed=True), FACTS), directory)
    return directory


def run_node(module, script: str):
    """What a script prints as JSON, with ``load`` of the ES module."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    text = f"import {{ load, Model }} from '{(module / MODULE).as_uri()}';\n{script}"
    done = subprocess.run(["node", "--input-type=module", "-e", text], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("samples", [64, 65, 4000, 48_001])
def test_wasmtime_computes_what_flax_does(student, module, samples):
    network, variables = student
    wave = voice(3.1, 1)[:samples]
    values, expected = list(Predictor(module)(wave).values()), network.apply(variables, wave[None])[0]
    np.testing.assert_allclose(values, expected, atol=0.02)  # weights of 8 bits


def test_node_computes_what_wasmtime_does(module):
    wave = voice(1.0, 2)
    expected = Predictor(module)(wave)
    numbers = ",".join(map(str, np.rint(wave * 32768).astype(int).clip(-32768, 32767)))
    found = run_node(
        module,
        f"""
        const model = await load(), integers = Int16Array.of({numbers});
        const samples = Float32Array.from(integers, (x) => x / 32768);
        const stream = model.stream({{ window: 0.5, hop: 0.25, normalisation: 'window' }});
        const early = stream.read();
        for (let at = 0; at < samples.length; at += 777) stream.push(samples.subarray(at, at + 777));
        const last = stream.read(), saved = stream.save();
        stream.reset();
        const forgotten = stream.read();
        stream.restore(saved);
        const errors = [];
        for (const wrong of [
          () => model.predict(new Float32Array(9)), () => model.predict([1]),
          () => model.predict(new Float32Array(99).fill(NaN)),
          () => model.stream({{ hop: 0.3 }}), () => model.stream({{ normalisation: 'none' }}),
          () => stream.restore(new Uint8Array(3)),
        ])
          try {{ wrong(); errors.push(null); }} catch (error) {{ errors.push(error.message); }}
        console.log(JSON.stringify({{
          floats: model.predict(samples), integers: model.predict(integers), again: model.predict(samples), early, last,
          forgotten, back: stream.read(), whole: model.predict(samples.subarray(8000)), dimensions: model.dimensions,
          teacher: model.metadata.teacher, bytes: new Model(model.module).predict(samples), errors,
        }}));
    """,
    )
    exact = np.rint(wave * 32768).astype(np.float32) / 32768
    expected = Predictor(module)(exact)
    for name in ("floats", "integers", "again", "bytes"):
        np.testing.assert_array_equal(np.float32(list(found[name].values())), np.float32(list(expected.values())), err_msg=name)
    assert found["early"] is None and found["forgotten"] is None
    assert found["last"] == found["back"] == found["whole"]
    assert found["dimensions"] == FACTS["dimensions"].split(",") and found["teacher"] == FACTS["teacher"]
    words = (
        "too few samples",
        "expected samples as",
        "not finite",
        "multiple of the hop",
        "expected running or window",
        "state",
    )
    for error, word in zip(found["errors"], words, strict=True):
        assert word in error


def test_streams_are_those_of_c(student, module, tmp_path):
    write(generate.generate(fold(*student), FACTS), tmp_path / "model_c")
    wave = voice(3.0, 3)
    for normalisation in ("running", "window"):
        values = []
        for directory in (module, tmp_path / "model_c"):
            stream = Predictor(directory).stream(window=1.0, hop=0.25, normalisation=normalisation)
            values.append([list(row.values()) for _, _, row in stream.feed(wave)])
        assert len(values[0]) == 9
        np.testing.assert_allclose(*values, atol=0.02)  # weights of 8 bits


def test_other_files_are_refused(module, tmp_path):
    with pytest.raises(UsageError, match="hop"):
        Predictor(module).stream(window=1.0, hop=0.3, normalisation="running")
    (tmp_path / "model_wasm").mkdir()
    (tmp_path / "model_wasm" / WASM).write_bytes((module / WASM).read_bytes()[:-100])
    with pytest.raises(W2SError, match="no module of this package"):
        Predictor(tmp_path / "model_wasm")
