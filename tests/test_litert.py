"""LiteRT files against the Flax module itself, and what damaged ones do."""

import io
import json
import subprocess
import sys
import threading
import tracemalloc
import zipfile

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from w2s_jax import checkpoint
from w2s_jax.errors import UsageError, W2SError
from w2s_jax.runtime import Predictor, litert

pytest.importorskip("ai_edge_litert", reason="needs pip install 'w2s-jax[litert]'")
pytest.importorskip("tensorflow", reason="needs pip install 'w2s-jax[export]'")

from test_export import make_student, speech

from w2s_jax.export import litert as export
from w2s_jax.export.deploy import deploy

STUDENTS = {"wav2small": {}, "wav2small_17k": {"channels": 4}}
FACTS = {"dimensions": "arousal,dominance,valence", "minimum_samples": "64", "kind": "fp32", "teacher": "Někdo"}


@pytest.fixture(scope="module")
def waves():
    return [speech(seed, seconds) for seed, seconds in enumerate(np.linspace(0.8, 2.0, 8))]


def convert(directory, name, fields, waves):
    """A student as ``make_student`` leaves it: its function, and its .tflite."""
    make_student(directory, name, fields, waves)
    student, variables, _ = checkpoint.load_student(directory)
    content = export.convert(*deploy(student, variables), 3, student.minimum_samples, FACTS)
    apply = jax.jit(student.apply)
    return lambda wave: np.asarray(apply(variables, wave[None])), content


@pytest.fixture(scope="module", params=[pytest.param("wav2small", marks=pytest.mark.slow), "wav2small_17k"])
def exported(request, tmp_path_factory, waves):
    return convert(tmp_path_factory.mktemp(request.param), request.param, STUDENTS[request.param], waves)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """|x| summed over time, three times: the smallest file with the same ends."""

    def forward(weights, wave):
        return jax.numpy.abs(wave).sum(axis=1, keepdims=True) * weights[0]

    return export.convert(forward, [np.ones((1, 3), np.float32)], 3, 64, FACTS)


def check(apply, content, waves, lengths):
    session = litert.Session(content)
    noise = np.random.default_rng(0).normal(size=max(lengths)).astype(np.float32)
    for length in lengths:
        for wave in (noise[:length], np.resize(waves[2], length)):
            (actual,) = session.run(["logits"], {"signal": wave[None]})
            expected = apply(wave)
            np.testing.assert_allclose(actual, expected, atol=1e-4 * max(1, np.abs(expected).max()))


def test_equals_the_trained_module(exported, waves):
    check(*exported, waves, (64, 127, 31_991, 1021))  # shorter after longer: it has to allocate anew
    np.testing.assert_allclose(
        litert.Session(exported[1]).run(None, {"signal": np.zeros((1, 1021), np.float32)})[0],
        exported[0](np.zeros(1021, np.float32)),
        atol=1e-4,
    )


@pytest.mark.slow
def test_a_minute_equals_the_trained_module(exported, waves):
    check(*exported, waves, (65, 96, 8191, 80_000, 960_000))


@pytest.mark.slow
def test_a_mobilenet_equals_the_trained_module(tmp_path, waves):
    """On half a second: random weights this deep amplify rounding, so that on silence of a second ``deploy`` itself, under JAX,
    differs from ``student.apply`` by 0.03."""
    check(*convert(tmp_path, "mobilenet_v3_s", {"width": 0.25}, waves), waves, (64, 1021, 8191))


def test_only_builtin_operators_and_no_arithmetic_on_shapes(exported):
    from tensorflow.lite.python import schema_py_generated as schema
    from tensorflow.lite.tools import flatbuffer_utils

    network, _ = litert.read(exported[1])
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(network))
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    used = [names[model.operatorCodes[operator.opcodeIndex].builtinCode] for operator in model.subgraphs[0].operators]
    assert "CUSTOM" not in used
    # the number of samples, which the mean divides by, is all that is computed on shapes
    assert used.count("SHAPE") == 1
    assert not {"PACK", "FLOOR_DIV", "FLOOR_MOD", "SELECT", "BROADCAST_TO"} & set(used)
    assert {"CONV_2D", "MAX_POOL_2D"} <= set(used)


