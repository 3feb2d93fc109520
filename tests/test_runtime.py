"""The runtime on a toy ONNX graph whose outputs are known by hand: mean, largest sample, and number of samples."""

import math
import subprocess
import sys
import threading

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from w2s_jax.artifacts import MismatchError, UsageError, W2SError
from w2s_jax.runtime import Predictor

ABOUT = {
    "w2s_jax": "0.1.0",
    "student": "toy",
    "kind": "fp32",
    "dimensions": "mean,peak,count",
    "sampling_rate": "16000",
    "minimum_samples": "4",
    "parameters": "0",
    "teacher": "nobody",
    "teacher_fingerprint": "0123456789abcdef",
    "licence": "CC0-1.0",
    "stand_in": "true",
}


def toy(path, about=ABOUT, signal="signal"):
    nodes = [
        helper.make_node("ReduceMean", [signal], ["mean"], axes=[1]),
        helper.make_node("ReduceMax", [signal], ["peak"], axes=[1]),
        helper.make_node("Shape", [signal], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["length"]),
        helper.make_node("Cast", ["length"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["float", "square"], ["count"]),
        helper.make_node("Concat", ["mean", "peak", "count"], ["logits"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info(signal, TensorProto.FLOAT, [1, "time"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 3])],
        [numpy_helper.from_array(np.array([1]), "one"), numpy_helper.from_array(np.array([1, 1]), "square")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    helper.set_model_props(model, about)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    toy(place / "model.onnx")
    toy(place / "model.int8.onnx", {**ABOUT, "kind": "int8", "weight_bits": "7"})
    return place


@pytest.fixture(scope="module")
def predictor(directory):
    return Predictor(directory)


def ramp(n):
    return np.arange(n, dtype=np.float32) / 100


def test_import_is_light():
    code = "import sys, w2s_jax.runtime; print(*sorted(m for m in sys.modules if '.' not in m))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"jax", "flax", "tensorflow", "torch", "transformers", "onnx", "librosa", "soxr"} & set(loaded)
    assert "onnxruntime" in loaded


def test_values_by_name(predictor):
    assert predictor(np.array([1, 2, 3, 6], np.float32)) == {"mean": 3.0, "peak": 6.0, "count": 4.0}
    assert predictor.dimensions == ("mean", "peak", "count")
    assert predictor.metadata == ABOUT
    assert predictor.sampling_rate == 16_000


def test_channels_are_averaged(predictor):
    assert predictor(np.array([[1, 2, 3, 6], [3, 4, 5, 8]], np.float64)) == {"mean": 4.0, "peak": 7.0, "count": 4.0}


def test_other_rates_are_resampled(predictor):
    values = predictor(np.full(48_000, 0.5), 48_000)
    assert values["count"] == 16_000
    assert values["mean"] == pytest.approx(0.5, abs=1e-3)


def test_silence(predictor):
    assert predictor(np.zeros(100, np.float32)) == {"mean": 0.0, "peak": 0.0, "count": 100.0}


@pytest.mark.parametrize(
    ("wave", "kind", "says"),
    [
        (np.zeros(3, np.float32), UsageError, "at least 4 samples at 16000 Hz, got 3"),
        (np.zeros(0, np.float32), UsageError, "got 0"),
        (np.zeros((16, 2), np.float32), UsageError, r"\[2, T\], got \[16, 2\]: turn it round"),
        (np.zeros((3, 44_100), np.float32), UsageError, r"got \[3, 44100\]: average its channels .* or call for each clip"),
        (np.zeros((1, 2, 16), np.float32), UsageError, r"got \[1, 2, 16\]"),
        (np.zeros(16, np.int16), UsageError, "got int16"),
        (np.r_[ramp(9), np.nan, np.inf], W2SError, "sample 9 is nan"),
        (np.stack([ramp(9), np.r_[ramp(7), np.inf, 0]]), W2SError, "sample 7 is inf"),
        (np.append(np.zeros(5), 1e300), W2SError, "sample 5 is inf"),
        (np.full(9, 3e38, np.float32), W2SError, "not finite; the largest sample is 3e"),
    ],
)
def test_unfit_waves(predictor, wave, kind, says):
    with pytest.raises(kind, match=says):
        predictor(wave)


def test_kinds_and_files(directory):
    assert Predictor(directory, kind="int8").metadata["kind"] == "int8"
    assert Predictor(str(directory / "model.int8.onnx")).metadata["kind"] == "int8"
    with pytest.raises(UsageError, match="unknown kind 'int4'; there are: fp32, fp16w, int8w, int8, "):
        Predictor(directory, kind="int4")
    with pytest.raises(UsageError, match="is a file"):
        Predictor(directory / "model.onnx", kind="fp32")


def test_missing_and_damaged(directory, tmp_path):
    with pytest.raises(UsageError, match="no model at .*nowhere"):
        Predictor(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="it has no model.onnx"):
        Predictor(tmp_path)
    content = (directory / "model.onnx").read_bytes()
    for name, damaged in (("half.onnx", content[: len(content) // 2]), ("empty.onnx", b""), ("text.onnx", b"hello\nworld\n")):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(W2SError, match=name) as caught:
            Predictor(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_dimension_names(directory, tmp_path):
    bare = toy(tmp_path / "bare.onnx", {})
    with pytest.raises(UsageError, match="does not name its 3 outputs"):
        Predictor(bare)
    named = Predictor(bare, dimensions=["a", "b", "c"])
    assert named(ramp(64)).keys() == {"a", "b", "c"}
    assert named.minimum_samples == 64
    assert "not recorded" in str(named)
    with pytest.raises(MismatchError, match="3 outputs, but 2 names"):
        Predictor(bare, dimensions=["a", "b"])
    with pytest.raises(MismatchError, match="mean, peak, count, not a, b, c"):
        Predictor(directory, dimensions=["a", "b", "c"])


def test_another_network(tmp_path):
    with pytest.raises(UsageError, match=r"expected float inputs and outputs signal \[1, time\]"):
        Predictor(toy(tmp_path / "other.onnx", signal="pcm"))


def test_broken_metadata(tmp_path):
    with pytest.raises(W2SError, match="sampling_rate is 'fast'"):
        Predictor(toy(tmp_path / "m.onnx", {**ABOUT, "sampling_rate": "fast"}))


def test_print_documents_the_model(directory):
    text = str(Predictor(directory, kind="int8"))
    parts = ["model.int8.onnx", "int8", "kB", "toy", "mean, peak, count", "16000 Hz", "at least 4 samples", "nobody"]
    parts += ["0123456789abcdef", "CC0-1.0", "w2s_jax 0.1.0", "STAND-IN", f'Predictor("{directory}", kind="int8")']
    assert [part for part in parts if part not in text] == []


def test_threads(predictor):
    waves = [ramp(n) for n in range(50, 90)]
    alone = [predictor(wave) for wave in waves]
    together = [None] * len(waves)

    def work(start):
        for n in range(start, len(waves), 4):
            together[n] = predictor(waves[n])

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def seconds(*samples):
    return tuple(n / 16_000 for n in samples)


@pytest.mark.parametrize(
    ("length", "window", "hop", "expected"),
    [
        (20, 8, 4, [(0, 8), (4, 12), (8, 16), (12, 20)]),
        (22, 8, 4, [(0, 8), (4, 12), (8, 16), (12, 20), (14, 22)]),  # the last one is aligned with the end
        (8, 8, 4, [(0, 8)]),
        (5, 8, 4, [(0, 5)]),  # shorter than a window
        (30, 4, 10, [(0, 4), (10, 14), (20, 24), (26, 30)]),  # gaps are allowed
    ],
)
def test_windows_by_hand(predictor, length, window, hop, expected):
    wave = ramp(length)
    found = list(predictor.windows(wave, 16_000, *seconds(window, hop)))
    assert [ends for *ends, _ in found] == [list(seconds(*ends)) for ends in expected]
    for (*_, values), (start, end) in zip(found, expected, strict=True):
        assert values == pytest.approx(predictor(wave[start:end]), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), length=st.integers(4, 200), window=st.integers(4, 40), hop=st.integers(1, 50))
def test_windows_do_not_depend_on_blocks(predictor, data, length, window, hop):
    wave = np.random.default_rng(length).normal(size=length).astype(np.float32)
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=20)))
    blocks = iter(np.split(wave, cuts))  # some are empty
    whole = list(predictor.windows(wave, 16_000, *seconds(window, hop)))
    parts = list(predictor.windows(blocks, 16_000, *seconds(window, hop)))
    assert [ends for *ends, _ in parts] == [ends for *ends, _ in whole]
    for (start, end, values), (*_, same) in zip(whole, parts, strict=True):
        expected = predictor(wave[round(start * 16_000) : round(end * 16_000)])
        # the order of a float32 sum depends on where in memory it begins
        assert values == pytest.approx(expected, abs=1e-6)
        assert same == pytest.approx(expected, abs=1e-6)
    assert whole[-1][1] == length / 16_000


def test_windows_hold_a_bounded_part(predictor):
    blocks = (np.full(1000, n, np.float32) for n in range(50))
    found = predictor.windows(blocks, 16_000, *seconds(2000, 1000))
    assert [next(found)[2]["peak"] for _ in range(3)] == [1.0, 2.0, 3.0]
    assert next(blocks)[0] == 4  # nothing was read ahead


def test_windows_refuse(predictor):
    with pytest.raises(UsageError, match="at least 4 samples"):
        predictor.windows(ramp(99), 16_000, *seconds(3, 1))
    with pytest.raises(UsageError, match="hop"):
        predictor.windows(ramp(99), 16_000, *seconds(8, 0))
    for window, hop in ((math.inf, 1.0), (math.nan, 1.0), (1.0, math.inf), (1.0, math.nan)):
        with pytest.raises(UsageError, match="are seconds"):
            predictor.windows(ramp(99), 16_000, window, hop)
    with pytest.raises(UsageError, match="blocks must be at 16000 Hz, got 8000"):
        predictor.windows(iter([ramp(99)]), 8000, *seconds(8, 4))
    with pytest.raises(W2SError, match="sample 12 is nan"):
        list(predictor.windows(iter([ramp(10), np.r_[ramp(2), np.nan]]), 16_000, *seconds(4, 4)))
    with pytest.raises(UsageError, match=r"blocks \[T\], got one of shape \[\]"):
        list(predictor.windows([0.0, 1.0], 16_000, *seconds(4, 4)))
    with pytest.raises(UsageError, match="got 2"):
        list(predictor.windows(iter([ramp(2)]), 16_000, *seconds(4, 4)))
