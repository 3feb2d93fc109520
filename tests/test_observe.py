"""What a run shows: its log after a kill, its picture, limits of machines, memory, traces."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w2s_jax import models, observe
from w2s_jax.errors import UsageError, W2SError


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_log_has_every_step_once(tmp_path):
    with observe.Log(tmp_path, 0) as log:
        for step in (2, 4, 6):
            log.write("train", step, {"loss": 1 / step, "learning_rate": 1e-3})
    unbroken = (tmp_path / "metrics.jsonl").read_text()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "kind": "train"}\n[1]\n{"kind": "train"}\n{"step": 9, "ki')  # a kill, and a stray hand
    with pytest.warns(UserWarning, match=r"metrics\.jsonl is damaged: 2 lines"), observe.Log(tmp_path, 4) as log:
        log.write("train", 6, {"loss": 1 / 6, "learning_rate": 1e-3})
    assert (tmp_path / "metrics.jsonl").read_text() == unbroken
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_the_events_are_what_tensorboard_reads(tmp_path):
    """By TensorFlow's own reader of records, checksums included, and its protocol buffers."""
    tf = pytest.importorskip("tensorflow")
    from tensorflow.core.util.event_pb2 import Event

    with pytest.warns(UserWarning, match="has no line of the 3 steps"), observe.Log(tmp_path, 3) as log:
        log.write("train", 4, {"loss": 0.25, "ccc/a": 0.5})
    (path,) = (tmp_path / "tensorboard").glob("events*")
    events = [Event.FromString(record.numpy()) for record in tf.data.TFRecordDataset(str(path))]
    found = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    assert found == [(4, "train/loss", 0.25), (4, "train/ccc/a", 0.5)]
    assert events[0].file_version == "brain.Event:2"
    assert [event.step for event in events if event.session_log.status == 1] == [4]  # START: hides what a kill left


def test_a_full_disk_is_told_with_the_file(tmp_path, limited):
    with observe.Log(tmp_path, 0) as log:
        log.write("train", 1, {"loss": 1.0})
        limited(100)
        with pytest.raises(W2SError, match=r"cannot write .*(metrics\.jsonl|tensorboard): File too large"):
            for step in range(2, 10):
                log.write("train", step, {"loss": 1.0})
    assert observe._lines(tmp_path / "metrics.jsonl")[0][0]["step"] == 1


def test_a_log_of_another_process_writes_nothing(tmp_path):
    with observe.Log(tmp_path, 0, active=False) as log:
        log.write("train", 1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def a_run(steps: int = 60) -> list[dict]:
    train = [
        {"step": s, "kind": "train", "loss": 2 / s, "ccc/a": 1 - 2 / s, "gradient_norm": 9 / s, "learning_rate": 1e-3 / s,
         "clips_per_second": 40.0, "arithmetic_share": 0.3, "waiting_share": 0.0}
        for s in range(2, steps + 1)
    ]  # fmt: skip
    return train + [{"step": s, "kind": "validation", "ccc/a": 1 - 3 / s, "ccc/mean": 1 - 3 / s} for s in (20, 40)]


def size_of(png: Path) -> tuple[int, int]:
    """Width and height, from the header (PNG specification, 11.2.2)."""
    header = png.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


@pytest.mark.parametrize("log", [a_run(), a_run()[:1], a_run()[-1:], a_run() + a_run(30)])
def test_a_picture_of_a_run_of_one_line_and_of_one_without_validation(log, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    width, height = size_of(observe.plot(tmp_path))
    assert width > 1000
    assert height > 500
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "training.png"]


numbers = st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=3))
keys = st.sampled_from(["loss", "ccc/$a_", "ccc/mean", "gradient_norm", "learning_rate", "clips_per_second", "waiting_share"])
odd = st.fixed_dictionaries(
    {"step": st.one_of(st.integers(0, 100), numbers), "kind": st.sampled_from(["train", "validation", 3])},
).flatmap(lambda line: st.dictionaries(keys, numbers).map(lambda figures: {**figures, **line}))
texts = st.one_of(odd.map(json.dumps), st.recursive(numbers, st.lists).map(json.dumps), st.text())