def test_predictor_reads_it(exported, tmp_path, waves):
    apply, content = exported
    path = tmp_path / "model.tflite"
    path.write_bytes(content)
    predictor = Predictor(path)
    assert predictor.dimensions == ("arousal", "dominance", "valence")
    assert predictor.minimum_samples == 64
    assert {**FACTS, litert.CHECKSUM: predictor.metadata[litert.CHECKSUM]} == predictor.metadata
    assert "arousal, dominance, valence" in str(predictor)
    np.testing.assert_allclose(list(predictor(waves[0]).values()), apply(waves[0])[0], atol=1e-4)
    assert len(list(predictor.windows(waves[0], window=0.5, hop=0.25))) == 3
    with pytest.raises(UsageError, match="at least 64 samples"):
        predictor(waves[0][:63])


def test_plain_interpreter_reads_it(tiny, tmp_path):
    """By path and by content, with the facts still behind the network: what an app would do."""
    from ai_edge_litert.interpreter import Interpreter

    path = tmp_path / "model.tflite"
    path.write_bytes(tiny)
    assert json.loads(zipfile.ZipFile(path).read("w2s_jax.json"))["teacher"] == "Někdo"
    for given_by in ({"model_path": str(path)}, {"model_content": tiny}):
        interpreter = Interpreter(**given_by)
        (inward,), (outward,) = interpreter.get_input_details(), interpreter.get_output_details()
        assert (inward["name"], inward["shape_signature"].tolist(), inward["dtype"]) == ("signal", [1, -1], np.float32)
        assert (outward["name"], outward["shape_signature"].tolist()) == ("logits", [1, 3])
        interpreter.resize_tensor_input(inward["index"], [1, 100])
        interpreter.allocate_tensors()
        interpreter.set_tensor(inward["index"], np.full((1, 100), -0.5, np.float32))
        interpreter.invoke()
        assert interpreter.get_tensor(outward["index"]).tolist() == [[50, 50, 50]]


def test_same_content_twice(tiny):
    network, facts = litert.read(tiny)
    assert export._describe(network, {key: value for key, value in facts.items() if key != litert.CHECKSUM}) == tiny


def test_int8(exported, waves):
    _, content = exported
    small = export.quantize_weights(content, {**FACTS, "kind": "int8"})
    session, other = litert.Session(content), litert.Session(small)
    assert other.get_modelmeta().custom_metadata_map["kind"] == "int8"
    if len(content) > 200_000:  # the other one is mostly Fourier kernels, and its trunk's are below LEAST_WEIGHTS
        assert len(small) < 0.4 * len(content)
    heard = [*waves, 0 * waves[0]]
    values = [[one.run(None, {"signal": wave[None]})[0][0] for wave in heard] for one in (session, other)]
    # random weights look at single frames; on a trained student it is CCC 0.999
    assert np.abs(np.subtract(*values)).mean() < 0.2 * np.std(values[0], axis=0).max()


def test_a_function_with_other_outputs_or_operators():
    with pytest.raises(W2SError, match=r"outputs \[1, 2\], got \(1, 1\)"):
        export.convert(lambda weights, wave: wave.sum(axis=1, keepdims=True), [], 2, 64, {})
    with pytest.raises(W2SError, match="TensorFlow Lite cannot hold"):
        export.convert(lambda weights, wave: jax.lax.erf_inv(wave[:, :1]), [], 1, 64, {})


