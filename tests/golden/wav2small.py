"""Make wav2small.npz: weights, a waveform, and what a PyTorch Wav2Small says of it.

    python tests/golden/wav2small.py PEER.py tests/golden/wav2small.npz

PEER.py is a PyTorch implementation with a class ``Wav2Small`` whose state is named logmel, vgg.N, lin, sof, adv; it is not part
of this repository. Needs torch.
"""

import importlib.util
import sys

import numpy as np


def peer_golden(peer_path: str) -> dict[str, np.ndarray]:
    """Arrays: ``weight/NAME`` (the peer's state), ``wave`` float32 [2, T], ``logmel`` [2, time, mel], ``logits`` [2, 3]."""
    import torch

    spec = importlib.util.spec_from_file_location("peer", peer_path)
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    torch.manual_seed(0)
    model = peer.Wav2Small().eval()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # the statistics of an untrained one would hide mistakes
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            module.weight.data.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            module.bias.data.copy_(torch.randn(module.num_features, generator=generator))
    rng = np.random.default_rng(2)
    wave = (rng.standard_normal((2, 8_009)) * [[0.1], [0.01]] + 0.02).astype(np.float32)
    with torch.no_grad():
        logmel = model.logmel(torch.from_numpy(wave)).numpy().reshape(2, -1, 26)
        logits = model(torch.from_numpy(wave)).numpy()
    state = {f"weight/{name}": value.numpy() for name, value in model.state_dict().items() if "tracked" not in name}
    return {**state, "wave": wave, "logmel": logmel, "logits": logits}


if __name__ == "__main__":
    np.savez_compressed(sys.argv[2], **peer_golden(sys.argv[1]))
