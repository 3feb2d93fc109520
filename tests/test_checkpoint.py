"""Student directories that are not what their config.json says."""

from __future__ import annotations

import json

import pytest

from w2s_jax import checkpoint
from w2s_jax.errors import MismatchError


def test_a_student_of_another_shape_is_refused(run, tmp_path):
    source = run[0] / "student"
    about = json.loads((source / "config.json").read_text())
    about["fields"]["channels"] = 3
    del about["checksum"]
    (tmp_path / "config.json").write_text(json.dumps(about))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(MismatchError, match=r"params/vgg7/l1/conv/kernel: \(3, 3, 1, 2\), expected \(3, 3, 1, 3\)"):
        checkpoint.load_student(tmp_path)
