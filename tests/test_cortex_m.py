"""The C files on emulated microcontrollers (experiments/cortex_m.py), and what they take there."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import voice
from test_plan import drawn

from w2s_jax import models
from w2s_jax.errors import UsageError
from w2s_jax.export.build import write
from w2s_jax.export.c import generate
from w2s_jax.export.plan import fold

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import cortex_m

FACTS = {"dimensions": "arousal,dominance,valence", "student": "wav2small"}
SAMPLES = np.rint(voice(1.0, 1) * 32767).astype(np.int16)


@pytest.mark.slow
def test_boards_compute_what_flax_does(tmp_path):
    for tool in ("arm-none-eabi-gcc", "qemu-system-arm", "cc"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    student = models.build("wav2small")
    variables = drawn(student)
    write(generate.generate(fold(student, variables), FACTS), tmp_path / "model_c")
    results = cortex_m.run(tmp_path / "model_c", SAMPLES)
    expected = student.apply(variables, SAMPLES[None].astype(np.float32) / 32768)[0]
    assert set(results) == {"host", *cortex_m.BOARDS}
    for name, result in results.items():
        np.testing.assert_allclose(result["values"]["whole"], expected, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(result["values"]["stream"], results["host"]["values"]["stream"], atol=1e-4, err_msg=name)
        print(name, {key: value for key, value in result.items() if key != "values"})
    for name in cortex_m.BOARDS:
        assert 300_000 < results[name]["flash"] < 450_000
        assert results[name]["stream_ram"] < 65_536 and results[name]["whole_ram"] < 131_072
        for key in ("whole_instructions", "stream_instructions"):
            assert 78e6 < results[name][key] < 312e6  # 1 to 4 a multiply-accumulate of the plain network


def test_other_directories_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no C files at .*w2s export --kind c"):
        cortex_m.run(tmp_path, SAMPLES)
