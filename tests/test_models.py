"""Students against the paper's counts, librosa, and a PyTorch implementation with the same weights."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
from conftest import voice
from flax.traverse_util import flatten_dict, unflatten_dict

from w2s_jax import convert, models
from w2s_jax.artifacts import MismatchError, UsageError
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


@pytest.mark.parametrize("name", ["wav2small", "wav2small_17k"])
def test_shapes_names_and_level(name):
    student = models.build(name, dimensions=2)
    wave = np.stack([voice(0.5, 1), voice(0.5, 2)])
    variables = student.init(jax.random.key(0), wave)
    logits = student.apply(variables, wave)
    assert logits.shape == (2, 2)
    # the level does not matter (but for the 1e-7 that is added to the variance), nor who else is in the batch
    np.testing.assert_allclose(student.apply(variables, 3 * wave[1:]), logits[1:], rtol=1e-3, atol=1e-3)
    assert np.isfinite(student.apply(variables, np.zeros((1, student.minimum_samples), np.float32))).all()


def test_unknown_names_are_refused():
    with pytest.raises(UsageError, match="wav2small_17k"):
        models.build("wav2big")
    with pytest.raises(UsageError, match="channels"):
        models.build("wav2small", chanels=3)


def cnn14_variables(state: dict, student) -> dict:
    """The state of golden/cnn14.py as variables of ``CNN14``."""
    wave = jnp.zeros((1, student.minimum_samples))
    tree = flatten_dict(student.init(jax.random.key(0), wave))
    names = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    for path, leaf in tree.items():
        if path[0] == "frontend":
            continue
        match = re.fullmatch(r"(conv|norm)(\d)_(\d)", path[1])
        module = f"blocks.{int(match[2]) - 1}.{match[1]}{match[3]}" if match else path[1]
        array = state.pop(f"{module}.{names[path[-1]]}")
        if path[-1] == "kernel":
            array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
        assert array.shape == leaf.shape, path
        tree[path] = jnp.asarray(array)
    assert not state  # nothing of the original is left over
    return unflatten_dict(tree)


def test_cnn14_is_its_torch_golden():
    golden = np.load(GOLDEN.with_name("cnn14.npz"))
    student = models.build("cnn14", channels=1)
    state = {key.removeprefix("weight/"): golden[key] for key in golden.files if key.startswith("weight/")}
    logits = student.apply(cnn14_variables(state, student), golden["wave"])
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize("samples", [512 + 31 * 160, 16_001, 47_999])
def test_cnn14_is_torch_live(samples):
    pytest.importorskip("torch")
    from golden.cnn14 import torch_cnn14

    student = models.build("cnn14", channels=3)
    assert samples >= student.minimum_samples
    state, run = torch_cnn14(channels=3, seed=samples)
    wave = np.random.default_rng(samples).standard_normal((2, samples)).astype(np.float32)
    np.testing.assert_allclose(student.apply(cnn14_variables(state, student), wave), run(wave), atol=1e-4)


def test_cnn14_has_the_published_count():
    # Cnn14 of PANNs with its 527 AudioSet classes; the front end is not counted there
    assert models.count(models.build("cnn14", dimensions=527))["trained"] == 80_753_615


def check_17k(golden) -> None:
    state = {key.removeprefix("weight/"): np.asarray(golden[key]) for key in golden if key.startswith("weight/")}
    variables = convert.wav2small_17k(state)
    logits = models.build("wav2small_17k").apply(variables, golden["wave"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=1e-5, atol=1e-5)
    back = convert.published_17k(variables)
    assert set(back) == set(state)
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
        assert back[name].shape == array.shape, name


def test_the_published_17k_layout_loads_and_is_saved_again():
    check_17k(np.load(GOLDEN.with_name("wav2small_17k.npz")))


@pytest.mark.torch
def test_the_published_17k_layout_live():
    pytest.importorskip("torch")
    from golden.wav2small_17k import golden_17k

    check_17k(golden_17k())


def test_another_layout_is_refused_with_its_differences():
    golden = np.load(GOLDEN.with_name("wav2small_17k.npz"))
    state = {key.removeprefix("weight/"): golden[key] for key in golden.files if key.startswith("weight/")}
    state["vgg7.l8.conv.weight"] = state.pop("vgg7.l7.conv.weight")
    state["adv.weight"] = state["adv.weight"][:, :-1]
    state["adv.bias"] = state["adv.bias"] * np.nan
    with pytest.raises(MismatchError) as caught:
        convert.wav2small_17k(state)
    for fault in ("- vgg7.l7.conv.weight", "+ vgg7.l8.conv.weight", "! adv.weight: (3, 337), expected (3, 338)", "! adv.bias"):
        assert fault in str(caught.value)
