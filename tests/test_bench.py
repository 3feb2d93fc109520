"""Costs of ONNX files: counts against arithmetic by hand, time and memory of graphs that differ in a known way."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs pip install 'w2s-jax[export]'")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from w2s_jax import bench  # noqa: E402
from w2s_jax.errors import UsageError, W2SError  # noqa: E402


def save(path, nodes, weights, shape=("batch", "time"), metadata=None, name="signal", outputs=("y",), own=()):
    """Write a toy; the operators named in ``own`` are those of onnxruntime's domain."""
    constants = [numpy_helper.from_array(np.asarray(array), key) for key, array in weights.items()]
    graph = helper.make_graph(
        [
            helper.make_node(kind, inputs, [output], domain="com.microsoft" if kind in own else "", **attributes)
            for kind, inputs, output, attributes in nodes
        ],
        "toy",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))],
        [helper.make_empty_tensor_value_info(output) for output in outputs],
        constants,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)], ir_version=8
    )
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


@pytest.fixture
def own(tmp_path):
    """Operators of onnxruntime alone: 1.6 s are [1, 6400, 1, 4], channels last; 3 taps to 16 channels, a pool, a matrix."""
    one = {"s": np.float32(0.1), "z": np.uint8(128), "image": np.array([1, -1, 1, 4]), "rows": np.array([-1, 16])}
    convolution = {"w": np.ones((16, 4, 3, 1), np.int8), "ws": np.ones(16, np.float32), "wz": np.zeros(16, np.int8)}
    dense = {"g": np.ones((16, 5), np.int8), "gs": np.ones(5, np.float32), "gz": np.zeros(5, np.int8)}
    nodes = [
        ("QuantizeLinear", ["signal", "s", "z"], "q", {}),
        ("Reshape", ["q", "image"], "x", {}),
        ("QLinearConv", ["x", "s", "z", "w", "ws", "wz", "s", "z", "b"], "c", {"channels_last": 1, "kernel_shape": [3, 1]}),
        ("NhwcMaxPool", ["c"], "p", {"kernel_shape": [2, 1], "strides": [2, 1]}),
        ("Reshape", ["p", "rows"], "r", {}),
        ("QGemm", ["r", "s", "z", "g", "gs", "gz"], "y", {}),
    ]
    weights = {**one, **convolution, "b": np.ones(16, np.int32), **dense}
    return save(tmp_path / "own.onnx", nodes, weights, own=("QLinearConv", "NhwcMaxPool", "QGemm"))


def test_operators_of_onnxruntime_are_counted(own):
    counted = bench.count(own, seconds=1.6)
    assert counted["macs"] == 6398 * 16 * 4 * 3 + 3199 * 16 * 5
    assert counted["parameters"] == 16 * 4 * 3 + 16 + 16 * 5
    assert counted["uncounted"] == []


def test_weights_that_are_expanded_at_load(tmp_path):
    """3 stored channels of int8 become 4 of float: 0.1 s are 25 frames of 64."""
    path = save(
        tmp_path / "compact.onnx",
        [
            ("Cast", ["w"], "wf", {"to": TensorProto.FLOAT}),
            ("Mul", ["wf", "s"], "ws", {}),
            ("Pad", ["ws", "pads"], "wp", {}),
            ("MatMul", ["left", "left"], "square", {}),  # at load, once
            ("Unsqueeze", ["signal", "axes"], "x", {}),
            ("Conv", ["x", "wp"], "c", {"strides": [64]}),
            ("MatMul", ["square", "c"], "y", {}),
        ],
        {
            "w": np.ones((3, 1, 64), np.int8), "s": np.ones((3, 1, 1), np.float32), "pads": np.array([0, 0, 0, 1, 0, 0]),
            "left": np.ones((4, 4), np.float32), "axes": np.array([1]),
        },
    )  # fmt: skip
    counted = bench.count(path, seconds=0.1)
    assert counted == {"parameters": 4 * 64 + 4 * 4, "macs": 25 * 4 * 64 + 25 * 4 * 4, "uncounted": []}
    model = onnx.load(path)
    helper.set_model_props(model, {"parameters": "192"})
    onnx.save(model, path)
    assert bench.count(path, seconds=0.1)["parameters"] == 192


