"""Time and memory of graphs that differ in a known way."""

import sys

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs pip install 'w2s-jax[export]'")
from toys import save, save_own, save_toy  # noqa: E402

from w2s_jax import measure  # noqa: E402
from w2s_jax.errors import UsageError  # noqa: E402


@pytest.fixture
def toy(tmp_path):
    return save_toy(tmp_path / "toy.onnx")


@pytest.fixture
def own(tmp_path):
    return save_own(tmp_path / "own.onnx")


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
    figures = measure.measure(
        {"plain": plain, "wide": wide}, 5.0, runs=5, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (2 * (5 + measure.PROCESSES),) * 2
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
            raise measure._NotForOpenVINO("no such operators")
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
    monkeypatch.setattr(measure, "_load", clock.ready)
    monkeypatch.setattr(measure, "_has_openvino", lambda: True)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock.now)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "peer").write_bytes(b"12345")
    said = []
    figures = measure.measure(
        {"a": toy, "b": own}, 5.0, 3, memory=False, against="peer", engines=measure.ENGINES, message=said.append
    )
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
    monkeypatch.setattr(measure, "_load", Clock({(file, "onnxruntime"): [0] * 3}).ready)
    monkeypatch.setattr(measure, "_has_openvino", lambda: True)
    row = measure.measure({"lite": file}, runs=2, engines=measure.ENGINES)["lite"]
    assert (row["engine"], row["bytes"], row["peak_memory"]) == ("litert", 4, None)


def test_a_yardstick_that_is_measured_anyway(toy, own):
    figures = measure.measure({"toy": toy, "own": own}, 0.2, 3, memory=False, against=str(toy))
    assert list(figures) == ["toy", "own"]
    assert figures["toy"]["ratio"] == 1
    assert figures["own"]["ratio"] > 0


def test_openvino(toy, own, tmp_path):
    pytest.importorskip("openvino", reason="needs pip install 'w2s-jax[openvino]'")
    said = []
    figures = measure.measure({"toy": toy, "own": own}, 1.0, 3, engines=("openvino",), against=own, message=said.append)
    assert {label: row["engine"] for label, row in figures.items()} == {"toy openvino": "openvino", "own": "onnxruntime"}
    assert figures["toy openvino"]["ratio"] > 0
    if figures["toy openvino"]["peak_memory"] is not None:
        assert abs(figures["toy openvino"]["peak_memory"]) < 20e6  # the library itself, some 40 MB, is not in it
    (line,) = said
    assert "com.microsoft.QLinearConv" in line
    assert "only onnxruntime has" in line
    with pytest.raises(UsageError, match="none of 1 files runs in openvino"):
        measure.measure({"own": own}, 1.0, 3, engines=("openvino",))
    (tmp_path / "model.tflite").write_bytes(own.read_bytes())
    with pytest.raises(measure._NotForOpenVINO, match="LiteRT"):
        measure._load(tmp_path / "model.tflite", 1.0, 1, "openvino")
    with pytest.raises(UsageError, match="no such file"):
        measure.measure({"none": tmp_path / "none.onnx"}, engines=("openvino",))
    two = save(tmp_path / "two.onnx", [("Abs", ["signal"], "y", {})], {}, shape=(1, 2, 3, 4))
    with pytest.raises(UsageError, match="expected one float input"):
        measure.measure({"two": two}, engines=("openvino",))


def test_the_empty_model_gives_back_its_input():
    onnx.checker.check_model(onnx.load_from_string(measure.EMPTY))
    run, seconds = measure._load(measure.EMPTY, 0.1, 1, "onnxruntime")
    np.testing.assert_array_equal(run()[0], measure._noise((1600,)))
    assert seconds == 0.1


def test_integer_kinds_slower_than_fp32_are_named():
    times = {"fp32": 2.0, "int8": 3.0, "qdq": 1.9, "int8-int4": 2.5, "int8w": 9.0}  # int8w computes in float32
    assert measure.compare_with_fp32(times) == "fp32 is faster here: 2.00 ms against 3.00 ms of int8, 2.50 ms of int8-int4"
    assert measure.compare_with_fp32(times | {"fp32": 3.0}) is None
    assert measure.compare_with_fp32({"int8": 3.0}) is None


def test_kinds_of_a_student_have_what_its_report_needs(toy, own, monkeypatch):
    monkeypatch.setattr(measure, "PROCESSES", 1)
    lines = []
    figures = measure.measure_kinds({"fp32": toy, "int8": own}, against=toy, message=lines.append)
    assert set(figures) == {"fp32", "int8"}
    assert figures["fp32"]["ratio"] == 1 and figures["int8"]["against"] == "toy.onnx"
    assert set(figures["int8"]) == {"milliseconds", "peak_memory", "ratio", "seconds", "machine", "against"}
    assert "ratio" not in measure.measure_kinds({"fp32": toy})["fp32"]
    assert lines[0] == "measuring 2 files"


def test_what_cannot_be_measured(toy, tmp_path, monkeypatch):
    two = save(tmp_path / "two.onnx", [("Abs", ["signal"], "y", {})], {}, shape=(1, 2, 3, 4))
    with pytest.raises(UsageError, match=r"expected one float input.*signal tensor\(float\) \[1, 2, 3, 4\]"):
        measure.measure({"two": two}, memory=False)
    with pytest.raises(UsageError, match="no such file"):
        measure.measure({"none": tmp_path / "none.onnx"}, memory=False)
    with pytest.raises(UsageError, match="runs >= 1"):
        measure.measure({"toy": toy}, runs=0)
    with pytest.raises(UsageError, match="unknown engine torch; there are: onnxruntime, openvino"):
        measure.measure({"toy": toy}, engines=("torch",))
    with pytest.raises(UsageError, match="no such file"):
        measure.measure({"toy": toy}, memory=False, against=tmp_path / "none.onnx")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match=r"openvino is not installed.*pip install.*\[openvino\]"):
        measure.choose_engines(["openvino"])
