"""Make teachers.npz: two small teachers with random weights, waveforms, and what PyTorch says of them.

    python tests/golden/teachers.py tests/golden/teachers.npz

The Transformers are transformers' own in PyTorch; the normalisations and heads are written here from the two repositories'
model cards. Needs torch and transformers. Arrays of the file, for KIND wav2vec2 and wavlm and SAMPLES 1000 and 16000:

    config:KIND                  config.json, as a string
    KIND:KEY                     the tensor that the published checkpoint calls KEY
    waves/SAMPLES                float32 [2, SAMPLES]
    hidden/VIEW/SAMPLES          last hidden states [2, frames, 32]; VIEW is wav2vec2, wavlm-official or wavlm-paper
    outputs/VIEW/SAMPLES         [2, 3]
    outputs/wav2vec2/zeros       [1, 3], of 16,000 zeros, for which the model card of the first teacher gives a value
"""

import json
import sys

import numpy as np

REPOSITORIES = {
    "wav2vec2": "audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim",
    "wavlm": "3loi/SER-Odyssey-Baseline-WavLM-Multi-Attributes",
}

#: What the two config.json files say, as far as it is needed here.
CONVOLUTIONS = {"conv_kernel": [10, 3, 3, 3, 3, 2, 2], "conv_stride": [5, 2, 2, 2, 2, 2, 2]}
STATISTICS = {"mean": -8.278621631819787e-05, "std": 0.08485510250851999, "maxlen": 192000}
PUBLISHED = {
    "wav2vec2": {
        "model_type": "wav2vec2",
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "conv_dim": [512] * 7,
        **CONVOLUTIONS,
        "conv_bias": True,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "num_conv_pos_embeddings": 128,
        "num_conv_pos_embedding_groups": 16,
        "hidden_act": "gelu",
        "feat_extract_activation": "gelu",
        "layer_norm_eps": 1e-5,
        "add_adapter": False,
        "vocab_size": None,
    },
    "wavlm": STATISTICS,
}

#: microsoft/wavlm-large, which the second checkpoint builds on without repeating it.
WAVLM_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "conv_dim": [512] * 7,
    **CONVOLUTIONS,
    "conv_bias": False,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "num_buckets": 320,
    "max_bucket_distance": 800,
    "layer_norm_eps": 1e-5,
}

SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [12, 8, 16, 12, 8, 16, 12],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
#: 16,000 samples are 49 frames, so that the last distances share WavLM's last bucket of its logarithmic ones.
SMALL = {
    "wav2vec2": {**PUBLISHED["wav2vec2"], **SIZES, "num_hidden_layers": 2},
    "wavlm": {**PUBLISHED["wavlm"], **SIZES, "num_hidden_layers": 3, "num_buckets": 32, "max_bucket_distance": 40},
}
SEEDS = {"wav2vec2": 1, "wavlm": 2}
LENGTHS = (1000, 16000)
VIEWS = {"wav2vec2": ("wav2vec2", None), "wavlm-official": ("wavlm", "official"), "wavlm-paper": ("wavlm", "paper")}

#: The two parts of a weight norm: what PyTorch calls them now, and how they are published.
SPELLINGS = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


def draw_waves(samples: int, seed: int = 3) -> np.ndarray:
    """Noise at two levels, with an offset: float32 [2, samples], in the steps of 16-bit audio (which also pack well)."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((2, samples)) * [[0.2], [0.02]] + [[-0.05], [0.03]]
    return (np.round(np.clip(noise, -0.99, 0.99) * 32768) / 32768).astype(np.float32)


def published(name: str) -> str:
    """The checkpoint's name of a tensor that PyTorch calls ``name``."""
    for new, old in SPELLINGS.items():
        name = name.replace(new, old)
    return name


def draw_parameters(model, seed: int) -> None:
    """Fill a torch model with numbers under which every parameter counts: no scale is 1, no bias 0, no gate closed."""
    import torch

    rng = np.random.default_rng(seed)
    direction = {}
    # directions of weight norms before their lengths, which must not be the norms of the directions
    for name, parameter in sorted(model.named_parameters(), key=lambda item: published(item[0]).endswith("weight_g")):
        leaf, shape = published(name), tuple(parameter.shape)
        normal = rng.standard_normal(shape, dtype=np.float32)
        if leaf.endswith("weight_g"):
            norm = np.linalg.norm(direction[leaf.removesuffix("g")], axis=(0, 1), keepdims=True)
            value = norm * rng.uniform(0.6, 1.6, shape)
        elif "rel_attn_embed" in leaf or "gru_rel_pos_linear" in leaf:
            value = 0.5 * normal
        elif leaf.endswith("gru_rel_pos_const"):
            value = 1 + 0.5 * normal
        elif leaf.endswith("masked_spec_embed"):
            value = normal
        elif leaf.endswith(("bias", "weight")) and len(shape) == 1:
            value = 0.2 * normal + leaf.endswith("weight")
        elif leaf.endswith("pool_model.attention"):
            value = normal * 2 / np.sqrt(shape[0])
        else:
            # queries and keys are larger, or attention would be the same everywhere
            value = normal * (1.7 if "q_proj" in leaf or "k_proj" in leaf else 1.0) / np.sqrt(np.prod(shape[1:]))
        if leaf.endswith("weight_v"):
            direction[leaf.removesuffix("v")] = value
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(np.asarray(value, np.float32)))


