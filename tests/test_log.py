"""The log of a run after a kill and on a full disk, and traces."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from w2s_jax.errors import W2SError
from w2s_jax.log import Log, read_log, trace


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_log_has_every_step_once(tmp_path):
    with Log(tmp_path, 0) as log:
        for step in (2, 4, 6):
            log.write("train", step, {"loss": 1 / step, "learning_rate": 1e-3})
    unbroken = (tmp_path / "metrics.jsonl").read_text()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "kind": "train"}\n[1]\n{"kind": "train"}\n{"step": 9, "ki')  # a kill, and a stray hand
    with pytest.warns(UserWarning, match=r"metrics\.jsonl is damaged: 2 lines"), Log(tmp_path, 4) as log:
        log.write("train", 6, {"loss": 1 / 6, "learning_rate": 1e-3})
    assert (tmp_path / "metrics.jsonl").read_text() == unbroken
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_the_events_are_what_tensorboard_reads(tmp_path):
    """By TensorFlow's own reader of records, checksums included, and its protocol buffers."""
    tf = pytest.importorskip("tensorflow")
    from tensorflow.core.util.event_pb2 import Event

    with pytest.warns(UserWarning, match="has no line of the 3 steps"), Log(tmp_path, 3) as log:
        log.write("train", 4, {"loss": 0.25, "ccc/a": 0.5})
    (path,) = (tmp_path / "tensorboard").glob("events*")
    events = [Event.FromString(record.numpy()) for record in tf.data.TFRecordDataset(str(path))]
    found = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    assert found == [(4, "train/loss", 0.25), (4, "train/ccc/a", 0.5)]
    assert events[0].file_version == "brain.Event:2"
    assert [event.step for event in events if event.session_log.status == 1] == [4]  # START: hides what a kill left


def test_a_full_disk_is_told_with_the_file(tmp_path, limited):
    with Log(tmp_path, 0) as log:
        log.write("train", 1, {"loss": 1.0})
        limited(100)
        with pytest.raises(W2SError, match=r"cannot write .*(metrics\.jsonl|tensorboard): File too large"):
            for step in range(2, 10):
                log.write("train", step, {"loss": 1.0})
    assert read_log(tmp_path / "metrics.jsonl")[0][0]["step"] == 1


def test_a_log_of_another_process_writes_nothing(tmp_path):
    with Log(tmp_path, 0, active=False) as log:
        log.write("train", 1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_a_trace_can_be_opened(tmp_path):
    said = []
    with trace(tmp_path / "profile", said.append):
        jnp.ones(3).sum().block_until_ready()
    (line,) = said
    path = Path(line.split("open ")[1].split(" at ")[0])
    assert path.stat().st_size > 0
    assert str(tmp_path / "profile") in line.split("--logdir ")[1]
    hook = sys.modules.get("tensorflow.python.profiler.trace")
    assert hook is None or callable(hook.enabled)  # or no model could be exported any more in this process
