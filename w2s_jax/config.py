"""Experiments: Python files with ``get_config(variant)``, and the default configuration that they change."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

try:
    from ml_collections import ConfigDict
except ImportError as error:
    from w2s_jax.errors import missing_extra

    raise missing_extra("ml_collections", "train") from error

from w2s_jax.errors import UsageError


def default(student: str = "wav2small") -> ConfigDict:
    """The training configuration that experiments start from."""
    return ConfigDict(
        {
            "student": student,
            "fields": {},  # of the student's module, for example {"channels": 16}
            "pretrained": "",  # weights to start from: a student or run directory, or a .safetensors file (convert.start)
            "seed": 0,
            "batch_size": 16,  # views in a step, those of all devices together
            "accumulate": 1,  # parts of a batch that are computed one after the other, to save memory
            "dtype": "float32",  # "bfloat16": of the student's arithmetic; weights, moments and log-mel stay float32
            "form": "auto",  # of Wav2Small's convolutions: native, direct or blocks; auto: the backend's best
            "steps": 2000,
            "learning_rate": 3e-3,  # peak, after a linear warm-up, before a cosine decay to 0
            "warmup": 0.05,  # share of the steps
            "weight_decay": 1e-4,
            "l2": 0.1,  # weight of the squared error beside the CCC loss, on standardised labels
            "ema": 0.98,  # decay per step of the averaged weights, which are evaluated and saved; 0: the last weights
            "calibrate": True,  # scale predictions to the labels' mean and deviation on the validation views, for CCC
            "crop": 1.0,  # share of each view that a training step is given; below 1 it regularises, and steps are cheaper
            "jitter": 0.0,  # deviation of level (natural logarithm) and offset of normalised waveforms: for running streams
            "clip_norm": 1.0,  # largest global norm of a gradient
            "eval_every": 200,  # steps between evaluations, each with a checkpoint
            "log_every": 10,  # steps between lines in metrics.jsonl
            "scan_steps": 0,  # steps in one dispatch; 0: the measured best of the backend
            "parallel": "jit",  # jit(shard_map(step)), or "pmap"
            "data_shards": 0,  # sets of clips that each give an equal part of a batch; 0: one per device
            "bank_placement": "auto",  # "device", "host", or by memory
            "bank_gib": 0.0,  # largest part of a bank to keep on a device; 0: half of the device's memory
            "workers": 0,  # processes that read a bank on the host; 0: threads
        }
    )


def load(experiment: str, overrides: list[str] | tuple[str, ...] = ()) -> ConfigDict:
    """The configuration of an experiment.

    Args:
        experiment: ``path/to/file.py``, ``path/to/file.py:variant``, or the name of a student for the defaults.
        overrides: ``key=value`` strings; values are Python literals, nested keys are ``fields.channels``.

    Raises:
        UsageError: no such experiment, variant or key, or a value of another type.
    """
    name, _, variant = experiment.partition(":")
    if not name.endswith(".py"):
        config = default(experiment)  # models.build knows the students and refuses the rest
    elif Path(name).is_file():
        spec = importlib.util.spec_from_file_location(f"w2s_experiment_{Path(name).stem}", name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UsageError(f"{name} is no experiment: it has no get_config(variant)")
        try:
            config = module.get_config(variant)
        except KeyError as error:
            known = ", ".join(getattr(module, "VARIANTS", {})) or "none"
            raise UsageError(f"{name} has no variant {variant!r}; it has: {known}") from error
    else:
        raise UsageError(f"no experiment at {name}: no such file")
    for override in overrides:
        _override(config, override)
    return config


def _override(config: ConfigDict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise UsageError(f"--set takes key=value, got {override!r}")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    *parents, leaf = key.split(".")
    part = config
    try:
        for parent in parents:
            part = part[parent]
        if parents[:1] == ["fields"]:  # a student's fields are open: build() checks them
            with part.unlocked():
                part[leaf] = value
        else:
            part[leaf] = part.get_type(leaf)(value) if isinstance(value, int) and part.get_type(leaf) is float else value
    except (KeyError, AttributeError) as error:
        raise UsageError(f"there is no setting {key!r}; there are: {', '.join(sorted(config))}") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"--set {override}: expected {type(part[leaf]).__name__}, got {value!r}") from error