def test_bodies_are_named(tmp_path):
    def branch(node):
        return helper.make_graph([node], "branch", [], [helper.make_empty_tensor_value_info("b")])

    path = save(
        tmp_path / "if.onnx",
        [
            ("ReduceMax", ["signal"], "m", {"keepdims": 0}),
            ("Greater", ["m", "zero"], "loud", {}),
            (
                "If",
                ["loud"],
                "y",
                {
                    "then_branch": branch(helper.make_node("Gemm", ["signal", "w"], ["b"], transB=1)),
                    "else_branch": branch(helper.make_node("Identity", ["signal"], ["b"])),
                },
            ),
        ],
        {"zero": np.float32(0), "w": np.ones((3, 16_000), np.float32)},
    )
    assert bench.count(path, seconds=1.0)["uncounted"] == ["Gemm in If"]


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
        assert set(row) == {"engine", "bytes", "milliseconds", "p95_milliseconds", "real_time_factor", "peak_memory"}
        assert row["engine"] == "onnxruntime"
        assert row["bytes"] == file.stat().st_size
        assert 0 < row["milliseconds"] <= row["p95_milliseconds"]
    heard = {"plain": 5.0, "wide": 2.0}  # a fixed length is what it is
    for label, seconds in heard.items():
        row = figures[label]
        assert row["real_time_factor"] == pytest.approx(row["milliseconds"] / 1000 / seconds, rel=0.05, abs=1e-6)
    if figures["plain"]["peak_memory"] is not None:  # Windows has no figure
        assert abs(figures["plain"]["peak_memory"]) < 4e6
        assert 30e6 < figures["wide"]["peak_memory"] - figures["plain"]["peak_memory"] < 100e6  # two times 32 MB


class Clock:
    """A machine on which a file takes in an engine as many seconds in each round as it is told; it knows no others."""

    def __init__(self, takes):
        self.now, self.takes = 0.0, takes

    def ready(self, file, seconds, threads, engine):
        if (file, engine) not in self.takes:
            raise bench._NotForOpenVINO("no such operators")
        rounds = iter(self.takes[file, engine])

        def run():
            self.now += next(rounds)

        return run, seconds


def test_engines_and_a_yardstick_take_turns(toy, own, tmp_path, monkeypatch):
    takes = {
        (toy, "onnxruntime"): [9, 1, 2, 3], (toy, "openvino"): [9, 1, 1, 1], (own, "onnxruntime"): [9, 6, 2, 4],
        ("peer", "onnxruntime"): [9, 3, 1, 2],
    }  # fmt: skip
    clock = Clock(takes)
    monkeypatch.setattr(bench, "_ready", clock.ready)
    monkeypatch.setattr(bench, "_has_openvino", lambda: True)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock.now)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "peer").write_bytes(b"12345")
    said = []
    figures = bench.measure({"a": toy, "b": own}, 5.0, 3, memory=False, against="peer", engines=bench.ENGINES, say=said.append)
    found = {label: (row["engine"], row["milliseconds"], row["ratio"]) for label, row in figures.items()}
    assert found == {  # by hand: the median of 1/3, 2/1, 3/2 is 1.5, though both medians are 2
        "a": ("onnxruntime", 2000, 1.5), "a openvino": ("openvino", 1000, 0.5), "b": ("onnxruntime", 4000, 2),
        "peer": ("onnxruntime", 2000, 1),
    }  # fmt: skip
    assert figures["peer"]["bytes"] == 5
    assert said == [f"{own}: not measured in OpenVINO: no such operators"]


def test_a_tflite_file_runs_in_its_own_engine(tmp_path, monkeypatch):
    file = tmp_path / "model.tflite"
    file.write_bytes(b"1234")
    monkeypatch.setattr(bench, "_ready", Clock({(file, "onnxruntime"): [0] * 3}).ready)
    monkeypatch.setattr(bench, "_has_openvino", lambda: True)
    row = bench.measure({"lite": file}, runs=2, engines=bench.ENGINES)["lite"]
    assert (row["engine"], row["bytes"], row["peak_memory"]) == ("litert", 4, None)


def test_a_yardstick_that_is_measured_anyway(toy, own):
    figures = bench.measure({"toy": toy, "own": own}, 0.2, 3, memory=False, against=str(toy))
    assert list(figures) == ["toy", "own"]
    assert figures["toy"]["ratio"] == 1
    assert figures["own"]["ratio"] > 0