def torch_teacher(kind: str, config: dict, seed: int):
    """A teacher in PyTorch with random weights.

    Args:
        kind: wav2vec2 or wavlm.
        config: its config.json.
        seed: of the weights.

    Returns:
        Its state under the published names (float32 arrays); and a function of float32 waves [B, T] and a normalisation
        (for wavlm: official or paper) that gives last hidden states [B, frames, H] and outputs [B, 3].
    """
    import torch
    from torch import nn
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model, WavLMConfig, WavLMModel

    class RegressionHead(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.dense, self.out_proj = nn.Linear(size, size), nn.Linear(size, 3)

        def forward(self, pooled):
            return self.out_proj(torch.tanh(self.dense(pooled)))

    class AttentiveStatistics(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.sap_linear, self.attention = nn.Linear(size, size), nn.Parameter(torch.empty(size, 1))

        def forward(self, hidden):
            weight = torch.softmax(torch.tanh(self.sap_linear(hidden)) @ self.attention, dim=1)
            mean = (weight * hidden).sum(dim=1)
            deviation = torch.sqrt(((weight * hidden**2).sum(dim=1) - mean**2).clamp(min=1e-5))
            return torch.cat([mean, deviation], dim=1)

    class EmotionHead(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.fc = nn.ModuleList([nn.Sequential(nn.Linear(2 * size, size), nn.LayerNorm(size), nn.ReLU())])
            self.out = nn.Sequential(nn.Linear(size, 3))

        def forward(self, pooled):
            return self.out(self.fc[0](pooled))

    if kind == "wav2vec2":
        settings = Wav2Vec2Config(**{**config, "vocab_size": 32})
        trunk = Wav2Vec2Model(settings)
        model = nn.ModuleDict({"wav2vec2": trunk, "classifier": RegressionHead(settings.hidden_size)})
        extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False)
    else:
        settings = WavLMConfig(**{**WAVLM_LARGE, **config})
        trunk, size = WavLMModel(settings), settings.hidden_size
        model = nn.ModuleDict({"ssl_model": trunk, "pool_model": AttentiveStatistics(size), "ser_model": EmotionHead(size)})
    draw_parameters(model, seed)
    model.eval()

    def run(waves: np.ndarray, normalisation: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            if kind == "wav2vec2":
                inputs = extractor(list(waves), sampling_rate=16_000, return_tensors="pt").input_values
                hidden = trunk(inputs).last_hidden_state
                outputs = model["classifier"](hidden.mean(dim=1))
            else:
                x = torch.from_numpy(waves)
                mean, std = config["mean"], config["std"]
                inputs = {"official": (x - mean) / (std + 1e-6), "paper": (x + mean) / std}[normalisation]
                hidden = trunk(inputs).last_hidden_state
                outputs = model["ser_model"](model["pool_model"](hidden))
        return hidden.numpy(), outputs.numpy()

    return {published(name): value.numpy() for name, value in model.state_dict().items()}, run


def teachers_golden() -> dict[str, np.ndarray]:
    """The arrays of teachers.npz."""
    arrays = {f"waves/{samples}": draw_waves(samples) for samples in LENGTHS}
    run = {}
    for kind, config in SMALL.items():
        state, run[kind] = torch_teacher(kind, config, SEEDS[kind])
        arrays[f"config:{kind}"] = np.array(json.dumps(config))
        arrays.update({f"{kind}:{key}": value for key, value in state.items()})
    for view, (kind, normalisation) in VIEWS.items():
        for samples in LENGTHS:
            hidden, outputs = run[kind](arrays[f"waves/{samples}"], normalisation)
            arrays[f"hidden/{view}/{samples}"], arrays[f"outputs/{view}/{samples}"] = hidden, outputs
    arrays["outputs/wav2vec2/zeros"] = run["wav2vec2"](np.zeros((1, 16_000), np.float32))[1]
    return arrays


if __name__ == "__main__":
    np.savez_compressed(sys.argv[1], **teachers_golden())
