"""The runtime on a toy ONNX graph whose outputs are known by hand: mean, largest sample, and number of samples."""

import contextlib
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from w2s_jax.errors import MismatchError, UsageError, W2SError
from w2s_jax.runtime import Predictor, onnxfile
from w2s_jax.runtime.session import open_session

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
        (np.full(9, -3e38, np.float32), W2SError, r"samples are larger than 1e\+15"),
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


# what strangers bring


def network(path, nodes=(), inits=(), shape=(1, "time"), about=ABOUT, value="mean", **more):
    """The mean three times, with other operators before; ``value`` is added to it, so that none of them is left out."""
    nodes = [
        helper.make_node("ReduceMean", ["signal"], ["mean"], axes=[1]),
        *nodes,
        helper.make_node("ReduceSum", [value], ["sum"], keepdims=0),
        helper.make_node("Add", ["mean", "sum"], ["both"]),
        helper.make_node("Concat", ["both"] * 3, ["logits"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("signal", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 3])],
        list(inits),
    )
    domains = [helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("acme", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=8, **more)
    helper.set_model_props(model, about)
    path.write_bytes(model.SerializeToString())
    return path


def constant(name, *values, kind=np.int64):
    return numpy_helper.from_array(np.array(values, kind), name)


def body(name, ins, outs):
    return helper.make_graph([helper.make_node("Identity", [ins[-1].name], [outs[-1].name])], name, ins, outs)


def external():
    tensor = constant("w", *range(8), kind=np.float32)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret.bin")
    return tensor


def looping():
    info = helper.make_tensor_value_info
    ins = [info("i", TensorProto.INT64, []), info("go", TensorProto.BOOL, [])]
    outs = [info("on", TensorProto.BOOL, [])]
    return helper.make_node("Loop", ["many", "yes"], [], body=body("b", ins, outs))


def node(operator, inputs=(), **attributes):
    return helper.make_node(operator, list(inputs), ["z"], **attributes)


huge = constant("s", 1000, 1000, 1000)


def nested(depth):
    """An operator in as many branches."""
    found = helper.make_node("Identity", ["mean"], ["z"])
    for _ in range(depth):
        inner = helper.make_graph([found], "b", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)])
        found = helper.make_node("If", ["yes"], ["z"], then_branch=inner, else_branch=inner)
    return found


zero_to_trillion = [helper.make_tensor(name, TensorProto.INT64, [], [n]) for name, n in (("a", 0), ("b", 1 << 40), ("c", 1))]
function = ("acme", "F", ["x"], ["y"], [helper.make_node("Abs", ["x"], ["y"])], [helper.make_opsetid("", 13)])
ANSWER = constant("yes", True, kind=bool)