def test_openvino(toy, own, tmp_path):
    pytest.importorskip("openvino", reason="needs pip install 'w2s-jax[openvino]'")
    said = []
    figures = bench.measure({"toy": toy, "own": own}, 1.0, 3, engines=("openvino",), against=own, say=said.append)
    assert {label: row["engine"] for label, row in figures.items()} == {"toy openvino": "openvino", "own": "onnxruntime"}
    assert figures["toy openvino"]["ratio"] > 0
    if figures["toy openvino"]["peak_memory"] is not None:
        assert abs(figures["toy openvino"]["peak_memory"]) < 20e6  # the library itself, some 40 MB, is not in it
    (line,) = said
    assert "com.microsoft.QLinearConv" in line
    assert "only onnxruntime has" in line
    with pytest.raises(UsageError, match="none of 1 files runs in openvino"):
        bench.measure({"own": own}, 1.0, 3, engines=("openvino",))
    (tmp_path / "model.tflite").write_bytes(own.read_bytes())
    with pytest.raises(bench._NotForOpenVINO, match="LiteRT"):
        bench._ready(tmp_path / "model.tflite", 1.0, 1, "openvino")
    with pytest.raises(UsageError, match="no such file"):
        bench.measure({"none": tmp_path / "none.onnx"}, engines=("openvino",))
    two = save(tmp_path / "two.onnx", [("Abs", ["signal"], "y", {})], {}, shape=(1, 2, 3, 4))
    with pytest.raises(UsageError, match="expected one float input"):
        bench.measure({"two": two}, engines=("openvino",))


def test_the_empty_model_is_one():
    onnx.checker.check_model(onnx.load_from_string(bench.EMPTY))


@pytest.fixture
def mine(toy, tmp_path):
    """A model directory with an fp32, an int8 and a file with a second input."""
    model = tmp_path / "mine"
    model.mkdir()
    for name, kind in (("model.onnx", "fp32"), ("model.int8.onnx", "int8")):
        loaded = onnx.load(toy)
        helper.set_model_props(loaded, {"kind": kind, "student": "wav2small", "parameters": "72659"})
        onnx.save(loaded, model / name)
    loaded = onnx.load(toy)
    loaded.graph.input.append(helper.make_tensor_value_info("crop", TensorProto.INT64, [1]))
    onnx.save(loaded, model / "model.chunked.onnx")
    (model / "config.json").write_text(json.dumps({"validation_ccc": {"arousal": 0.7, "mean": 0.65}}))
    return model


def test_files_that_bench_writes(toy, mine, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs pip install 'w2s-jax[train]'")
    monkeypatch.setattr(bench, "PROCESSES", 1)
    said, only = [], ["onnxruntime"]
    table = bench.bench([], [mine, toy], tmp_path / "out", seconds=1.6, runs=2, engines=only, say=said.append)
    assert [(row["model"], row["kind"], row["engine"], row["parameters"], row["ccc"]) for row in table] == [
        ("mine", "fp32", "onnxruntime", 72659, 0.65), ("mine", "int8", "onnxruntime", 72659, 0.65),
        ("toy.onnx", None, "onnxruntime", 604, None),
    ]  # fmt: skip
    assert [line for line in said if "crop tensor(int64) [1]" in line and line.startswith("left out: ")]
    columns = tuple(column for column in bench.COLUMNS if column != "ratio")
    with open(tmp_path / "out" / "bench.csv") as file:
        rows = list(csv.DictReader(file))
    assert [tuple(row) for row in rows] == [columns] * 3
    assert rows[2]["macs"] == str(table[2]["macs"])
    about = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert (about["seconds"], about["threads"], len(about["rows"])) == (1.6, 1, 3)
    text = (tmp_path / "out" / "bench.md").read_text()
    assert "| mine | int8 | onnxruntime | 72,659 |" in text
    assert "ratio" not in text
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_locale_without_unicode(toy, tmp_path):
    code = "import sys; from w2s_jax import bench; bench.bench([], sys.argv[1:2], sys.argv[2], runs=1, engines=['onnxruntime'])"
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, toy, tmp_path / "out"], env=plain, check=True)
    assert "| toy.onnx | – |" in (tmp_path / "out" / "bench.md").read_text(encoding="utf-8")


