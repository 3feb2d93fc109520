"""The command line as scripts see it: exit codes, one-line errors, --json, --help, and the chain end to end."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import typer
from conftest import voice
from safetensors.numpy import load_file

from w2s_jax import __version__, cli, install, quickstart, teachers
from w2s_jax.cli import predict as predict_module
from w2s_jax.cli import progress
from w2s_jax.errors import UsageError

COMMANDS = ["bank build", "views draw", "teacher check", "label", "train", "eval", "export", "predict", "bench", "quickstart"]


@pytest.fixture
def w2s(monkeypatch, capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["w2s", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return call


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_json(w2s, command):
    code, out, _ = w2s(*command.split(), "--help")
    assert code == 0
    assert "--json" in out
    assert len(out.split()) > 40


def test_the_commands_are_these(w2s):
    top = typer.main.get_command(cli.app).commands
    names = {f"{name} {part}".strip() for name, command in top.items() for part in getattr(command, "commands", {"": None})}
    assert names == set(COMMANDS)
    assert w2s("--version")[1] == f"w2s {__version__}\n"


@pytest.fixture(scope="module")
def chain(corpus, tmp_path_factory):
    """Every command once, in processes of their own; their last lines."""
    at = tmp_path_factory.mktemp("chain")
    commands = {
        "bank": f"bank build {corpus / 'corpus.csv'} --corpus csv --out {at / 'bank'}",
        "views": f"views draw {at / 'bank'} --out {at / 'views.parquet'} --seconds 0.5 --per-clip 3",
        "label": f"label {at / 'bank'} {at / 'views.parquet'} --teacher acoustic --out {at / 'labels'}",
        "train": f"train wav2small --bank {at / 'bank'} --views {at / 'views.parquet'} --labels {at / 'labels'} "
        f"--workdir {at / 'run'} --set steps=4 --set eval_every=2 --set fields.channels=3 --set batch_size=4",
        "eval": f"eval {at / 'run'} --bank {at / 'bank'} --views {at / 'views.parquet'} --labels {at / 'labels'}",
        "export": f"export {at / 'run'} --out {at / 'model'} --kind chunked --no-measure",
        "eval_model": f"eval {at / 'model'} --bank {at / 'bank'} --views {at / 'views.parquet'} --labels {at / 'labels'}",
        "predict": f"predict {at / 'model'} {corpus / '00.wav'} {corpus / '20.wav'} --window 0.5 --format jsonl",
    }

    def run(name):
        command = [sys.executable, "-m", "w2s_jax.cli", *shlex.split(commands[name]), "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return [json.loads(done.stdout.splitlines()[-1]), done]

    lines = {name: run(name) for name in ("bank", "views", "label", "train")}
    with ThreadPoolExecutor(2) as pool:  # what needs nothing of each other
        for pair in (("eval", "export"), ("eval_model", "predict")):
            lines |= dict(zip(pair, pool.map(run, pair), strict=True))
    return at, lines


def test_the_chain_ends_in_predictions(chain, corpus):
    at, lines = chain
    assert lines["bank"][0]["clips"] == 24
    assert lines["label"][0]["teacher"]["stand_in"] is True
    assert "stand-in" in lines["label"][1].stdout
    assert lines["train"][0]["steps"] == 4
    assert lines["export"][0]["parity"]["max_difference"] <= 1e-4
    kinds = lines["export"][0]["kinds"]
    assert set(kinds) == {"fp32", "chunked"}
    assert all("milliseconds" not in row for row in kinds.values())
    assert "model.chunked.onnx" in lines["export"][1].stdout
    rows = [json.loads(line) for line in lines["predict"][1].stdout.splitlines()[:-1]]
    assert {row["file"] for row in rows} == {str(corpus / "00.wav"), str(corpus / "20.wav")}
    assert lines["predict"][0]["rows"] == len(rows)
    # Flax and ONNX are the same student
    for name, score in lines["eval"][0]["teacher"].items():
        if name != "mean":
            assert abs(score["ccc"] - lines["eval_model"][0]["teacher"][name]["ccc"]) < 1e-3
    # progress is for people, and goes to stderr
    assert "views" in lines["label"][1].stderr
    assert lines["views"][0]["seconds"] == {"0.5": lines["views"][0]["count"]}


def test_labels_that_were_there_already_are_told(chain, w2s):
    at, lines = chain
    again = ("label", at / "bank", at / "views.parquet", "--teacher", "acoustic", "--out", at / "labels")
    count = lines["views"][0]["count"]
    assert f"{count} views labelled by acoustic (arousal, dominance, valence)\n" in lines["label"][1].stdout
    assert f"{count} views labelled by acoustic (arousal, dominance, valence), all of them earlier\n" in w2s(*again)[1]
    next((at / "labels" / "shards").iterdir()).unlink()
    assert "dominance, valence)\n" in w2s(*again)[1]


def test_bench_of_a_model(chain, tmp_path, w2s):
    code, out, err = w2s(
        "bench", "--model", chain[0] / "model", "--out", tmp_path / "b", "--runs", 2, "--engine", "onnxruntime", "--json"
    )
    assert code == 0, err
    *shown, last = out.splitlines()
    row, pieces = json.loads(last)["rows"]
    assert (row["kind"], pieces["kind"]) == ("fp32", "chunked")
    assert pieces["milliseconds"] > 0
    assert row["macs"] < pieces["macs"] < 1.2 * row["macs"]  # neighbouring pieces of a second overlap
    assert row["bytes"] == (chain[0] / "model" / "model.onnx").stat().st_size
    assert f"{row['milliseconds']:.2f}" in "\n".join(shown)
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"bench.csv", "bench.json", "bench.md", "bench.png"}
    code, _, err = w2s("bench", "--model", chain[0] / "model", "--set", "n_mels=40")
    assert code == 2
    assert "--set is for the students' fields" in err
    assert w2s("bench", "wav2small", "--set", "mels=40", "--out", tmp_path / "c")[0] == 2


def test_kinds_on_the_command_line(chain, corpus, tmp_path, w2s):
    at, _ = chain
    values = [
        json.loads(w2s("predict", at / "model", corpus / "01.wav", "--kind", kind, "--format", "json")[1])[0]
        for kind in ("fp32", "chunked")
    ]
    for name in ("arousal", "dominance", "valence"):
        assert values[0][name] == pytest.approx(values[1][name], abs=1e-4)
    code, _, err = w2s("predict", at / "model", corpus / "01.wav", "--kind", "int8")
    assert code == 2 and "it has no model.int8.onnx" in err
    code, _, err = w2s("export", at / "run", "--out", tmp_path / "m", "--kind", "qdq")
    assert code == 2 and "the kind qdq rounds, and has to be judged on real audio" in err
    assert not (tmp_path / "m").exists()


def test_prediction_formats(chain, corpus, tmp_path, w2s):
    model = chain[0] / "model"
    odd = tmp_path / 'a "quoted", name\n.wav'
    soundfile.write(odd, voice(1.0, 3), 22_050)
    files = [corpus / "01.wav", odd]
    _, out, _ = w2s("predict", model, *files, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["file"] for row in rows] == [str(files[0]), str(odd).replace("\n", "\\n")]
    _, out, _ = w2s("predict", model, *files, "--format", "json")
    assert [float(row["valence"]) for row in rows] == [row["valence"] for row in json.loads(out)]
    _, out, _ = w2s("predict", model, files[0])
    assert "valence" in out


def test_one_unreadable_file_does_not_stop_the_rest(chain, corpus, tmp_path, w2s):
    (tmp_path / "empty.wav").touch()
    code, out, err = w2s(
        "predict", chain[0] / "model", tmp_path / "empty.wav", corpus / "02.wav", "--format", "jsonl", "--json"
    )
    assert code == 1
    *rows, last = map(json.loads, out.splitlines())
    assert [row["file"] for row in rows] == [str(corpus / "02.wav")]
    assert (last["files"], last["failures"]) == (2, 1)
    assert "empty.wav" in err


def test_leaks_between_splits_and_other_views_are_refused_with_the_way_out(bank, corpus, tmp_path, w2s):
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.wav").write_bytes((corpus / f"0{'abcd'.index(name) % 3}.wav").read_bytes())
    (tmp_path / "corpus.csv").write_text("file,split\na.wav,train\nb.wav,train\nc.wav,validation\nd.wav,test\n")
    build = ("bank", "build", tmp_path / "corpus.csv", "--corpus", "csv", "--out", tmp_path / "bank")
    code, _, err = w2s(*build)
    assert code == 1 and len(err.splitlines()) == 1
    assert "a.wav (train) is d.wav (test)" in err and "--leaks drop" in err
    code, out, err = w2s(*build, "--leaks", "drop", "--json")
    assert code == 0 and "left out of train" in err
    assert json.loads(out.splitlines()[-1])["splits"] == {"train": 1, "validation": 1, "test": 1}
    drawing = ("views", "draw", bank.path, "--out", tmp_path / "views.parquet", "--seconds", "0.5")
    assert w2s(*drawing)[0] == w2s(*drawing)[0] == 0
    code, _, err = w2s(*drawing, "--seed", 1)
    assert code == 1 and "views.parquet holds other views" in err and "--force" in err
    assert w2s(*drawing, "--seed", 1, "--force")[0] == 0


def test_few_clips_have_no_interval_on_the_command_line(chain, w2s):
    at, lines = chain
    report = lines["eval"][0]
    assert report["notes"][0].startswith("4 clips are too few for a confidence interval")
    assert report["teacher"]["arousal"]["low"] is None
    assert "4 clips are too few" in lines["eval"][1].stdout


def test_long_files_are_read_in_windows(chain, tmp_path, w2s):
    soundfile.write(tmp_path / "long.wav", np.tile(voice(5.0, 1), 15), 16_000)  # 75 s: over the limit of one piece
    _, out, _ = w2s("predict", chain[0] / "model", tmp_path / "long.wav", "--format", "jsonl")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["start"], row["end"]) for row in rows[:2]] == [(0, 10), (10, 20)]
    assert rows[-1]["end"] == 75
    _, out, _ = w2s("predict", chain[0] / "model", tmp_path / "long.wav", "--format", "jsonl", "--window", "5", "--hop", "10")
    assert [json.loads(line)["start"] for line in out.splitlines()] == [0, 10, 20, 30, 40, 50, 60, 70]


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("bank build {tmp}/none --out {tmp}/out", 2, "does not exist"),
        ("bank build {tmp}/empty --out {tmp}/out", 1, "{tmp}/empty"),
        ("bank build {corpus} --out {tmp}/out --corpus tape", 2, "'tape'"),
        ("bank build {corpus} --out {tmp}/out --fractions 1,2", 2, "--fractions takes 3 numbers"),
        ("views draw {tmp}/none --out {tmp}/out", 2, "no bank at"),
        ("views draw {at}/bank --out {tmp}/out --mix 2", 2, "--mix"),
        ("views draw {at}/bank --out {tmp}/out --seconds x", 2, "--seconds takes some numbers"),
        ("label {at}/bank {tmp}/none --teacher acoustic --out {tmp}/out", 2, "no views at"),
        ("label {at}/bank {at}/views.parquet --teacher nobody --out {tmp}/out", 2, "unknown teacher 'nobody'"),
        ("label {at}/bank {at}/views.parquet --teacher onnx:{tmp}/x.onnx --out {tmp}/out", 2, "no teacher at"),
        ("label {at}/bank {at}/views.parquet --teacher acoustic", 2, "Missing option '--out'"),
        ("train wav2big {data} --workdir {tmp}/out", 2, "unknown student 'wav2big'"),
        ("train {tmp}/none.py {data} --workdir {tmp}/out", 2, "no experiment at"),
        ("train wav2small {data} --workdir {tmp}/out --set steps=x", 2, "expected int"),
        ("train wav2small_17k {data} --workdir {at}/run", 1, "holds another run"),
        ("eval {tmp}/none --bank {at}/bank", 2, "no run"),
        ("eval {at}/run --bank {tmp}/none", 2, "no bank at"),
        ("eval {at}/run --bank {at}/bank --labels {at}/labels", 2, "--views"),
        ("export {tmp}/none --out {tmp}/out", 2, "no run at"),
        ("export {tmp}/empty --out {tmp}/out", 2, "no student at"),
        ("predict {tmp}/none {corpus}/00.wav", 2, "{tmp}/none"),
        ("predict {at}/model {tmp}/none.wav", 1, "none.wav"),
        ("predict {at}/model {corpus}/00.wav --window 0", 2, "--window"),
        ("predict {at}/model {corpus}/00.wav --hop 1", 2, "--hop goes with --window"),
        ("predict {at}/model/model.onnx {corpus}/00.wav --kind int8", 2, "kind"),
        ("bank build {corpus}/corpus.csv --corpus csv --split-by folder --out {tmp}/out", 2, "--split-by is for"),
        ("label {at}/bank {at}/views.parquet --teacher acoustic --dimensions a,b,c --out {tmp}/out", 2, "--dimensions is for"),
        ("label {at}/bank {at}/views.parquet --teacher acoustic --checkpoint-dir {tmp} --out {tmp}/out", 2, "dnsmos"),
        ("label {at}/bank {at}/views.parquet --teacher acoustic --dtype bfloat16 --out {tmp}/out", 2, "has no --dtype"),
        ("label {at}/bank {at}/views.parquet --teacher wavlm --dtype float16 --out {tmp}/out", 2, "'--dtype': 'float16'"),
        ("label {at}/bank {at}/views.parquet --teacher wavlm --checkpoint-dir {tmp} --out {tmp}/out", 2, "no checkpoint of"),
        ("label {at}/bank {at}/views.parquet --teacher acoustic --process 1 --out {tmp}/out", 2, "go together"),
        ("teacher check wav2vec2 --checkpoint-dir {tmp}", 2, "wav2vec2-large-robust-12-ft-emotion-msp-dim"),
        ("teacher check acoustic --bank {at}/bank", 2, "--dtype bfloat16"),
        ("eval --bank {at}/bank", 2, "either RUN|MODEL or --teacher"),
        ("eval {at}/run --teacher acoustic --bank {at}/bank", 2, "either RUN|MODEL or --teacher"),
        ("eval {at}/run --bank {at}/bank --dtype float32", 2, "go with --teacher"),
        ("eval --teacher acoustic --bank {at}/bank --labels {at}/labels", 2, "are for a student"),
        ("eval --teacher dnsmos --bank {at}/bank", 2, "sig, bak, ovrl"),
        ("nonsense", 2, "No such command"),
    ],
)
def test_errors_are_one_line_with_the_right_code(w2s, chain, corpus, tmp_path, command, code, message):
    (tmp_path / "empty").mkdir()
    at = chain[0]
    names = {"tmp": tmp_path, "at": at, "corpus": corpus}
    names["data"] = f"--bank {at}/bank --views {at}/views.parquet --labels {at}/labels"
    got, out, err = w2s(*shlex.split(command.format(**names)))
    errors = [line for line in err.splitlines() if line.startswith("w2s: error: ")]
    assert got == code
    assert len(errors) == 1, err
    assert message.format(**names) in errors[0]
    assert "Traceback" not in err + out
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").rglob("*.*[!k]"))  # nothing but a lock


def test_a_mismatch_of_bank_and_views_names_both(w2s, chain, corpus, tmp_path):
    w2s("bank", "build", corpus / "corpus.csv", "--corpus", "csv", "--out", tmp_path / "same")
    (tmp_path / "less.csv").write_text("file,split,speaker\n" + "".join(f"{corpus}/{n:02d}.wav,train,s\n" for n in range(3)))
    w2s("bank", "build", tmp_path / "less.csv", "--corpus", "csv", "--out", tmp_path / "less")
    arguments = chain[0] / "views.parquet", "--teacher", "acoustic", "--out", tmp_path / "labels"
    assert w2s("label", tmp_path / "same", *arguments)[0] == 0  # the same audio and splits are the same bank
    code, _, err = w2s("label", tmp_path / "less", *arguments)
    assert code == 1
    assert "the views belong to bank" in err


@pytest.mark.slow
def test_teacher_check_tells_what_a_teacher_is_and_how_fast(w2s, chain, checkpoints):
    short = "--seconds", "0.5", "--batch-size", "2", "--json"
    code, out, _ = w2s("teacher", "check", "paper", "--checkpoint-dir", checkpoints, *short)
    assert code == 0
    result = json.loads(out.splitlines()[-1])
    assert [member["name"] for member in result["members"]] == ["wav2vec2", "wavlm"]
    assert [member["normalisation"] for member in result["members"]] == ["utterance", "paper"]
    assert result["parameters"] == sum(
        array.size for name in ("wav2vec2", "wavlm") for array in load_file(checkpoints / name / "model.safetensors").values()
    )
    assert result["seconds_per_hour"] == pytest.approx(3600 / result["views_per_second"] / 0.5, rel=0.01)
    assert "CC-BY-NC-SA-4.0" in out
    options = "--dtype", "bfloat16", "--bank", chain[0] / "bank", "--checkpoint-dir", checkpoints
    code, out, _ = w2s("teacher", "check", "wavlm", *options, *short)
    effect = json.loads(out.splitlines()[-1])["bfloat16"]
    assert code == 0
    assert effect["clips"] == 16  # all training clips
    assert 0 < effect["largest_difference"] < 0.2
    assert "bfloat16 against float32" in out


@pytest.mark.slow
def test_a_teacher_is_compared_with_people(w2s, chain, corpus, checkpoints, tmp_path):
    options = "--checkpoint-dir", checkpoints, "--split", "test", "--out", tmp_path, "--batch-size", "3", "--json"
    code, out, _ = w2s("eval", "--teacher", "wavlm", "--bank", chain[0] / "bank", *options)
    assert code == 0
    report = json.loads(out.splitlines()[-1])
    test = [number for number in range(24) if number % 6 == 5]
    assert report["clips"] == len(test)
    # every clip alone, at its own length; CCC as in Lin 1989
    heard = teachers.load("wavlm", checkpoints)
    values = np.concatenate([heard(soundfile.read(corpus / f"{n:02d}.wav", dtype="float32")[0][None]) for n in test])
    rated = np.array([[np.round(0.1 + 0.03 * n, 2), 0.5, np.round(0.9 - 0.02 * n, 2)] for n in test])
    for at, name in enumerate(heard.dimensions):
        x, y = values[:, at].astype(float), rated[:, at]
        ccc = 2 * np.cov(x, y, ddof=0)[0, 1] / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)
        assert report["human"][name]["ccc"] == pytest.approx(ccc, abs=1e-3)
    assert (tmp_path / "teacher_test.json").exists()
    assert (tmp_path / "teacher_test.png").stat().st_size > 5000


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["w2s", "export", "/none", "--out", "/none/out", "--debug"])
    with pytest.raises(UsageError):
        cli.main()


@pytest.mark.parametrize(
    ("module", "extra", "command"),
    [
        ("pyarrow", "train", "views draw {tmp} --out {tmp}/out"),
        ("optax", "train", "train wav2small --bank {tmp} --views {tmp} --labels {tmp} --workdir {tmp}/out"),
        ("jax", "train", "eval {tmp} --bank {tmp}"),
        ("jax", "export", "export {tmp} --out {tmp}/out"),
        ("jax", "export", "bench wav2small --out {tmp}/out"),
        ("tf2onnx", "all", "quickstart --workdir {tmp}/out"),
        ("flax", "train,teacher", "teacher check wavlm"),
    ],
)
def test_a_missing_extra_names_the_pip_command(tmp_path, module, extra, command):
    arguments = ["w2s", *shlex.split(command.format(tmp=tmp_path))]
    code = f"import sys; sys.modules[{module!r}], sys.argv = None, {arguments}; from w2s_jax.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    *before, line = done.stderr.splitlines()
    assert before in ([], ["loading teacher wavlm"])
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert line.startswith(f"w2s: error: {module} is not installed; this command needs it: ")
    assert "pip install -c " in line and line.endswith(f"[{extra}]'")  # tests run from a clone


def test_a_file_in_the_place_of_a_directory_is_refused_first(w2s, bank, views, toy_teacher, tmp_path):
    views.save(tmp_path / "views.parquet")
    (tmp_path / "file").touch()
    for command in (
        f"label {bank.path} {tmp_path}/views.parquet --teacher acoustic --out",
        f"bench --model {toy_teacher} --out",
        "quickstart --workdir",
    ):
        code, _, err = w2s(*command.split(), f"{tmp_path}/file")
        assert code == 2 and f"{tmp_path}/file is a file; expected a directory for" in err, command


def test_what_needs_the_base_install_alone(tmp_path):
    for command in ("teacher check acoustic --seconds 0.1 --batch-size 1", "predict --help"):
        code = "import sys; sys.modules.update(dict.fromkeys(['flax', 'ml_collections', 'pyarrow', 'transformers'])); "
        code += f"sys.argv = {['w2s', *command.split()]}; from w2s_jax.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_missing_module_of_nobodys_extra_is_a_fault(w2s, model, speech, monkeypatch):
    def fails(*_):
        raise ModuleNotFoundError("No module named 'w2s_jax.gone'", name="w2s_jax.gone")

    monkeypatch.setattr(predict_module, "_predict_file", fails)
    code, _, err = w2s("predict", model, speech)
    assert code == 1 and "unexpected ModuleNotFoundError: No module named 'w2s_jax.gone' (a fault of w2s " in err


@pytest.fixture
def model(tmp_path):
    """A model that gives the mean of the samples and of their squares, from a stand-in; needs no training."""
    onnx = pytest.importorskip("onnx", reason="needs pip install 'w2s-jax[export]'")
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Mul", ["signal", "signal"], ["square"]),
        helper.make_node("ReduceMean", ["signal", "axes"], ["mean"], keepdims=1),
        helper.make_node("ReduceMean", ["square", "axes"], ["power"], keepdims=1),
        helper.make_node("Concat", ["mean", "power"], ["logits"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("signal", TensorProto.FLOAT, [1, "time"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor("axes", TensorProto.INT64, [1], [1])],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(made, {"dimensions": "mean,power", "stand_in": "true"})
    onnx.save(made, tmp_path / "toy.onnx")
    return tmp_path / "toy.onnx"


@pytest.fixture
def speech(tmp_path):
    """A folder with two constant recordings, of 0.25 and 0.5, one deeper than the other, and a text."""
    (tmp_path / "speech" / "deep").mkdir(parents=True)
    soundfile.write(tmp_path / "speech" / "a.wav", np.full(32_000, 0.25), 16_000)
    soundfile.write(tmp_path / "speech" / "deep" / "b.flac", np.full(16_000, 0.5), 16_000)
    (tmp_path / "speech" / "notes.txt").write_text("no audio")
    return tmp_path / "speech"


def piped(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_the_help_has_the_commands_in_the_order_of_the_chain(w2s):
    out = w2s("--help")[1]
    chain = ("quickstart", "bank", "views", "teacher", "label", "train", "eval", "export", "predict", "bench")
    places = [out.index(f"│ {name} ") for name in chain]
    assert places == sorted(places)


def test_the_help_names_everything_that_can_be_chosen(w2s):
    from w2s_jax import config, kinds, models, teachers

    def words(command):
        return set(re.findall(r"[\w.:-]+", w2s(*command.split(), "--help")[1]))

    settings = set(config.default("wav2small")) - {"student", "fields"}
    assert settings | set(models.STUDENTS) <= {word.strip(".") for word in words("train")}
    assert set(kinds.KINDS) <= words("export")
    for command in ("label", "teacher check"):
        assert set(teachers.NAMES) <= words(command)


def test_help_is_wrapped_only_where_the_terminal_ends(w2s, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert "in bounded memory. A file that cannot be read is reported and the rest is done" in w2s("predict", "--help")[1]


def test_a_folder_stands_for_the_audio_below_it(w2s, model, speech):
    code, out, err = w2s("predict", model, speech, "--format", "jsonl", "--json")
    *rows, last = map(json.loads, out.splitlines())
    assert code == 0
    assert [(row["file"], row["power"]) for row in rows] == [(f"{speech}/a.wav", 0.0625), (f"{speech}/deep/b.flac", 0.25)]
    assert (last["files"], last["stand_in"]) == (2, True)
    assert "stand-in" in err
    (speech / "none").mkdir()
    code, _, err = w2s("predict", model, speech / "none")
    assert code == 1 and f"no audio in {speech}/none" in err


def test_windows_that_begin_almost_together_have_times_of_their_own(w2s, model, tmp_path):
    import soundfile

    soundfile.write(tmp_path / "x.wav", np.full(16_003, 0.1), 16_000)  # the last window begins 3 samples after the one before
    code, out, _ = w2s("predict", model, tmp_path / "x.wav", "--window", "0.5", "--hop", "0.25", "--format", "jsonl")
    times = [(row["start"], row["end"]) for row in map(json.loads, out.splitlines())]
    assert code == 0 and times == [(0, 0.5), (0.25, 0.75), (0.5, 1.0), (0.500188, 1.000188)]


def test_a_minus_is_the_file_on_standard_input(w2s, model, speech, monkeypatch):
    piped(monkeypatch, (speech / "deep" / "b.flac").read_bytes())
    code, out, _ = w2s("predict", model, "-", "--format", "csv")
    assert code == 0
    assert out.splitlines()[1] == "-,0.0,1.0,0.5,0.25"
    for content, message in ((b"", "standard input is empty"), (b"no audio", "cannot read standard input as audio")):
        piped(monkeypatch, content)
        code, _, err = w2s("predict", model, "-")
        assert code == 1 and message in err
    piped(monkeypatch, b"")
    assert w2s("predict", model, "-", "-")[0] == 2
    monkeypatch.setattr(sys, "stdin", None)  # w2s ... <&-
    code, _, err = w2s("predict", model, "-")
    assert code == 2 and "nothing is piped in" in err


def test_an_error_names_the_file_that_is_too_short(w2s, model, tmp_path):
    soundfile.write(tmp_path / "tiny.wav", np.zeros(30), 16_000)
    code, _, err = w2s("predict", model, tmp_path / "tiny.wav")
    assert code == 1
    assert f"{tmp_path}/tiny.wav: expected at least 64 samples at 16000 Hz, got 30" in err


@pytest.mark.parametrize("form", ["table", "json"])
def test_ctrl_c_prints_the_rows_so_far(w2s, model, speech, monkeypatch, form):
    def predict(predictor, path, window, hop):
        yield 0.0, 1.0, {"mean": 0.125, "power": 0.375}
        raise KeyboardInterrupt

    monkeypatch.setattr(predict_module, "_predict_file", predict)
    code, out, err = w2s("predict", model, speech, "--format", form)
    assert code == 130
    assert "0.125" in out and "0.375" in out
    assert err.splitlines()[-1] == "w2s: error: stopped"


@pytest.mark.parametrize(
    "option", ["--window inf", "--window nan", "--window 1e300", "--window 1 --hop nan", "--window 1 --hop inf"]
)
def test_times_that_are_no_times_are_refused(w2s, model, speech, option):
    code, _, err = w2s("predict", model, speech, *option.split())
    assert code == 2
    assert f"{option.split()[-2]} takes a number of seconds above 0" in err


def test_a_hop_may_be_longer_than_any_file(w2s, model, speech):
    code, out, _ = w2s("predict", model, speech / "a.wav", "--window", "1", "--hop", "1e300", "--format", "jsonl")
    assert code == 0
    assert json.loads(out.splitlines()[0])["end"] == 1


def test_what_escapes_is_one_line_that_asks_for_a_report(w2s, model, speech, monkeypatch):
    def fails(*_):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(predict_module, "_predict_file", fails)
    code, _, err = w2s("predict", model, speech)
    assert code == 1
    assert "w2s: error: unexpected ZeroDivisionError: division by zero (a fault of w2s " in err and "--debug" in err
    monkeypatch.setattr(sys, "argv", ["w2s", "predict", str(model), str(speech), "--debug"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_what_follows_two_minus_signs_is_no_option(w2s, model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    soundfile.write("--debug", np.full(16_000, 0.5), 16_000, format="WAV")
    code, out, _ = w2s("predict", model, "--format", "csv", "--", "--debug")
    assert code == 0
    assert out.splitlines()[1].startswith("--debug,0.0,1.0,0.5,")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_stdout_may_have_any_encoding(w2s, model, tmp_path, monkeypatch, encoding):
    name = "Ж ü 😀.wav"
    soundfile.write(tmp_path / name, np.full(16_000, 0.5), 16_000)
    for form in ("table", "csv", "json", "jsonl"):
        content = io.BytesIO()
        stdout = io.TextIOWrapper(content, encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stdout)
        assert w2s("predict", model, tmp_path / name, "--format", form)[0] == 0
        text = content.getvalue().decode(encoding)
        if form.startswith("json"):
            rows = json.loads(content.getvalue())  # which is UTF-8, or no JSON
            assert (rows[0] if form == "json" else rows)["file"] == str(tmp_path / name)
        else:
            assert "0.25" in text


def test_streams_that_are_closed_and_names_that_are_not_utf8(model, speech):
    """In processes of their own; a file that is opened must not become the closed stdout."""
    stray = os.fsencode(speech) + b"/\xff.wav"
    shutil.copy(speech / "a.wav", stray)
    command = [sys.executable, "-m", "w2s_jax.cli", "predict", str(model), stray, "--format", "json"]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert os.fsencode(json.loads(done.stdout)[0]["file"].replace("\\udcff", "\udcff")) == stray
    closed = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&- <&-', "sh", *command], capture_output=True)
    assert closed.returncode == 0
    if Path("/dev/full").exists():
        full = subprocess.run(["sh", "-c", 'exec "$@" > /dev/full', "sh", *command], capture_output=True, text=True)
        assert full.returncode == 1
        assert full.stderr.splitlines()[-1].startswith("w2s: error: ")
        assert "Traceback" not in full.stderr and "Exception ignored" not in full.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_only_commands_that_gain_start_again_with_huge_pages(monkeypatch, tmp_path):
    """Once their options are read, in a process of their own, unless GLIBC_TUNABLES is set."""
    started = []
    monkeypatch.setattr(os, "execv", lambda *_: started.append((list(sys.argv), os.environ["GLIBC_TUNABLES"])))
    data = [f"--{name}={tmp_path}" for name in ("bank", "views", "labels")]
    training = ["w2s", "--debug", "train", "nothing", *data, f"--workdir={tmp_path}"]

    def run(words, call, **environ):
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(os, "environ", environ)
        with pytest.raises((SystemExit, UsageError)):
            call()

    run(training, cli.main)  # a process that runs something else as well
    run(training, cli.entry, GLIBC_TUNABLES="")
    run(["w2s", "train", "nothing"], cli.entry)  # wrong usage
    run(["w2s", "predict", str(tmp_path), "train"], cli.entry)
    run(["w2s", "eval", "label", f"--bank={tmp_path}"], cli.entry)
    assert started == []
    run(training, cli.entry)
    assert started == [(training, "glibc.malloc.hugetlb=1")]


def test_the_help_names_what_starts_again_with_huge_pages(w2s):
    assert [command for command in COMMANDS if "GLIBC_TUNABLES" in w2s(*command.split(), "--help")[1]] == [
        "teacher check", "label", "train", "quickstart"
    ]  # fmt: skip


def test_the_quickstart_ends_with_commands_that_work(tmp_path, monkeypatch):
    from rich.console import Console

    programs = tmp_path / "a venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "w2s").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (programs / "w2s").chmod(0o755)
    monkeypatch.setattr(install.sys, "executable", str(programs / "python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    text = io.StringIO()
    quickstart._print_next(Console(file=text, width=40), Path("quick start/model"), Path("speech/en+f2/[0].wav"))
    _, _, first, second, third, *_ = text.getvalue().splitlines()
    words = subprocess.run(first, shell=True, capture_output=True, text=True, check=True).stdout.split("\n")
    assert words[:5] == ["predict", "quick start/model", "speech/en+f2/[0].wav", "--window", "2"]
    assert "YOUR.wav" in second and "bank build" in third


def test_a_python_that_leaves_docstrings_out(model, speech):
    """Help texts are docstrings."""
    command = [sys.executable, "-m", "w2s_jax.cli", "predict", str(model), str(speech / "a.wav"), "--format", "json"]
    stripped = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONOPTIMIZE": "2"})
    assert stripped.returncode == 0, stripped.stderr
    assert stripped.stdout == subprocess.run(command, capture_output=True, text=True).stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_refuses_another_python_in_one_sentence(tmp_path):
    old = tmp_path / "python3.10"
    old.write_text("#!/bin/sh\necho 3.10\n")
    old.chmod(0o755)
    clone = Path(__file__).parents[1]
    command = ["make", "-C", clone, "lint", f"PYTHON={old}", f"VENV={tmp_path}/venv"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"w2s_jax needs Python 3.11 to 3.13; {old} is 3.10. Choose another one: make lint PYTHON=python3.1" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_an_out_that_is_not_utf8_is_refused_in_one_line(w2s, speech, tmp_path):
    code, _, err = w2s("bank", "build", speech, "--out", os.fsdecode(os.fsencode(tmp_path) + b"/b\xff"))
    assert code == 2
    assert "/b\\udcff" in err and "is not valid UTF-8" in err.splitlines()[-1]


def test_a_bank_with_other_options_is_refused_without_force(w2s, corpus, tmp_path):
    build = ["bank", "build", corpus, "--out", tmp_path / "bank", "--json"]
    first = json.loads(w2s(*build)[1].splitlines()[-1])
    assert json.loads(w2s(*build)[1].splitlines()[-1]) == first  # the same again is kept
    code, _, err = w2s(*build, "--seed", 7)
    assert code == 1
    assert "seed: 0 there, 7 now" in err
    assert "--force" in err
    assert w2s(*build, "--seed", 7, "--force")[0] == 0
    assert w2s(*build)[0] == 1


def test_help_and_predict_import_nothing_heavy(model, speech):
    heavy = {"flax", "jax", "librosa", "matplotlib", "optax", "pyarrow", "scipy", "tensorflow", "torch", "transformers"}
    for arguments in (["--help"], ["train", "--help"], ["predict", str(model), str(speech / "a.wav")]):
        code = f"""