@given(st.lists(texts, max_size=8), st.integers(0, 200))
@settings(max_examples=5)
def test_a_picture_of_whatever_a_log_holds(tmp_path_factory, texts, cut):
    workdir = tmp_path_factory.mktemp("odd")
    whole = "\n".join([*texts, json.dumps(a_run()[0])]).encode("utf-8", "surrogatepass")
    (workdir / "metrics.jsonl").write_bytes(whole[: len(whole) - cut])
    try:
        size_of(observe.plot(workdir))
    except UsageError as error:
        assert "no whole line" in str(error)


def test_no_log_no_picture(tmp_path):
    with pytest.raises(UsageError, match=r"no metrics\.jsonl"):
        observe.plot(tmp_path)


def test_arithmetic_of_a_step():
    # 0.391 GMAC forward (experiments/README.md, "What students cost"), three passes, 2 FLOP each
    assert observe.flops(models.build("wav2small"), 80_000) == 2 * 3 * 390_967_041


# NVIDIA's and Google's data sheets: dense TFLOP/s, TF32 or float32, bfloat16
@pytest.mark.parametrize(
    ("kind", "float32", "bfloat16"),
    [
        ("NVIDIA H100 80GB HBM3", 494.5, 989),
        ("NVIDIA H100 PCIe", 378, 756),
        ("NVIDIA A100-SXM4-80GB", 156, 312),
        ("Tesla V100-SXM2-16GB", 15.7, None),
        ("NVIDIA L4", 60, 121),
        ("NVIDIA L40S", None, None),
        ("NVIDIA GeForce RTX 4090", 82.6, 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("TPU v4", 275, 275),
        ("TPU v5 lite", 197, 197),
        ("TPU v5", 459, 459),
        ("TPU v5p", 459, 459),
        ("TPU v6 lite", 918, 918),
        ("TPU v99", None, None),
    ],
)
def test_limits_of_accelerators(kind, float32, bfloat16):
    device = SimpleNamespace(platform="tpu" if kind.startswith("TPU") else "gpu", device_kind=kind)
    for dtype, expected in (("float32", float32), ("bfloat16", bfloat16)):
        found = observe.peak_flops(device, dtype)
        assert found == (None if expected is None else pytest.approx(expected * 1e12)), dtype


def test_the_limit_of_this_cpu():
    # one slow core has 1e9 FLOP/s, the largest server some 1e14
    assert 1e9 < observe.peak_flops(jax.devices("cpu")[0]) < 1e15
    with pytest.raises(UsageError, match="int8"):
        observe.peak_flops(jax.devices("cpu")[0], "int8")


def test_memory_of_this_process_and_of_the_fullest_device():
    used = observe.memory(jax.devices("cpu"))
    assert 1e6 < used["in_use"] <= used["peak"] < used["limit"]
    stats = [{"bytes_in_use": 3, "peak_bytes_in_use": 5, "bytes_limit": 9}, {"bytes_in_use": 4, "bytes_limit": 9}, None]
    devices = [SimpleNamespace(platform="gpu", memory_stats=lambda told=told: told) for told in stats]
    assert observe.memory(devices) == {"in_use": 4, "peak": 5, "limit": 9}
    assert observe.memory(devices[2:]) == {}


def test_a_trace_can_be_opened(tmp_path):
    said = []
    with observe.trace(tmp_path / "profile", said.append):
        jnp.ones(3).sum().block_until_ready()
    (line,) = said
    path = Path(line.split("open ")[1].split(" at ")[0])
    assert path.stat().st_size > 0
    assert str(tmp_path / "profile") in line.split("--logdir ")[1]
    hook = sys.modules.get("tensorflow.python.profiler.trace")
    assert hook is None or callable(hook.enabled)  # or no model could be exported any more in this process