def test_threads_take_turns(tiny):
    session = litert.Session(tiny, threads=2)
    wrong = []

    def work(length):
        for _ in range(50):
            (logits,) = session.run(["logits"], {"signal": np.ones((1, length), np.float32)})
            if logits[0, 0] != length:
                wrong.append((length, logits))

    threads = [threading.Thread(target=work, args=(length,)) for length in (64, 127, 1021, 8191)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_failed_call_harms_no_later_one(tiny):
    session = litert.Session(tiny)
    with pytest.raises(KeyError):
        session.run(None, {"audio": np.ones((1, 64), np.float32)})
    with pytest.raises(KeyError):
        session.run(["other"], {"signal": np.ones((1, 64), np.float32)})
    with pytest.raises((ValueError, RuntimeError)):
        session.run(None, {"signal": np.ones((7, 5, 3, 2, 64), np.float32)})
    assert session.run(None, {"signal": np.ones((1, 64), np.float32)})[0].tolist() == [[64, 64, 64]]


def test_memory_of_a_long_input_is_given_back(tiny):
    session = litert.Session(tiny)
    seen = []
    for length in (64, 100_000, 50_000, 1000, 2000):
        assert session.run(None, {"signal": np.ones((1, length), np.float32)})[0][0, 0] == length
        seen.append(session._interpreter)
    assert seen[1] is seen[2] is not seen[3] is seen[4]


@pytest.mark.parametrize("content", [b"", b"TFL3", b"garbage " * 100, b"\x1c\0\0\0TFL3", b"\x1c\0\0\0TFL3" + bytes(1000)])
def test_what_is_no_model(content, tmp_path):
    (tmp_path / "x.tflite").write_bytes(content)
    with pytest.raises(W2SError, match="damaged") as error:
        Predictor(tmp_path / "x.tflite")
    assert "\n" not in str(error.value)


@given(data=st.data())
def test_damage_is_seen(tiny, data):
    """One byte changed, or the end missing: an error, or a file that still is what it was, or one without its facts."""
    if data.draw(st.booleans()):
        content = tiny[: data.draw(st.integers(0, len(tiny) - 1))]
    else:
        place = data.draw(st.integers(0, len(tiny) - 1))
        content = tiny[:place] + bytes([tiny[place] ^ data.draw(st.integers(1, 255))]) + tiny[place + 1 :]
    try:
        session = litert.Session(content)
    except W2SError as error:
        assert "damaged" in str(error)
        assert "\n" not in str(error)
        return
    assert session.run(None, {"signal": np.ones((1, 64), np.float32)})[0].tolist() == [[64, 64, 64]]


def test_a_large_file_without_the_mark_is_not_read(tmp_path):
    with open(tmp_path / "m.tflite", "wb") as file:
        file.truncate(1 << 28)  # a hole, which takes no room
    tracemalloc.start()
    with pytest.raises(W2SError, match="m.tflite is damaged or not a TensorFlow Lite model: it begins without its mark"):
        litert.Session(tmp_path / "m.tflite")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_foreign_file_has_no_facts(tiny):
    network, _ = litert.read(tiny)
    assert litert.Session(network).get_modelmeta().custom_metadata_map == {}
    other = io.BytesIO(network)
    with zipfile.ZipFile(other, "a") as archive:
        archive.writestr("labels.txt", "arousal")
    assert litert.Session(other.getvalue()).get_modelmeta().custom_metadata_map == {}


def test_a_description_that_unpacks_to_gigabytes_is_refused(tiny):
    network, _ = litert.read(tiny)
    bomb = io.BytesIO()
    bomb.write(network)
    with (
        zipfile.ZipFile(bomb, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open(litert.MEMBER, "w", force_zip64=True) as file,
    ):
        for _ in range(64):
            file.write(bytes(1 << 20))
    assert len(bomb.getvalue()) < len(network) + (1 << 17)
    tracemalloc.start()
    with pytest.raises(W2SError, match="more than 1048576 bytes"):
        litert.Session(bomb.getvalue())
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_loops_and_giant_tensors_are_refused():
    """Made by TensorFlow's own converter: a while loop has two graphs of its own."""
    import tensorflow as tf

    def converted(function):
        made = tf.function(function, input_signature=[tf.TensorSpec((1, None), tf.float32)]).get_concrete_function()
        return tf.lite.TFLiteConverter.from_concrete_functions([made]).convert()

    looping = converted(lambda x: tf.while_loop(lambda y: tf.reduce_sum(y) < 9, lambda y: (y + 1,), (x,))[0])
    with pytest.raises(W2SError, match="without loops and branches, got 3"):
        litert.Session(looping)
    large = (1 << 15, 1 << 14)
    giant = converted(lambda x: tf.reduce_sum(tf.broadcast_to(x[:, :1], large) * x[0, 0], axis=1, keepdims=True))
    with pytest.raises(W2SError, match=f"^the model is refused: a tensor of {1 << 31} bytes"):
        litert.Session(giant)


def test_without_an_interpreter(tiny, monkeypatch):
    for module in ("ai_edge_litert.interpreter", "tflite_runtime.interpreter", "tensorflow.lite.python.interpreter"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=r"pip install .*\[litert\]"):
        litert.Session(tiny)


def test_import_is_light():
    code = "import sys, w2s_jax.runtime.litert; print(*sorted(m for m in sys.modules if '.' not in m))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"tensorflow", "ai_edge_litert", "tflite_runtime", "jax"} & set(loaded)
