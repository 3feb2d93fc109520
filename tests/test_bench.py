"""Costs of ONNX files: counts against arithmetic by hand, time and memory of graphs that differ in a known way."""

import csv
import json

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs pip install 'w2s-jax[export]'")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from w2s_jax import bench  # noqa: E402
from w2s_jax.artifacts import UsageError, W2SError  # noqa: E402


def save(path, nodes, weights, shape=("batch", "time"), metadata=None, name="signal", outputs=("y",)):
    constants = [numpy_helper.from_array(np.asarray(array), key) for key, array in weights.items()]
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, [output], **attributes) for kind, inputs, output, attributes in nodes],
        "toy",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))],
        [helper.make_empty_tensor_value_info(output) for output in outputs],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, metadata or {})
    onnx.save(model, path)
    return path


@pytest.fixture
def toy(tmp_path):
    """1.6 s are [1, 25600]: a strided convolution to 8 channels, a depthwise one, a matrix product, a Gemm."""
    ones = {
        "c": np.ones((8, 1, 64), np.float32), "d": np.ones((8, 1, 3), np.float32), "b": np.ones(8, np.float32),
        "m": np.ones((8, 5), np.float32), "g": np.ones((4, 5), np.float32), "axes": np.array([1]), "scale": np.float32(1),
    }  # fmt: skip
    return save(
        tmp_path / "toy.onnx",
        [
            ("Unsqueeze", ["signal", "axes"], "x", {}),
            ("Conv", ["x", "c", "b"], "conv", {"strides": [32]}),  # 799 frames
            ("Conv", ["conv", "d"], "depthwise", {"group": 8, "pads": [1, 1]}),
            ("Transpose", ["depthwise"], "rows", {"perm": [0, 2, 1]}),
            ("MatMul", ["rows", "m"], "tokens", {}),
            ("ReduceMean", ["tokens"], "mean", {"axes": [1], "keepdims": 0}),
            ("Gemm", ["mean", "g"], "y", {"transB": 1}),
        ],
        ones,
    )


def test_counts_are_those_by_hand(toy):
    counted = bench.count(toy, seconds=1.6)
    assert counted["macs"] == 799 * 8 * 64 + 799 * 8 * 3 + 799 * 8 * 5 + 5 * 4
    assert counted["parameters"] == 8 * 64 + 8 * 3 + 8 + 8 * 5 + 4 * 5
    assert counted["uncounted"] == []


def test_quantised_products_are_counted_and_others_named(tmp_path):
    eight = {
        "w": np.ones((4, 1, 64), np.int8), "s": np.float32(0.1), "z": np.int8(0), "axes": np.array([1]),
        "lw": np.ones((1, 8, 4), np.float32), "lr": np.ones((1, 8, 2), np.float32),
    }  # fmt: skip
    path = save(
        tmp_path / "q.onnx",
        [
            ("Unsqueeze", ["signal", "axes"], "x", {}),
            ("DequantizeLinear", ["w", "s", "z"], "wf", {}),
            ("Conv", ["x", "wf"], "conv", {"strides": [64]}),
            ("Transpose", ["conv"], "rows", {"perm": [2, 0, 1]}),
            ("LSTM", ["rows", "lw", "lr"], "y", {"hidden_size": 2}),
        ],
        eight,
    )
    counted = bench.count(path, seconds=1.0)
    assert counted["macs"] == 250 * 4 * 64
    assert counted["uncounted"] == ["LSTM"]
    assert counted["parameters"] == 4 * 64 + 8 * 4 + 8 * 2  # scale and zero point are none