#: What a file has → how it is made, what is said.
HOSTILE = {
    "another file": ({"nodes": [node("Identity", ["w"])], "inits": [external()]}, "another file; save it as one"),
    "a loop": ({"nodes": [looping()], "inits": [constant("many", 1 << 62), ANSWER]}, "'Loop'"),
    "another domain": ({"nodes": [node("Shell", ["mean"], domain="acme")]}, "of the domain 'acme'"),
    "a context": (
        {"nodes": [node("EPContext", ["mean"], domain="com.microsoft", ep_cache_context="/etc/passwd")]},
        "EPContext",
    ),
    "a constant": ({"nodes": [node("ConstantOfShape", ["s"])], "inits": [huge]}, "makes 1,000,000,000 numbers"),
    "expanded": ({"nodes": [node("Expand", ["mean", "s"])], "inits": [huge]}, "'Expand' makes 1,000,000,000"),
    "tiled": ({"nodes": [node("Tile", ["mean", "s"])], "inits": [constant("s", 1, 1 << 32)]}, "makes 4,294,967,296"),
    "padded": ({"nodes": [node("Pad", ["mean", "s"])], "inits": [constant("s", 0, 0, 0, 1 << 31)]}, "makes 2,147,483,649"),
    "a range": ({"nodes": [node("Range", "abc")], "inits": zero_to_trillion}, "makes 1,099,511,627,776"),
    "random": ({"nodes": [node("RandomNormal", shape=[1 << 16, 1 << 16])]}, "makes 4,294,967,296"),
    "a long input": ({"shape": (1, 1 << 40), "value": "mean"}, "1,099,511,627,776 samples at once"),
    "graphs in graphs": ({"nodes": [nested(8)], "inits": [ANSWER]}, "more than 4 deep"),
    "functions": ({"functions": [helper.make_function(*function)], "value": "mean"}, "functions of its own"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_refused_before_a_session_is_made(tmp_path, monkeypatch, what):
    import onnxruntime

    made, says = HOSTILE[what]
    path = network(tmp_path / "m.onnx", **{"value": "z", **made})
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("a session was made"))
    began = time.perf_counter()
    with pytest.raises(W2SError, match=f"m.onnx is refused: .*{says}") as caught:
        Predictor(path)
    assert time.perf_counter() - began < 1
    assert str(caught.value).isprintable()


def test_sparse_tensors_are_refused(tmp_path):
    model = onnx.load(toy(tmp_path / "m.onnx"))
    values = numpy_helper.from_array(np.ones(1, np.float32), "w")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, constant("at", 0), [1 << 20, 1 << 20]))
    with pytest.raises(W2SError, match="refused: it has sparse tensors"):
        open_session(model.SerializeToString())


