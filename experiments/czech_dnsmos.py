"""The whole chain on real recordings: 1,882 acted Czech utterances, DNSMOS as the teacher, Wav2Small as the student.

Claim: on held-out levels of the game, Wav2Small trained by this package follows its teacher at least as closely
as the same network trained the ordinary way in PyTorch (Adam 1e-3, CCC loss, eager) on the same views for the same time.

The recordings are Debian's fillets-ng-data-cs (106 minutes, Ogg, 22 and 44 kHz). Nothing is installed:

    apt-get download fillets-ng-data-cs && dpkg -x fillets-ng-data-cs_*.deb fillets
    python experiments/czech_dnsmos.py run --sound fillets/usr/share/games/fillets-ng/sound --out runs/czech
    python experiments/czech_dnsmos.py peer --peer torch_wav2small.py --out runs/czech         (needs torch, and the peer)

``run`` calls the w2s commands that it prints: labelling took 35 minutes on 2 busy cores, training takes 9. ``peer`` trains a
PyTorch Wav2Small for as many seconds as ``run`` trained, on the same views, and prints its CCC. Other students get the same
seconds as variants:

    w2s train experiments/czech_dnsmos.py:17k --bank runs/czech/bank --views runs/czech/views.parquet \\
        --labels runs/czech/labels --workdir runs/czech/17k
                                            (or :mobilenet_v4_s, :mobilenet_v3_s; then w2s eval, as run does)

Results: experiments/README.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from ml_collections import ConfigDict

from w2s_jax.config import default

#: Steps are what 520 s of training allow on the machine of experiments/README.md, by step_time.py; MobileNetV3-S has fewer.
LONG = {"learning_rate": 3e-3, "crop": 0.6, "ema": 0.99, "weight_decay": 0.05, "eval_every": 250}
#: ``small`` is what CI runs: a slice of the recordings and a few steps; it proves the chain, not the student.
VARIANTS = {
    "": {**LONG, "student": "wav2small", "steps": 3900},
    "17k": {**LONG, "student": "wav2small_17k", "steps": 4160},
    "mobilenet_v4_s": {**LONG, "student": "mobilenet_v4_s", "steps": 2050, "learning_rate": 1e-3},
    "mobilenet_v3_s": {**LONG, "student": "mobilenet_v3_s", "steps": 1500, "learning_rate": 1e-3},
    "small": {"steps": 30, "eval_every": 15},
}


def get_config(variant: str = "") -> ConfigDict:
    """Batches of 16 views; each step sees 1.8 s of the 3 s, or the student would soon memorise the 1,365 clips."""
    config = default("wav2small")
    config.update(VARIANTS[variant])
    return config


def w2s(*arguments: object) -> dict:
    """Run a command of the package, show it, and return its last line."""
    line = [str(argument) for argument in arguments]
    print("\n$ w2s", shlex.join(line), flush=True)
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "w2s_jax.cli", *line, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    *shown, result = done.stdout.splitlines()
    print("\n".join(shown), f"\n({time.perf_counter() - began:.0f} s)", flush=True)
    return json.loads(result)


def run(sound: Path, out: Path, variant: str, clips_per_level: int | None) -> dict:
    """Audio to model directory. Levels (the folders below ``sound``) are never divided between the splits."""
    source = sound
    if clips_per_level:
        source = out / "slice"
        for level in sorted(path for path in sound.iterdir() if path.is_dir()):
            for file in sorted(level.rglob("*.ogg"))[:clips_per_level]:
                link = source / file.relative_to(sound)
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.is_symlink():
                    link.symlink_to(file.resolve())
    bank, views, labels, workdir = out / "bank", out / "views.parquet", out / "labels", out / "run"
    w2s("bank", "build", source, "--out", bank, "--split-by", "folder", "--fractions", "0.72,0.11,0.17")
    # DNSMOS depends on the level of a recording, which the student normalises: random gains would only be noise in the labels
    views_per_clip = 4 if not clips_per_level else 1
    w2s("views", "draw", bank, "--out", views, "--per-clip", views_per_clip, "--eval-per-clip", views_per_clip,
        "--seconds", "3", "--mix", "0", "--gain-db", "0,0")  # fmt: skip
    w2s("label", bank, views, "--teacher", "dnsmos", "--out", labels, "--batch-size", "8")
    experiment = f"{__file__}:{variant}" if variant else __file__
    trained = w2s("train", experiment, "--bank", bank, "--views", views, "--labels", labels, "--workdir", workdir)
    scores = w2s("eval", workdir, "--bank", bank, "--views", views, "--labels", labels)["teacher"]
    exported = w2s("export", workdir, "--out", out / "model", "--calibration", bank)
    files = [str(path) for path in sorted(source.rglob("*.ogg"))[:3]]
    w2s("predict", out / "model", *files, "--window", "1")
    result = {"seconds": trained["seconds"], "steps": trained["steps"], "ccc": scores, "int8": exported["kinds"]["int8"]["ccc"]}
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"\ntrained for {trained['seconds']} s; CCC on held-out levels: {_short(scores)}")
    return result


def peer(peer_file: Path, out: Path, seconds: float | None) -> dict:
    """Train a PyTorch Wav2Small (a file with ``Wav2Small`` and ``ccc_loss``) on the views of ``run``, for the same time."""
    import importlib.util

    import numpy as np
    import torch

    from w2s_jax import metrics, render
    from w2s_jax.bank import Bank
    from w2s_jax.feed import Batches
    from w2s_jax.labels import Labels
    from w2s_jax.views import Views

    spec = importlib.util.spec_from_file_location("peer", peer_file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    bank, views = Bank(out / "bank"), Views.read(out / "views.parquet")
    labels = Labels.read(out / "labels", views)
    if seconds is None:
        seconds = json.loads((out / "result.json").read_text())["seconds"]
    config = get_config()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = module.Wav2Small().train()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    rows = views.where("train")
    batches = Batches(views.columns["samples"][rows], config.batch_size, 1_000_000, config.seed)
    validation = views.where("validation")

    def predict(chosen: np.ndarray) -> np.ndarray:
        model.eval()
        with torch.no_grad():
            parts = [
                model(torch.from_numpy(render.render_on_host(bank, views, chosen[at : at + 32])))
                for at in range(0, len(chosen), 32)
            ]
        model.train()
        return torch.cat(parts).numpy()

    spent, step, best = 0.0, 0, (-2.0, None)
    while spent < seconds:
        began = time.perf_counter()
        chosen = rows[batches(step)[1].ravel()]
        waves = torch.tensor(render.render_on_host(bank, views, chosen))
        optimiser.zero_grad()
        module.ccc_loss(model(waves), torch.from_numpy(labels.values[chosen])).backward()
        optimiser.step()
        spent, step = spent + time.perf_counter() - began, step + 1
        if step % config.eval_every == 0 or spent >= seconds:  # not counted, as in w2s train
            score = metrics.ccc(predict(validation), labels.values[validation]).mean()
            if score > best[0]:  # the best on the validation views is kept, as in w2s train
                best = (score, {name: value.clone() for name, value in model.state_dict().items()})
            print(f"step {step}, {spent:.0f} s, validation CCC {score:.3f}", flush=True)
    model.load_state_dict(best[1])
    test = views.where("test")
    scores = metrics.ccc(predict(test), labels.values[test])
    result = {"seconds": round(spent, 1), "steps": step, "ccc": dict(zip(labels.dimensions, scores.tolist(), strict=True))}
    result["ccc"]["mean"] = float(scores.mean())
    (out / "peer.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"PyTorch peer, {step} steps in {spent:.0f} s; CCC on held-out levels: {_short(result['ccc'])}")
    return result


def _short(scores: dict) -> str:
    return ", ".join(f"{name} {score['ccc'] if isinstance(score, dict) else score:.3f}" for name, score in scores.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    chain = tasks.add_parser("run", help="audio to model directory")
    chain.add_argument("--sound", type=Path, required=True, help="the folder of the levels")
    chain.add_argument("--variant", choices=VARIANTS, default="")
    chain.add_argument("--clips-per-level", type=int, help="take only so many recordings of each level, one view of each")
    rival = tasks.add_parser("peer", help="a PyTorch network on the same views")
    rival.add_argument("--peer", type=Path, required=True, help="a Python file with Wav2Small and ccc_loss")
    rival.add_argument("--seconds", type=float, help="default: as long as run trained")
    for task in (chain, rival):
        task.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.task == "run":
        run(arguments.sound, arguments.out, arguments.variant, arguments.clips_per_level)
    else:
        peer(arguments.peer, arguments.out, arguments.seconds)


if __name__ == "__main__":
    main()