def test_what_bench_says_of_kinds_engines_and_a_yardstick(toy, own, mine, tmp_path, monkeypatch):

    # a kind that is only in the table of kinds, with a name that no pattern would find
    monkeypatch.setattr(bench, "FILES", {"int8": "model.int8.onnx", "fp32": "model.onnx", "odd": "model.odd"})
    (mine / "model.odd").write_bytes(own.read_bytes())
    takes = {"model.onnx": 2e-3, "model.int8.onnx": 3e-3, "model.odd": 1e-3, "toy.onnx": 4e-3}

    def measured(files, *_, against, engines, say, **others):
        rows = [(bench._label(label, engine), engine, file) for label, file in files.items() for engine in engines]
        rows = [row for row in rows if row[0] != f"{mine / 'model.odd'} openvino"] + [(str(against), "onnxruntime", against)]
        figures = dict.fromkeys(("bytes", "p95_milliseconds", "real_time_factor", "peak_memory"), 1)
        return {
            label: {**figures, "engine": engine, "milliseconds": 1e3 * takes[file.name], "ratio": takes[file.name] / 4e-3}
            for label, engine, file in rows
        }

    monkeypatch.setattr(bench, "measure", measured)
    monkeypatch.setattr(bench, "_has_openvino", lambda: True)
    monkeypatch.setattr(bench, "machine", lambda engines: " and ".join(sorted(engines)))
    said = []
    table = bench.bench([], [mine], tmp_path / "out", engines=bench.ENGINES, against=toy, say=said.append)
    assert [(row["model"], row["kind"], row["engine"], row["ratio"]) for row in table] == [
        ("mine", "int8", "onnxruntime", 0.75), ("mine", "int8", "openvino", 0.75),
        ("mine", "fp32", "onnxruntime", 0.5), ("mine", "fp32", "openvino", 0.5),
        ("mine", "odd", "onnxruntime", 0.25), ("toy.onnx", None, "onnxruntime", 1.0),
    ]  # fmt: skip
    assert [line for line in said if "faster" in line] == [
        "mine, onnxruntime: fp32 is faster here: 2.00 ms against 3.00 ms of int8",
        "mine, openvino: fp32 is faster here: 2.00 ms against 3.00 ms of int8",
    ]
    text = (tmp_path / "out" / "bench.md").read_text()
    assert text.startswith("onnxruntime and openvino; 5 s of audio, 1 thread(s), 30 runs; ratio: time / time of ")
    assert text.splitlines()[2].endswith("| RTF | ratio | paper says |")
    with open(tmp_path / "out" / "bench.csv") as file:
        assert [row["ratio"] for row in csv.DictReader(file)] == ["0.75", "0.75", "0.5", "0.5", "0.25", "1.0"]
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["against"] == str(toy)


def test_the_command(toy, mine, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from w2s_jax import cli

    monkeypatch.setattr(bench, "PROCESSES", 1)
    arguments = ["--model", mine, "--against", toy, "--engine", "onnxruntime", "--out", tmp_path / "out", "--runs", 2, "--json"]
    result = CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    *shown, last = result.stdout.splitlines()
    assert [row["model"] for row in json.loads(last)["rows"]] == ["mine", "mine", "toy.onnx"]
    assert "ratio" in next(line for line in shown if "GMAC" in line)
    assert f"ratio: time divided by that of {toy} in onnxruntime" in "".join(shown)


def test_the_papers_figures_stand_beside():
    row = (
        dict.fromkeys(bench.COLUMNS)
        | {"model": "wav2small", "kind": "int8", "milliseconds": 6.4}
        | bench._published("wav2small")
    )
    cells = dict(zip(bench.headings(row), bench.shown(row), strict=True))
    assert cells["ms"] == "6.40"
    assert cells["peak MB"] == "–"
    assert cells["paper says"] == "0.4 GMAC; 120 kB; 9 MB; 9 ms; CCC A 0.66, V 0.37"


def test_what_cannot_be_measured(toy, tmp_path, monkeypatch):
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
    with pytest.raises(UsageError, match="unknown engine torch; there are: onnxruntime, openvino"):
        bench.measure({"toy": toy}, engines=("torch",))
    with pytest.raises(UsageError, match="no such file"):
        bench.measure({"toy": toy}, memory=False, against=tmp_path / "none.onnx")
    with pytest.raises(UsageError, match="no such file"):  # before any export
        bench.bench(["wav2small"], [], tmp_path / "out", against=tmp_path / "none.onnx")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match=r"openvino is not installed.*pip install.*\[openvino\]"):
        bench.bench([], [toy], tmp_path / "out", engines=["openvino"])
