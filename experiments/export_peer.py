"""The reference model for exports: Wav2Small in PyTorch with the weights of a trained student, as torch.onnx exports it.

The PyTorch network is somebody else's file with a class ``Wav2Small`` (front end ``logmel``, blocks ``vgg``, Dense ``lin``,
``sof``, ``adv``); this copies a student's weights into it, checks that both say the same, and exports it for 5 s of audio:

    python experiments/export_peer.py torch_wav2small.py runs/czech/run peer.onnx
    w2s export runs/czech/run --out model --calibration runs/czech/bank --kind all --against peer.onnx
    w2s bench --model model --against peer.onnx --runs 60

Needs torch. Results: experiments/README.md, "Exports".
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from pathlib import Path

import numpy as np

from w2s_jax import checkpoint

SAMPLES = 80_000


def peer(network: Path, student: Path, out: Path) -> float:
    """Write the export; the largest difference between both networks' outputs on noise."""
    import torch

    spec = importlib.util.spec_from_file_location("peer", network)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ours, variables, _ = checkpoint.load_student(student)
    params, stats = variables["params"], variables["batch_stats"]["vgg7"]
    theirs = module.Wav2Small().eval()
    state = theirs.state_dict()

    def put(name: str, value: np.ndarray) -> None:
        state[name].copy_(torch.from_numpy(np.array(value)))

    blocks = [at for at, part in enumerate(theirs.vgg) if isinstance(part, torch.nn.Sequential)]
    for layer, at in enumerate(blocks, start=1):
        block, running = params["vgg7"][f"l{layer}"], stats[f"l{layer}"]["norm"]
        put(f"vgg.{at}.0.weight", np.transpose(block["conv"]["kernel"], (3, 2, 0, 1)))
        put(f"vgg.{at}.1.weight", block["norm"]["scale"])
        put(f"vgg.{at}.1.bias", block["norm"]["bias"])
        put(f"vgg.{at}.1.running_mean", running["mean"])
        put(f"vgg.{at}.1.running_var", running["var"])
    mix = f"vgg.{len(theirs.vgg) - 1}"
    put(f"{mix}.weight", np.transpose(params["mix"]["kernel"], (3, 2, 0, 1)))
    put(f"{mix}.bias", params["mix"]["bias"])
    for name, dense in (("lin", params["pool"]["lin"]), ("sof", params["pool"]["sof"]), ("adv", params["adv"])):
        put(f"{name}.weight", np.transpose(dense["kernel"]))
        put(f"{name}.bias", dense.get("bias", np.zeros(dense["kernel"].shape[1], np.float32)))
    noise = np.random.default_rng(0).normal(size=(1, SAMPLES)).astype(np.float32)
    with torch.no_grad():
        difference = np.abs(theirs(torch.from_numpy(noise)).numpy() - np.asarray(ours.apply(variables, noise))).max()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a coming change in torch
        names = {"input_names": ["signal"], "output_names": ["logits"]}
        torch.onnx.export(theirs, (torch.from_numpy(noise),), out, opset_version=17, dynamo=False, **names)
    return float(difference)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path, help="the PyTorch file")
    parser.add_argument("student", type=Path, help="a run or student directory of a Wav2Small as published")
    parser.add_argument("out", type=Path, help="the .onnx file to write")
    arguments = parser.parse_args()
    found = peer(arguments.network, arguments.student, arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size:,} bytes; differs from the student by {found:.1e} on noise")