import sys
sys.argv = ["w2s", *{arguments}]
from w2s_jax.cli import main
try:
    main()
finally:
    print(*sys.modules)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        imported = set(done.stdout.splitlines()[-1].split())
        assert "w2s_jax.cli.train" in imported and not imported & (heavy | {"w2s_jax.train", "w2s_jax.bench"})


@pytest.fixture
def clock(monkeypatch):
    """A clock for progress.py that stands at ``clock.now``; stderr is no terminal."""
    clock = SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_progress_is_a_line_every_ten_seconds(clock, capsys):
    def report(seconds, *counts, **figures):
        clock.now = 1000 + seconds
        reporter.report(*counts, **figures)
        return capsys.readouterr().err

    with progress.Reporter("decode", "clips") as reporter:
        assert report(0, 2, 10, minutes_decoded=0.5) == "decode: 2/10 clips, minutes decoded 0.5, 0 s\n"
        assert report(9, 4, 10) == ""
        assert report(10, 6, 10) == "decode: 6/10 clips, minutes decoded 0.5, 10 s, 10 s left\n"  # 4 clips in 10 s
        assert report(11, 10, 10, minutes_decoded=2) == "decode: 10/10 clips, minutes decoded 2, 11 s\n"
        assert report(30, 10, 10) == ""  # nothing new
        assert reporter.initial == 2
        reporter.message("[careful] :smile:")
    assert capsys.readouterr().err == "[careful] :smile:\n"


@pytest.mark.parametrize(("seconds", "lines"), [(9, []), (11, ["predict: 2/2 files, 11 s"])])
def test_brief_progress_says_nothing_of_short_work(clock, capsys, seconds, lines):
    with progress.Reporter("predict", "files", brief=True) as reporter:
        reporter.report(1, 2)
        clock.now += seconds
        reporter.report(2, 2)
    assert capsys.readouterr().err.splitlines() == lines


def test_on_a_terminal_messages_stand_above_the_bar(monkeypatch):
    from rich.console import Console

    terminal = Console(file=io.StringIO(), force_terminal=True, width=100, markup=False)
    monkeypatch.setattr(progress, "err", terminal)
    with progress.Reporter("train", "steps") as reporter:
        reporter.report(3, 7, loss=0.25)
        reporter.message("a word")
    shown = terminal.file.getvalue()
    assert shown.index("a word") < shown.rindex("3/7") and "loss 0.25" in shown
    quiet = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(progress, "err", quiet)
    with progress.Reporter("predict", "files", quiet=True) as reporter:
        reporter.report(1, 2)
    assert quiet.file.getvalue() == ""
