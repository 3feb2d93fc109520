"""Audio, banks and teachers that the tests share; all made here, none downloaded."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import numpy as np
import pytest

RATE = 16_000

# many tests, and the commands that they start, compile the same steps; set before anything imports jax
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# a first call compiles, and test machines are busy: how long an example takes says nothing
hypothesis.settings.register_profile("w2s", deadline=None)
hypothesis.settings.load_profile("w2s")


def voice(seconds: float, seed: int, pitch: float = 120.0) -> np.ndarray:
    """Something like speech, float32 [T]: a harmonic tone with gliding pitch, syllables, pauses and noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * RATE)) / RATE
    f0 = pitch * np.exp2(0.3 * np.sin(2 * np.pi * 0.7 * t + rng.uniform(0, 6)))
    phase = 2 * np.pi * np.cumsum(f0) / RATE
    tone = sum(np.sin(k * phase) * np.exp(-k / rng.uniform(3, 9)) for k in range(1, 20))
    syllables = np.clip(np.sin(2 * np.pi * rng.uniform(2, 6) * t + rng.uniform(0, 6)) + 0.4, 0, None)
    wave = tone * syllables + 0.02 * rng.standard_normal(len(t))
    return (0.3 * wave / np.abs(wave).max()).astype(np.float32)


#: Settings of a training of seconds.
TINY = ["fields.channels=2", "steps=12", "batch_size=6", "eval_every=4", "log_every=2"]


def flipped(path, count, seed=0):
    """Write a file with one random bit turned over, ``count`` times, and then as it was."""
    whole, random = path.read_bytes(), np.random.default_rng(seed)
    for bit in random.integers(len(whole) * 8, size=count):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        yield int(bit)
    path.write_bytes(whole)


@pytest.fixture
def compiled_at_once():
    """What is run once need not be fast: XLA compiles deep networks in a fraction of the time."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def limited():
    """A function that makes files end at so many bytes, as a full disk would; "File too large" is then the system's reason."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """24 clips of 6 speakers, 0.7 to 3 s, with a CSV that gives ratings and splits."""
    import soundfile

    root = tmp_path_factory.mktemp("corpus")
    lines = ["file,start,end,split,speaker,arousal,dominance,valence"]
    for number in range(24):
        speaker = number % 6
        wave = voice(0.7 + 0.1 * number, number, 90 + 25 * speaker)
        soundfile.write(root / f"{number:02d}.wav", wave, RATE, subtype="PCM_16")
        split = ("train", "train", "train", "train", "validation", "test")[speaker]
        lines.append(f"{number:02d}.wav,,,{split},s{speaker},{0.1 + 0.03 * number:.2f},0.5,{0.9 - 0.02 * number:.2f}")
    (root / "corpus.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="session")
def bank(corpus, tmp_path_factory):
    from w2s_jax import bank, corpora

    out = tmp_path_factory.mktemp("bank") / "bank"
    bank.build(corpora.read("csv", corpus / "corpus.csv"), out, corpus="csv")
    return bank.Bank(out)


@pytest.fixture(scope="session")
def views(bank):
    from w2s_jax import views

    return views.draw(bank, per_clip=4, eval_per_clip=2, seconds=(0.4, 0.8), mix=0.5, seed=3)


@pytest.fixture(scope="session")
def labels_path(bank, views, tmp_path_factory) -> Path:
    """The acoustic teacher's labels of ``views``."""
    from w2s_jax import teachers
    from w2s_jax.labelling import label

    out = tmp_path_factory.mktemp("labels") / "labels"
    label(bank, views, teachers.load("acoustic"), out)
    return out


@pytest.fixture(scope="session")
def labels(views, labels_path):
    from w2s_jax.labels import Labels

    return Labels.read(labels_path, views)


@pytest.fixture(scope="session")
def toy_teacher(tmp_path_factory) -> Path:
    """An ONNX model [batch, time] → [batch, 2]: mean absolute value, and mean square, of the waveform."""
    return save_toy_teacher(tmp_path_factory.mktemp("teacher") / "toy.onnx")


def save_toy_teacher(path: Path, shape=("batch", "time"), dimensions: str | None = "loudness,power") -> Path:
    import onnx
    from onnx import TensorProto, helper

    axis = len(shape) - 1
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [axis])
    flat = helper.make_tensor("flat", TensorProto.INT64, [2], [-1, 1])
    nodes = [
        helper.make_node("Abs", ["x"], ["abs"]),
        helper.make_node("Mul", ["x", "x"], ["square"]),
        helper.make_node("ReduceMean", ["abs", "axes"], ["m1"], keepdims=1),
        helper.make_node("ReduceMean", ["square", "axes"], ["m2"], keepdims=1),
        helper.make_node("Reshape", ["m1", "flat"], ["r1"]),
        helper.make_node("Reshape", ["m2", "flat"], ["r2"]),
        helper.make_node("Concat", ["r1", "r2"], ["y"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 2])],
        [axes, flat],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    if dimensions:
        helper.set_model_props(model, {"dimensions": dimensions})
    onnx.save(model, path)
    return path


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Path:
    """A directory with the golden's small teachers as published: wav2vec2/ and wavlm/, each config.json and safetensors."""
    from safetensors.numpy import save_file

    root = tmp_path_factory.mktemp("checkpoints")
    golden = np.load(Path(__file__).parent / "golden" / "teachers.npz")
    for kind in ("wav2vec2", "wavlm"):
        (root / kind).mkdir()
        (root / kind / "config.json").write_text(str(golden[f"config:{kind}"]))
        state = {key.removeprefix(f"{kind}:"): golden[key] for key in golden.files if key.startswith(f"{kind}:")}
        save_file(state, root / kind / "model.safetensors")
    return root


@pytest.fixture(scope="session")
def run(bank, views, labels, tmp_path_factory):
    """An unbroken run and its summary."""
    from w2s_jax import config, train

    workdir = tmp_path_factory.mktemp("run")
    return workdir, train.train(config.load("wav2small", TINY), bank, views, labels, workdir)
