"""Wav2Small at three sizes: a laptop, one GPU, and the paper's data on a pod.

Claim: one student, one set of settings per unit of hardware; what a larger machine changes is the number of clips in a batch,
the learning rate and the precision, nothing else. A batch takes equally many views from each of ``data_shards`` sets of
clips, on every number of devices that divides them, so a run can move between machines.

    w2s train experiments/recipes.py:laptop --bank BANK --views VIEWS --labels LABELS --workdir RUN
    w2s train experiments/recipes.py:gpu    --bank … --views … --labels … --workdir …
    w2s train experiments/recipes.py:pod    --bank … --views … --labels … --workdir … --distributed      (experiments/launch.md)

| variant | data | hardware | time |
|---|---|---|---|
| laptop | 1 to 10 hours | 2 CPU cores | not yet run; 500 steps of 0.24 s (16 × 3 s, experiments/README.md): 2 minutes |
| gpu | 100 to 10,000 hours | 1 GPU of 16 GiB or more | not yet run; 13 minutes on an H100 if experiments/scaling.md is right |
| pod | 100,000 hours, 72 M views of 5 s | 64 to 256 chips | not yet run; experiments/scaling.md |

Expected CCC: not yet run, none of them. The paper (arXiv 2408.13920) says 0.66 for arousal and 0.37 for valence, with people's
ratings; ``pod`` is to be measured against that. ``laptop`` takes the settings that were found on the Czech recordings
(czech_dnsmos.py). The learning rates of ``gpu`` and ``pod`` are guesses: above that of 16 clips, and below what growth by the
square root of the batch would give (12e-3 and 48e-3), because Adam's steps do not shrink with the noise of the gradient.

    w2s views draw BANK --out VIEWS --seconds 5 --mix 0.5 --partners shard         (for the pod: partners without foreign clips)
"""

from __future__ import annotations

from ml_collections import ConfigDict

from w2s_jax.config import default

#: Learning rate and weight decay are those of czech_dnsmos.py, for 16 clips a batch.
COMMON = {"student": "wav2small", "weight_decay": 0.05}
VARIANTS = {
    "laptop": {
        **COMMON,
        "batch_size": 16,
        "steps": 500,
        "learning_rate": 3e-3,
        "crop": 0.6,  # a small bank is soon known by heart
        "ema": 0.99,
        "eval_every": 125,
    },
    "gpu": {
        **COMMON,
        "batch_size": 256,
        "steps": 50_000,
        "learning_rate": 6e-3,
        "ema": 0.999,
        "eval_every": 2000,
        "log_every": 100,
        "dtype": "bfloat16",
        "data_shards": 8,  # goes on with the same numbers on 1, 2, 4 or 8 GPUs
    },
    "pod": {
        **COMMON,
        "batch_size": 4096,
        "steps": 175_780,  # ten epochs of 72 M views
        "learning_rate": 12e-3,
        "warmup": 0.02,
        "ema": 0.9995,
        "eval_every": 2500,
        "log_every": 100,
        "dtype": "bfloat16",
        "form": "auto",  # of the convolutions: what the measurements say for the chip
        "accumulate": 1,  # 4 where 4,096 clips do not fit into the chips that there are
        "data_shards": 256,
    },
}


def get_config(variant: str = "laptop") -> ConfigDict:
    """The settings of one variant."""
    config = default()
    config.update(VARIANTS[variant])
    return config
