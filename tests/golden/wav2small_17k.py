"""Make wav2small_17k.npz: a random Wav2Small 17K in PyTorch under the published tensor names, and what it says of two waves.

    python tests/golden/wav2small_17k.py tests/golden/wav2small_17k.npz

Written here after the published layout (audEERING's second model card of arXiv 2408.13920): the features are X (channels × mel)
beside X·Xᵀ, joined row by row. Needs torch and librosa.
"""

import sys

import numpy as np


def torch_17k(seed: int):
    """A random model: (state dict as numpy arrays by published names, function from waves [B, T] to logits [B, 3])."""
    import librosa
    import torch
    from torch import nn

    def block(inputs: int) -> nn.ModuleDict:
        return nn.ModuleDict({"conv": nn.Conv2d(inputs, 13, 3, padding=1, bias=False), "norm": nn.BatchNorm2d(13)})

    torch.manual_seed(seed)
    vgg7 = nn.ModuleDict({f"l{number}": block(13 if number > 1 else 1) for number in range(1, 8)})
    vgg7["lin"], vgg7["sof"] = nn.Conv2d(13, 13, 1), nn.Conv2d(13, 13, 1)
    convolutions = {f"conv_{part}": nn.Conv1d(1, 33, 64, stride=32, bias=False) for part in ("real", "imag")}
    vgg7["spectrogram_extractor"] = nn.ModuleDict(convolutions)
    vgg7["logmel_extractor"] = nn.Module()
    vgg7["logmel_extractor"].register_buffer(
        "melW", torch.from_numpy(librosa.filters.mel(sr=16_000, n_fft=64, n_mels=26).T.copy())
    )
    vgg7["logmel_extractor"].register_buffer("amin", torch.tensor([1e-10]))
    model = nn.ModuleDict({"vgg7": vgg7, "adv": nn.Linear(338, 3)}).eval()
    fourier = np.exp(-2j * np.pi * np.outer(np.arange(33), np.arange(64)) / 64) * np.hanning(65)[:-1]
    convolutions["conv_real"].weight.data = torch.from_numpy(fourier.real[:, None].astype(np.float32))
    convolutions["conv_imag"].weight.data = torch.from_numpy(fourier.imag[:, None].astype(np.float32))
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # those of an untrained one would hide mistakes
            for tensor in (module.running_var, module.weight.data):
                tensor.copy_(torch.rand(13, generator=generator) + 0.5)
            for tensor in (module.running_mean, module.bias.data):
                tensor.copy_(torch.randn(13, generator=generator))

    def run(waves: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            x = torch.from_numpy(waves)
            x = x - x.mean(1, keepdim=True)
            x = (x / torch.sqrt(x.pow(2).mean(1, keepdim=True) + 1e-7))[:, None]
            power = sum(convolution(x) ** 2 for convolution in convolutions.values())  # [B, 33, time]
            mel = power.transpose(1, 2) @ vgg7["logmel_extractor"].melW
            x = 10 * torch.log10(mel.clamp(min=1e-10))[:, None]
            for number in range(1, 8):
                layer = vgg7[f"l{number}"]
                x = torch.relu(layer["norm"](layer["conv"](x)))
                if number == 3:
                    x = nn.functional.max_pool2d(x, 3, stride=2, padding=1)
            x = (vgg7["lin"](x) * vgg7["sof"](x).softmax(2)).sum(2)  # [B, channels, mel]
            return model["adv"](torch.cat([x, x @ x.transpose(1, 2)], 2).flatten(1)).numpy()

    return {name: value.numpy() for name, value in model.state_dict().items()}, run


def golden_17k() -> dict[str, np.ndarray]:
    """Arrays: ``weight/NAME``, ``wave`` float32 [2, T], ``logits`` [2, 3]."""
    state, run = torch_17k(seed=0)
    wave = (np.random.default_rng(3).standard_normal((2, 8_009)) * [[0.1], [0.01]] - 0.01).astype(np.float32)
    return {**{f"weight/{name}": value for name, value in state.items()}, "wave": wave, "logits": run(wave)}


if __name__ == "__main__":
    np.savez_compressed(sys.argv[1], **golden_17k())