def test_measure(toy, tmp_path):
    plain = save(tmp_path / "plain.onnx", [("Abs", ["wave"], "y", {})], {}, shape=("time",), name="wave")
    # 16 copies of the signal with a dimension fixed at 32,000 samples: 32 MB more than the other needs
    wide = save(
        tmp_path / "wide.onnx",
        [("Expand", ["signal", "shape"], "x", {}), ("Exp", ["x"], "e", {}), ("ReduceSum", ["e"], "y", {"keepdims": 0})],
        {"shape": np.array([250, 32_000])},
        shape=(1, 32_000),
    )
    seen = []
    figures = bench.measure(
        {"plain": plain, "wide": wide}, 5.0, runs=5, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (2 * (5 + bench.PROCESSES),) * 2
    for label, file in (("plain", plain), ("wide", wide)):
        row = figures[label]
        assert row["bytes"] == file.stat().st_size
        assert 0 < row["milliseconds"] <= row["p95_milliseconds"]
    heard = {"plain": 5.0, "wide": 2.0}  # a fixed length is what it is
    for label, seconds in heard.items():
        row = figures[label]
        assert row["real_time_factor"] == pytest.approx(row["milliseconds"] / 1000 / seconds, rel=0.05, abs=1e-6)
    if figures["plain"]["peak_memory"] is not None:  # Windows has no figure
        assert abs(figures["plain"]["peak_memory"]) < 4e6
        assert 30e6 < figures["wide"]["peak_memory"] - figures["plain"]["peak_memory"] < 100e6  # two times 32 MB


def test_the_empty_model_is_one():
    onnx.checker.check_model(onnx.load_from_string(bench.EMPTY))


def test_files_that_bench_writes(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "PROCESSES", 1)
    model = tmp_path / "mine"
    model.mkdir()
    for name, kind in (("model.onnx", "fp32"), ("model.int8.onnx", "int8")):
        loaded = onnx.load(toy)
        helper.set_model_props(loaded, {"kind": kind, "student": "wav2small", "parameters": "72659"})
        onnx.save(loaded, model / name)
    (model / "config.json").write_text(json.dumps({"validation_ccc": {"arousal": 0.7, "mean": 0.65}}))
    said = []
    table = bench.bench([], [model, toy], tmp_path / "out", seconds=1.6, runs=2, say=said.append)
    assert [(row["model"], row["kind"], row["parameters"], row["ccc"]) for row in table] == [
        ("mine", "fp32", 72659, 0.65), ("mine", "int8", 72659, 0.65), ("toy.onnx", None, 604, None),
    ]  # fmt: skip
    with open(tmp_path / "out" / "bench.csv") as file:
        rows = list(csv.DictReader(file))
    assert [tuple(row) for row in rows] == [bench.COLUMNS] * 3
    assert rows[2]["macs"] == str(table[2]["macs"])
    about = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert (about["seconds"], about["threads"], len(about["rows"])) == (1.6, 1, 3)
    text = (tmp_path / "out" / "bench.md").read_text()
    assert "| mine | int8 | 72,659 |" in text
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_papers_figures_stand_beside():
    row = (
        dict.fromkeys(bench.COLUMNS)
        | {"model": "wav2small", "kind": "int8", "milliseconds": 6.4}
        | bench._published("wav2small")
    )
    cells = dict(zip(bench.headings(), bench.shown(row), strict=True))
    assert cells["ms"] == "6.40"
    assert cells["peak MB"] == "–"
    assert cells["paper says"] == "0.4 GMAC; 120 kB; 9 MB; 9 ms; CCC A 0.66, V 0.37"


def test_what_cannot_be_measured(toy, tmp_path):
    two = save(tmp_path / "two.onnx", [("Abs", ["signal"], "y", {})], {}, shape=(1, 2, 3, 4))
    (tmp_path / "torn.onnx").write_bytes(toy.read_bytes()[:100])
    with pytest.raises(UsageError, match=r"expected one float input.*signal tensor\(float\) \[1, 2, 3, 4\]"):
        bench.measure({"two": two}, memory=False)
    with pytest.raises(UsageError, match="no such file"):
        bench.measure({"none": tmp_path / "none.onnx"}, memory=False)
    with pytest.raises(UsageError, match="no such file"):
        bench.bench([], [tmp_path / "none.onnx"], tmp_path / "out")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="it has no .onnx file"):
        bench.bench([], [tmp_path / "folder"], tmp_path / "out")
    with pytest.raises(W2SError, match="damaged"):
        bench.count(tmp_path / "torn.onnx")
    with pytest.raises(UsageError, match="nothing to measure"):
        bench.bench([], [], tmp_path / "out")
    with pytest.raises(UsageError, match="unknown kind fp8"):
        bench.make("wav2small", {}, tmp_path, kinds=("fp8",))
    with pytest.raises(UsageError, match="runs >= 1"):
        bench.measure({"toy": toy}, runs=0)
