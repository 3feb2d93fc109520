"""How many views a second a teacher labels here, beside the same Transformer in PyTorch.

    python experiments/teacher_speed.py wav2vec2|wavlm [--batch 4] [--seconds 5] [--dtype float32|bfloat16] [--repeats 7]

Needs torch. The published size with random weights: both sides read one checkpoint, their hidden states are compared, and they
run in turn in this process, on all of this machine's cores or on its GPU; the ratio of the medians is printed, and the fraction
of the matrix peak where ``--peak`` gives it (TFLOP/s; an H100's bfloat16 has 989, its float32 67). PyTorch attends with SDPA
where transformers has that (wav2vec2); its WavLM has only torch's own multi-head attention. The heads run on our side only.
Results: experiments/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from w2s_jax import SAMPLING_RATE, teachers

#: What both models have in common; 12 layers with biased convolutions make wav2vec2, 24 without make WavLM.
GEOMETRY = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_dim": [512] * 7,
}


def trunk(name: str) -> torch.nn.Module:
    """transformers' torch module at the published size, with random weights."""
    torch.manual_seed(0)
    if name == "wav2vec2":
        config = transformers.Wav2Vec2Config(**GEOMETRY, num_hidden_layers=12, conv_bias=True)
        return transformers.Wav2Vec2Model._from_config(config, attn_implementation="sdpa").eval()
    return transformers.WavLMModel(transformers.WavLMConfig(**GEOMETRY, num_hidden_layers=24)).eval()


def save(name: str, model: torch.nn.Module, directory: Path) -> None:
    """The trunk and a random head in the published layout."""
    prefix = {"wav2vec2": "wav2vec2.", "wavlm": "ssl_model."}[name]
    size = model.config.hidden_size
    head = {"classifier.dense": (size, size), "classifier.out_proj": (3, size)}
    settings = {**model.config.to_dict(), "vocab_size": None}
    if name == "wavlm":
        head = {"pool_model.sap_linear": (size, size), "ser_model.fc.0.0": (size, 2 * size), "ser_model.out.0": (3, size)}
        settings = {"mean": -8.278621631819787e-05, "std": 0.08485510250851999}
    state = {prefix + key: value.contiguous() for key, value in model.state_dict().items()}
    for key, shape in head.items():
        state |= {f"{key}.weight": 0.05 * torch.randn(shape), f"{key}.bias": torch.zeros(shape[0])}
    if name == "wavlm":
        state |= {"ser_model.fc.0.1.weight": torch.ones(size), "ser_model.fc.0.1.bias": torch.zeros(size)}
        state["pool_model.attention"] = torch.randn(size, 1)
    save_file(state, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(settings))


def normalise(name: str, waves: np.ndarray) -> np.ndarray:
    """Normalise float32 [B, T] as the torch trunk expects it."""
    if name == "wavlm":
        return ((waves + 8.278621631819787e-05) / (0.08485510250851999 + 1e-6)).astype(np.float32)
    return ((waves - waves.mean(1, keepdims=True)) / np.sqrt(waves.var(1, keepdims=True) + 1e-7)).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", choices=["wav2vec2", "wavlm"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peak", type=float, help="TFLOP/s of the accelerator's matrix units in this dtype")
    arguments = parser.parse_args()
    name, gpu = arguments.teacher, torch.cuda.is_available()

    with tempfile.TemporaryDirectory() as directory:
        torch_model = trunk(name)
        save(name, torch_model, Path(directory))
        teacher = teachers.load(name, directory, dtype=arguments.dtype, revision="random")
    torch_model = torch_model.to("cuda" if gpu else "cpu", getattr(torch, arguments.dtype))
    torch.set_num_threads(os.cpu_count())
    samples = round(arguments.seconds * SAMPLING_RATE)
    waves = 0.1 * np.random.default_rng(0).standard_normal((arguments.batch, samples)).astype(np.float32)
    inputs = torch.from_numpy(normalise(name, waves)).to(torch_model.device, torch_model.dtype)

    @torch.inference_mode()
    def theirs():
        hidden = torch_model(inputs).last_hidden_state
        if gpu:
            torch.cuda.synchronize()
        return hidden

    def ours():
        return jax.block_until_ready(teacher(waves))

    hidden = jax.jit(lambda params, x: teacher.module.apply({"params": params}, x, method="hidden"))(teacher.params, waves)
    difference = float(np.abs(np.asarray(hidden, np.float32) - theirs().float().cpu().numpy()).max())
    times = {"ours": [], "torch": []}
    ours()
    for _ in range(arguments.repeats):
        for who, run in (("ours", ours), ("torch", theirs)):
            began = time.perf_counter()
            run()
            times[who].append(time.perf_counter() - began)
    seconds = {who: float(np.median(values)) for who, values in times.items()}
    (compiled,) = (run for key, run in teacher._compiled.items() if key[1] == samples)
    flops = compiled.cost_analysis()["flops"]
    result = {
        "teacher": name,
        "batch": arguments.batch,
        "seconds": arguments.seconds,
        "dtype": arguments.dtype,
        "device": jax.devices()[0].device_kind,
        "views_per_second": {who: round(arguments.batch / value, 3) for who, value in seconds.items()},
        "ratio": round(seconds["torch"] / seconds["ours"], 3),
        "tflops": round(flops / seconds["ours"] / 1e12, 3),
        "fraction_of_peak": arguments.peak and round(flops / seconds["ours"] / 1e12 / arguments.peak, 3),
        "hidden_difference": difference,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
