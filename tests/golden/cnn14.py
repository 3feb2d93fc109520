"""Make cnn14.npz: a small random CNN14 in PyTorch, written here after the paper (arXiv 1912.10211), and what it says of a wave.

    python tests/golden/cnn14.py tests/golden/cnn14.npz

Needs torch and librosa.
"""

import sys

import numpy as np


def torch_cnn14(channels: int, seed: int, settings=(512, 160, 64)):
    """A random CNN14 of ``channels`` in its first block: (state dict as numpy arrays, function from waves [B, T] to logits)."""
    import librosa
    import torch
    from torch import nn
    from torch.nn import functional as F

    n_fft, hop, n_mels = settings

    class Block(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
            self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)

        def forward(self, x):
            return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))

    class CNN14(nn.Module):
        def __init__(self):
            super().__init__()
            sizes = [1, *(channels * 2**block for block in range(6))]
            self.norm = nn.BatchNorm2d(n_mels)
            self.blocks = nn.ModuleList([Block(*pair) for pair in zip(sizes, sizes[1:], strict=False)])
            self.dense, self.adv = nn.Linear(sizes[-1], sizes[-1]), nn.Linear(sizes[-1], 3)

        def forward(self, waves):
            waves = waves - waves.mean(1, keepdim=True)
            waves = waves / torch.sqrt(waves.pow(2).mean(1, keepdim=True) + 1e-7)
            window = torch.hann_window(n_fft, periodic=True)
            power = torch.stft(waves, n_fft, hop, window=window, center=False, return_complex=True).abs() ** 2
            mel = torch.from_numpy(librosa.filters.mel(sr=16_000, n_fft=n_fft, n_mels=n_mels)) @ power
            x = 10 * torch.log10(mel.clamp(min=1e-10)).transpose(1, 2)[:, None]  # [B, 1, time, mel]
            x = self.norm(x.transpose(1, 3)).transpose(1, 3)
            for number, block in enumerate(self.blocks):
                x = block(x)
                x = F.avg_pool2d(x, 2) if number < 5 else x
            x = x.mean(3)
            return self.adv(F.relu(self.dense(x.amax(2) + x.mean(2))))

    torch.manual_seed(seed)
    model = CNN14().eval()
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # those of an untrained one would hide mistakes
            for tensor in (module.running_var, module.weight.data):
                tensor.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            for tensor in (module.running_mean, module.bias.data):
                tensor.copy_(torch.randn(module.num_features, generator=generator))
    model.norm.running_mean.sub_(40)  # decibels
    model.norm.running_var.mul_(200)

    def run(waves: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(waves)).numpy()

    return {name: value.numpy() for name, value in model.state_dict().items() if "tracked" not in name}, run


def cnn14_golden() -> dict[str, np.ndarray]:
    """Arrays: ``weight/NAME`` (the state), ``wave`` float32 [2, T], ``logits`` [2, 3]."""
    state, run = torch_cnn14(channels=1, seed=0)
    wave = (np.random.default_rng(2).standard_normal((2, 9_001)) * [[0.1], [0.01]] + 0.02).astype(np.float32)
    return {**{f"weight/{name}": value for name, value in state.items()}, "wave": wave, "logits": run(wave)}


if __name__ == "__main__":
    np.savez_compressed(sys.argv[1], **cnn14_golden())
