"""The table of what models cost, and the files that hold it."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
import types

import pytest

onnx = pytest.importorskip("onnx", reason="needs pip install 'w2s-jax[export]'")
from onnx import TensorProto, helper  # noqa: E402
from toys import save_own, save_toy  # noqa: E402

from w2s_jax import bench, measure  # noqa: E402
from w2s_jax.errors import UsageError  # noqa: E402


@pytest.fixture
def toy(tmp_path):
    return save_toy(tmp_path / "toy.onnx")


@pytest.fixture
def own(tmp_path):
    return save_own(tmp_path / "own.onnx")


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
    monkeypatch.setattr(measure, "PROCESSES", 1)
    said, only = [], ["onnxruntime"]
    table = bench.bench([], [mine, toy], tmp_path / "out", seconds=1.6, runs=2, engines=only, message=said.append)
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


def test_kinds_are_found_by_their_table_and_compared_with_a_yardstick(toy, own, mine, tmp_path, monkeypatch):
    # a kind that is only in the table of kinds, with a name that no pattern would find
    monkeypatch.setattr(bench, "FILES", {"int8": "model.int8.onnx", "fp32": "model.onnx", "odd": "model.odd"})
    monkeypatch.setattr(measure, "PROCESSES", 1)
    (mine / "model.odd").write_bytes(own.read_bytes())
    table = bench.bench([], [mine], tmp_path / "out", seconds=1.6, runs=2, engines=["onnxruntime"], against=toy)
    assert [(row["model"], row["kind"]) for row in table] == [
        ("mine", "int8"), ("mine", "fp32"), ("mine", "odd"), ("toy.onnx", None)
    ]  # fmt: skip
    assert table[-1]["ratio"] == 1 and all(row["ratio"] > 0 for row in table)
    text = (tmp_path / "out" / "bench.md").read_text()
    assert "; 1.6 s of audio, 1 thread(s), 2 runs; ratio: time / time of " in text.splitlines()[0]
    assert text.splitlines()[2].endswith("| RTF | ratio | paper says |")
    with open(tmp_path / "out" / "bench.csv") as file:
        assert [row["ratio"] for row in csv.DictReader(file)] == [str(row["ratio"]) for row in table]
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["against"] == str(toy)


def test_rows_of_two_engines_and_what_is_slower_than_fp32(mine, tmp_path, monkeypatch):
    times = {"model.onnx": 2.0, "model.int8.onnx": 3.0}

    def fake_measure(files, *_, engines, **others):
        figures = dict.fromkeys(("bytes", "p95_milliseconds", "real_time_factor", "peak_memory"), 1)
        return {
            measure.label_in(label, engine): {**figures, "engine": engine, "milliseconds": times[file.name]}
            for label, file in files.items()
            for engine in engines
        }

    monkeypatch.setattr(bench, "measure", fake_measure)
    openvino = types.ModuleType("openvino")
    openvino.__version__, openvino.__spec__ = "2026.4.1-22982-abc", importlib.util.spec_from_loader("openvino", None)
    monkeypatch.setitem(sys.modules, "openvino", openvino)
    lines = []
    table = bench.bench([], [mine], tmp_path / "out", message=lines.append)  # both engines, as both are installed
    assert [(row["kind"], row["engine"], row["milliseconds"]) for row in table] == [
        ("fp32", "onnxruntime", 2), ("fp32", "openvino", 2), ("int8", "onnxruntime", 3), ("int8", "openvino", 3)
    ]  # fmt: skip
    assert [line for line in lines if "faster" in line] == [
        "mine, onnxruntime: fp32 is faster here: 2.00 ms against 3.00 ms of int8",
        "mine, openvino: fp32 is faster here: 2.00 ms against 3.00 ms of int8",
    ]
    assert ", openvino 2026.4.1, Python 3." in (tmp_path / "out" / "bench.md").read_text()


def test_the_command(toy, mine, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from w2s_jax import cli

    monkeypatch.setattr(measure, "PROCESSES", 1)
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
    cells = dict(zip(bench.headings(row), bench.format_row(row), strict=True))
    assert cells["ms"] == "6.40"
    assert cells["peak MB"] == "–"
    assert cells["paper says"] == "0.4 GMAC; 120 kB; 9 MB; 9 ms; CCC A 0.66, V 0.37"


def test_what_cannot_be_benched(toy, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="no such file"):
        bench.bench([], [tmp_path / "none.onnx"], tmp_path / "out")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="it has no .onnx file"):
        bench.bench([], [tmp_path / "folder"], tmp_path / "out")
    with pytest.raises(UsageError, match="nothing to measure"):
        bench.bench([], [], tmp_path / "out")
    with pytest.raises(UsageError, match="unknown kind fp8"):
        bench.make("wav2small", {}, tmp_path, kinds=("fp8",))
    with pytest.raises(UsageError, match="no such file"):  # before any export
        bench.bench(["wav2small"], [], tmp_path / "out", against=tmp_path / "none.onnx")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match=r"openvino is not installed.*pip install.*\[openvino\]"):
        bench.bench([], [toy], tmp_path / "out", engines=["openvino"])
