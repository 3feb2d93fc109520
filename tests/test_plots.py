"""Pictures of runs, whatever their log holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w2s_jax.errors import UsageError
from w2s_jax.plots import plot_run


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
    width, height = size_of(plot_run(tmp_path))
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
        size_of(plot_run(workdir))
    except UsageError as error:
        assert "no whole line" in str(error)


def test_no_log_no_picture(tmp_path):
    with pytest.raises(UsageError, match=r"no metrics\.jsonl"):
        plot_run(tmp_path)