def test_what_honest_files_have_is_taken(tmp_path):
    """A branch, weights in every type, a constant of a few million numbers, onnxruntime's own operators."""
    info = [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    branches = [helper.make_graph([helper.make_node(op, ["mean"], ["z"])], op, [], info) for op in ("Abs", "Neg")]
    choice = helper.make_node("If", ["yes"], ["z"], then_branch=branches[0], else_branch=branches[1])
    path = network(tmp_path / "if.onnx", [choice], [constant("yes", False, kind=bool)], value="z")
    assert Predictor(path)(np.full(4, 3.0))["mean"] == 0.0  # 3 and its negative
    kinds = (np.float16, np.float64, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.uint64, bool)
    weights = [constant(f"w{kind.__name__}", *([1] * 100), kind=kind) for kind in kinds]
    weights.append(helper.make_tensor("typed", TensorProto.FLOAT16, [100], np.ones(100)))
    weights.append(helper.make_tensor("four", TensorProto.UINT4, [3], [1, 2, 3]))
    network(path, [node("ConstantOfShape", ["s"])], [constant("s", 1000, 3000), *weights], value="z")
    assert Predictor(path)(np.full(4, 3.0))["mean"] == 3.0  # ConstantOfShape gives zeros
    network(path, [node("FastGelu", ["mean"], domain="com.microsoft")], value="z")
    assert Predictor(path)(np.zeros(4))["mean"] == 0.0


def test_memory_that_only_running_asks_for_has_a_limit(tmp_path):
    """Doubled thirty times, a number is 4 GB; no constant says so."""
    doubling = [helper.make_node("Concat", ["mean" if n == 0 else f"x{n}"] * 2, [f"x{n + 1}"], axis=1) for n in range(30)]
    path = network(tmp_path / "m.onnx", doubling, value="x30")
    code = f"""
from pathlib import Path
import numpy as np
from w2s_jax.runtime import Predictor, session
session.memory_limit = lambda: 300_000_000
try:
    Predictor({str(path)!r})(np.ones(100, np.float32))
except ValueError as error:
    print(error)
if Path("/proc/self/status").exists():
    print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""
    said, kilobytes = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert "needs too much memory for 100 samples; judge it in windows" in said
    assert int(kilobytes) < 500_000


def many_constants(how, count):
    """As many operators on constants, whose outputs of 2^24 numbers all live until the end."""
    inits = [constant("size", 1 << 24), constant("sides", 4096, 4096), constant("axis", 0), constant("whole", 1)]
    inits.append(constant("row", *[[1.0] * 4096], kind=np.float32))
    inits.append(constant("column", *[[1.0]] * 4096, kind=np.float32))
    inits.append(constant("few", 1.0, kind=np.float32))
    nodes = []
    for n in range(count):
        made = {
            "filled": [
                helper.make_node("ConstantOfShape", ["size"], [f"b{n}"], value=constant("v", float(n), kind=np.float32))
            ],
            "expanded": [helper.make_node("Expand", ["few", "size"], [f"b{n}"])],
            "broadcast": [helper.make_node("Mul", ["row", "column"], [f"b{n}"])],
            "hidden": [
                helper.make_node("Mul", ["sides", "whole"], [f"s{n}"]),
                helper.make_node("Expand", ["few", f"s{n}"], [f"b{n}"]),
            ],
            "not in order": [
                helper.make_node("Mul", [f"c{n}", "few"], [f"b{n}"]),
                helper.make_node("Expand", ["few", "size"], [f"c{n}"]),
            ],
        }[how]
        nodes += [*made, helper.make_node("Add", [f"b{n}", "mean"], [f"a{n}"])]
    nodes += [helper.make_node("ReduceMean", [f"a{n}"], [f"r{n}"], keepdims=0) for n in range(count)]
    return [*nodes, helper.make_node("Sum", [f"r{n}" for n in range(count)], ["z"])], inits


@pytest.mark.parametrize("how", ["filled", "expanded", "broadcast", "hidden", "not in order"])
def test_constants_together_are_not_computed_without_limit(tmp_path, how):
    few, many = (network(tmp_path / f"{n}.onnx", *many_constants(how, n), value="z") for n in (10, 100))
    assert onnxfile.check(few.read_bytes(), "few") == 1 << 26
    outputs = 200 if how in ("hidden", "not in order") else 100
    assert onnxfile.check(many.read_bytes(), "many") == (1 << 31) // outputs


def test_many_constants_take_no_memory_when_a_file_is_loaded(tmp_path):
    """40 of 64 MB, and the values are those that folding them would give."""
    path = network(tmp_path / "m.onnx", *many_constants("filled", 40), value="z")
    code = f"""
from pathlib import Path
import numpy as np
from w2s_jax.runtime import Predictor
predictor = Predictor({str(path)!r})
if Path("/proc/self/status").exists():
    print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
print(predictor(np.full(100, 2, np.float32))["mean"])
"""
    *kilobytes, value = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert float(value) == pytest.approx(2 + sum(2 + n for n in range(40)), rel=1e-3)
    assert all(int(number) < 300_000 for number in kilobytes)


@pytest.mark.parametrize("kind", ["model.onnx", "model.int8.onnx", "model.chunked.onnx"])
def test_the_constants_of_our_own_files_are_folded(kind):
    content = (Path(__file__).parent / "golden" / "artifacts" / "model" / kind).read_bytes()
    assert onnxfile.check(content, kind) == 1 << 26


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ({"sampling_rate": "999999999"}, "sampling_rate is '999999999', expected a whole number from 1000 to 384000"),
        ({"sampling_rate": "²"}, "sampling_rate is '²'"),
        ({"sampling_rate": "9" * 5000}, "expected a whole number"),
        ({"minimum_samples": "0"}, "minimum_samples is '0'"),
        ({"minimum_samples": "99999999999"}, "expected a whole number from 1 to 9600000"),
        ({"dimensions": "a,a,a"}, "names two dimensions alike: a"),
        ({"dimensions": "a,b,\x1b[31mc"}, r"names a dimension '\\x1b\[31mc'; expected 1 to 64 printable characters"),
        ({"dimensions": "a,b," + "c" * 65}, "expected 1 to 64 printable"),
        ({"dimensions": "a,b,c\u202e"}, r"'c\\u202e'"),
    ],
)
def test_metadata_is_checked(tmp_path, about, says):
    with pytest.raises(W2SError, match=says) as caught:
        Predictor(toy(tmp_path / "m.onnx", {**ABOUT, **about}))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


CUT = {"stride": 4, "halo": 8, "tokens": 100, "hop": 32, "n_fft": 64}


def chunked(path, cut=CUT, state=(3, 4)):
    """The mean of each piece; the state is carried and nothing else."""
    end = helper.make_tensor_value_info
    bounds = [end(name, TensorProto.INT64, [1]) for name in ("first", "last")]
    nodes = [
        helper.make_node("ReduceMean", ["signal"], ["mean"], axes=[1]),
        helper.make_node("Concat", ["mean"] * 3, ["logits"], axis=1),
        helper.make_node("Identity", ["state"], ["next"]),
    ]
    ins = [end("signal", TensorProto.FLOAT, [1, "time"]), end("state", TensorProto.FLOAT, state), *bounds]
    graph = helper.make_graph(
        nodes, "chunked", ins, [end("logits", TensorProto.FLOAT, [1, 3]), end("next", TensorProto.FLOAT, None)]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    helper.set_model_props(model, {**ABOUT, "chunk": cut if isinstance(cut, str) else json.dumps(cut)})
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    "cut",
    [
        *({**CUT, key: value} for key in ("stride", "tokens", "hop", "n_fft") for value in (0, -1, 1 << 40)),
        *({**CUT, "halo": value} for value in (-8, 7)),
        *({**CUT, "stride": value} for value in (math.inf, math.nan, 4.5, "4", None, True)),
        '{"stride": 1e999, "halo": 8, "tokens": 100, "hop": 32, "n_fft": 64}',
        "[" * 200_000,
        "[]",
        "{}",
    ],
    ids=lambda cut: str(cut)[:50],
)
def test_metadata_that_cannot_cut_a_recording(tmp_path, cut):
    with pytest.raises(W2SError, match=r"m.onnx: its metadata (says to cut|does not say how to cut) a recording") as caught:
        Predictor(chunked(tmp_path / "m.onnx", cut))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("state", [(), (4,), (1, 4), (3, "f"), (3, 0), (3, 1 << 20), (3, 4, 1)])
def test_a_state_of_another_shape(tmp_path, state):
    with pytest.raises(W2SError, match=r"m.onnx: expected a state \[3, features\]"):
        Predictor(chunked(tmp_path / "m.onnx", state=state))


def test_less_than_a_frame_has_no_pieces(tmp_path):
    predictor = Predictor(chunked(tmp_path / "m.onnx", {**CUT, "n_fft": 1000}))
    assert len(predictor(ramp(1000))) == 3
    with pytest.raises(W2SError, match="expected at least 1000 samples, got 999"):
        predictor(ramp(999))


def test_two_values_for_one_key_of_the_metadata(tmp_path):
    model = onnx.load(toy(tmp_path / "m.onnx"))
    model.metadata_props.add(key="dimensions", value=ABOUT["dimensions"])
    onnx.save(model, tmp_path / "same.onnx")
    assert Predictor(tmp_path / "same.onnx").dimensions == ("mean", "peak", "count")
    model.metadata_props.add(key="dimensions", value="peak,mean,count")
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(W2SError, match="other.onnx is refused: its metadata has two values for 'dimensions'"):
        Predictor(tmp_path / "other.onnx")


def test_metadata_that_is_no_text_is_damage(tmp_path):
    content = toy(tmp_path / "m.onnx", {**ABOUT, "teacher": "QQQQ"}).read_bytes()
    (tmp_path / "m.onnx").write_bytes(content.replace(b"QQQQ", b"\xff\xfe\xfd\xfc"))
    with pytest.raises(W2SError, match="damaged or not an ONNX model: .* is not UTF-8"):
        Predictor(tmp_path / "m.onnx")


def test_what_a_model_says_of_itself_cannot_move_the_cursor(tmp_path):
    shown = {"licence": "\x1b]0;owned\x07MIT\r\nteacher     paper", "parameters": "²", "teacher": "n" * 100_000}
    text = str(Predictor(toy(tmp_path / "m.onnx", {**ABOUT, **shown})))
    assert "licence     \N{REPLACEMENT CHARACTER}]0;owned\N{REPLACEMENT CHARACTER}MIT teacher paper\n" in text
    assert text.replace("\n", "").isprintable()
    assert len(text) < 2000


@given(st.binary(max_size=400))
def test_any_bytes_are_an_error_in_one_line(content):
    with pytest.raises(W2SError) as caught:
        open_session(content)
    assert str(caught.value).isprintable()


@settings(max_examples=150)
@given(data=st.data())
def test_a_mutated_file_runs_or_is_an_error_in_one_line(directory, tmp_path_factory, data):
    content = bytearray((directory / "model.onnx").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(("flip", "insert", "remove"))):
            case "flip":
                content[at] ^= data.draw(st.integers(1, 255))
            case "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=12))
            case "remove":
                del content[at : at + data.draw(st.integers(1, 12))]
    path = tmp_path_factory.getbasetemp() / "mutated.onnx"
    path.write_bytes(content)
    began = time.perf_counter()
    try:
        predictor = Predictor(path)
        assert len(predictor(ramp(200))) == 3
        assert str(predictor).replace("\n", "").isprintable()
    except W2SError as error:
        assert str(error).isprintable()
    assert time.perf_counter() - began < 2


def test_dnsmos_of_the_package_is_taken():
    place = importlib.util.find_spec("speechmos")
    if place is None:
        pytest.skip("needs pip install 'w2s-jax[teacher]'")
    session, _ = open_session(Path(place.submodule_search_locations[0]) / "dnsmos_models" / "sig_bak_ovr.onnx")
    assert session.get_outputs()[0].shape[-1] == 3


# a model directory


def test_a_damaged_file_of_a_model_directory_is_refused_by_name(directory, tmp_path):
    content = bytearray((directory / "model.onnx").read_bytes())
    shutil.copy(directory / "model.int8.onnx", tmp_path)
    (tmp_path / "export.json").write_text(json.dumps({"sha256": {"model.onnx": hashlib.sha256(content).hexdigest()}}))
    (tmp_path / "model.onnx").write_bytes(content)
    expected = Predictor(tmp_path)(ramp(64))
    assert expected == Predictor(directory)(ramp(64))
    content[-3] ^= 1  # a letter of the metadata
    (tmp_path / "model.onnx").write_bytes(content)
    for path in (tmp_path, tmp_path / "model.onnx"):
        with pytest.raises(W2SError, match=r"model.onnx is damaged: its SHA-256 .* copy or export it again"):
            Predictor(path)
    assert Predictor(tmp_path, kind="int8")(ramp(64)) == expected  # no sum is known of it
    (tmp_path / "export.json").write_text(json.dumps({"files": {"model.onnx": len(content)}}))  # as 0.1 wrote it
    Predictor(tmp_path)
    for damaged in ("[]", "{", '{"sha256": 3}', '{"sha256": {"model.onnx": []}}'):
        (tmp_path / "export.json").write_text(damaged)
        with contextlib.suppress(W2SError):
            Predictor(tmp_path)


def test_a_damaged_file_is_no_teacher_and_is_not_measured(directory, tmp_path):
    from w2s_jax import bench, teachers

    content = bytearray((directory / "model.onnx").read_bytes())
    (tmp_path / "export.json").write_text(json.dumps({"sha256": {"model.onnx": hashlib.sha256(content).hexdigest()}}))
    content[-3] ^= 1  # a letter of the metadata
    (tmp_path / "model.onnx").write_bytes(content)
    for work in (
        lambda: open_session(tmp_path / "model.onnx"),
        lambda: teachers.load(f"onnx:{tmp_path / 'model.onnx'}"),
        lambda: bench.bench([], [tmp_path], tmp_path / "out"),
    ):
        with pytest.raises(W2SError, match=r"model.onnx is damaged: its SHA-256 .* copy or export it again"):
            work()


@pytest.mark.parametrize("name", ["model.onnx", "model.tflite"])
def test_a_giant_file_is_neither_read_nor_hashed(tmp_path, name):
    (tmp_path / "export.json").write_text(json.dumps({"sha256": {name: "0" * 64}}))
    with open(tmp_path / name, "wb") as file:
        file.truncate(1 << 31)  # a hole, which takes no room
    with pytest.raises(W2SError, match=f"{name} is refused: it has 2,147,483,648 bytes; no model has more than"):
        open_session(tmp_path / name)


@pytest.mark.parametrize("what", ["a directory", "a pipe", "a link to nothing"])
def test_an_export_json_that_cannot_be_read_is_not_a_missing_one(directory, tmp_path, what):
    shutil.copy(directory / "model.onnx", tmp_path)
    report = tmp_path / "export.json"
    {"a directory": report.mkdir, "a pipe": lambda: os.mkfifo(report), "a link to nothing": lambda: report.symlink_to("x")}[
        what
    ]()
    with pytest.raises(W2SError, match=f"export.json.* is .*{what}"):
        Predictor(tmp_path)


def test_a_missing_kind_says_which_there_are(directory):
    with pytest.raises(UsageError, match=r"it has no model.qdq.onnx\); its kinds are: fp32, int8"):
        Predictor(directory, kind="qdq")


def test_the_published_layout_is_taken(tmp_path):
    """audEERING's: hidden_states [1, 1024] and logits [1, 3], no metadata."""
    path = toy(tmp_path / "m.onnx", {})
    model = onnx.load(path)
    hidden = helper.make_tensor_value_info("hidden_states", TensorProto.FLOAT, [1, 1])
    model.graph.node.append(helper.make_node("Identity", ["mean"], ["hidden_states"]))
    model.graph.output.insert(0, hidden)
    onnx.save(model, path)
    names = ["arousal", "dominance", "valence"]
    assert Predictor(path, dimensions=names)(np.array([1, 2, 3, 6] * 16, np.float32)) == dict(
        zip(names, (3, 6, 64), strict=True)
    )


def test_a_predictor_travels_to_another_process(directory, tmp_path):
    bare = toy(tmp_path / "bare.onnx", {})
    here = Predictor(bare, threads=2, dimensions=["a", "b", "c"])
    assert pickle.loads(pickle.dumps(here))(ramp(64)) == here(ramp(64))
    one = Predictor(directory, kind="int8")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(one, [ramp(50), ramp(70)]) == [one(ramp(50)), one(ramp(70))]


def test_nothing_is_reported_and_nothing_is_written_at_home(directory, tmp_path):
    """onnxruntime from 1.31 on writes below ~/.cache when it is imported, and sends what it finds there."""
    code = "import sys, numpy as np, {}; from w2s_jax.runtime import Predictor; print(Predictor(sys.argv[1])(np.ones(99)))"
    for first in ("w2s_jax.runtime.litert", "w2s_jax.teachers.onnx"):
        kept = {
            key: value for key, value in os.environ.items() if key in ("PATH", "PYTHONPATH", "SYSTEMROOT", "LD_LIBRARY_PATH")
        }
        subprocess.run(
            [sys.executable, "-c", code.format(first), str(directory)],
            env=kept | {"HOME": str(tmp_path)},
            check=True,
            capture_output=True,
        )
        assert list(tmp_path.rglob("*")) == []
