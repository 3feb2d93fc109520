"""Students against the paper's counts, librosa, and a PyTorch implementation with the same weights."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
from conftest import voice

from w2s_jax import models
from w2s_jax.artifacts import UsageError
from w2s_jax.models.frontend import LogMel, normalise

GOLDEN = Path(__file__).parent / "golden" / "wav2small.npz"
PEER = Path(__file__).parents[2] / "shared" / "peers" / "torch_wav2small.py"


def test_counts_are_the_papers():
    assert models.count(models.build("wav2small")) == {"trained": 67_577, "fixed": 72_659 - 67_577}


def test_17k_counts_are_the_model_cards():
    # 17,244 is with a 4-class head on the same 338 features, 338·4 + 4 more (arXiv 2408.13920's second model card)
    counts = models.count(models.build("wav2small_17k"))
    assert counts["trained"] + counts["fixed"] + 338 * 4 + 4 == 17_244


@pytest.mark.parametrize(("n_fft", "hop", "n_mels"), [(64, 32, 26), (144, 72, 40)])
def test_logmel_is_librosas(n_fft, hop, n_mels):
    wave = np.asarray(normalise(jnp.asarray(voice(1.0, 1)[None])))
    power = librosa.feature.melspectrogram(
        y=wave[0], sr=16_000, n_fft=n_fft, hop_length=hop, n_mels=n_mels, center=False, power=2.0
    )
    expected = 10 * np.log10(np.maximum(power, 1e-10)).T
    image, _ = LogMel(n_fft, hop, n_mels).init_with_output(jax.random.key(0), wave)
    np.testing.assert_allclose(image[0], expected, atol=1e-3)


def flax_variables(golden) -> dict:
    """The golden file's PyTorch state as our variables."""
    state = {name.removeprefix("weight/"): value for name, value in golden.items() if name.startswith("weight/")}
    params, stats = {"vgg7": {}}, {"vgg7": {}}
    for layer, place in zip(range(1, 8), (0, 1, 2, 4, 5, 6, 7), strict=True):  # 3 is the pool
        norm = f"vgg.{place}.1."
        params["vgg7"][f"l{layer}"] = {
            "conv": {"kernel": state[f"vgg.{place}.0.weight"].transpose(2, 3, 1, 0)},
            "norm": {"scale": state[norm + "weight"], "bias": state[norm + "bias"]},
        }
        stats["vgg7"][f"l{layer}"] = {"norm": {"mean": state[norm + "running_mean"], "var": state[norm + "running_var"]}}
    dense = {name: {"kernel": state[name + ".weight"].T, "bias": state[name + ".bias"]} for name in ("lin", "sof", "adv")}
    params["mix"] = {"kernel": state["vgg.8.weight"].transpose(2, 3, 1, 0), "bias": state["vgg.8.bias"]}
    params["pool"] = {"lin": dense["lin"], "sof": dense["sof"]}
    params["adv"] = dense["adv"]
    fixed = models.build("wav2small").init(jax.random.key(0), jnp.zeros((1, 640)))["frontend"]
    return {"params": params, "batch_stats": stats, "frontend": fixed}


def check_against(golden) -> None:
    student, variables = models.build("wav2small"), flax_variables(golden)
    np.testing.assert_allclose(student.apply(variables, golden["wave"]), golden["logits"], atol=1e-5, rtol=1e-5)
    image = LogMel().apply({"frontend": variables["frontend"]["logmel"]}, normalise(golden["wave"]))
    np.testing.assert_allclose(image, golden["logmel"], atol=1e-3)
    fixed = variables["frontend"]["logmel"]
    np.testing.assert_allclose(fixed["real"].T, golden["weight/logmel.real.weight"][:, 0], atol=1e-6)
    np.testing.assert_allclose(fixed["imag"].T, golden["weight/logmel.imag.weight"][:, 0], atol=1e-6)


def test_forward_is_the_torch_peers_golden():
    check_against(np.load(GOLDEN))


@pytest.mark.torch
def test_forward_is_the_torch_peers_live(request):
    pytest.importorskip("torch")
    if not PEER.exists():
        pytest.skip(f"no PyTorch peer at {PEER}")
    from golden.wav2small import peer_golden

    check_against(peer_golden(str(PEER)))


@pytest.mark.parametrize("name", models.STUDENTS)
def test_shapes_names_and_level(name):
    student = models.build(name, dimensions=2)
    wave = np.stack([voice(0.5, 1), voice(0.5, 2)])
    variables = student.init(jax.random.key(0), wave)
    logits = student.apply(variables, wave)
    assert logits.shape == (2, 2)
    # the level does not matter (but for the 1e-7 that is added to the variance), nor who else is in the batch
    np.testing.assert_allclose(student.apply(variables, 3 * wave[1:]), logits[1:], rtol=1e-3, atol=1e-3)
    assert np.isfinite(student.apply(variables, np.zeros((1, 64), np.float32))).all()


def test_unknown_names_are_refused():
    with pytest.raises(UsageError, match="wav2small_17k"):
        models.build("wav2big")
    with pytest.raises(UsageError, match="channels"):
        models.build("wav2small", chanels=3)
