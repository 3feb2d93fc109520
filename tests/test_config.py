"""Experiments as Python files, and their settings."""

from __future__ import annotations

import pytest

from w2s_jax import config
from w2s_jax.errors import UsageError


def test_experiments_are_python_files(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from w2s_jax.config import default\nVARIANTS = {'': {}, 'long': {'steps': 9}}\n"
        "def get_config(variant=''):\n    c = default()\n    c.update(VARIANTS[variant])\n    return c\n"
    )
    assert config.load(f"{path}:long").steps == 9
    assert config.load(str(path), ["learning_rate=1"]).learning_rate == 1.0
    with pytest.raises(UsageError, match="it has: , long"):
        config.load(f"{path}:short")
    with pytest.raises(UsageError, match="no such file"):
        config.load(str(tmp_path / "none.py"))
