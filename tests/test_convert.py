"""Weights of others in our students, and back."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from golden.mobilenet import state_of
from safetensors.numpy import save_file

from w2s_jax import checkpoint, convert, models
from w2s_jax.convert import load_timm, start, timm_trunk
from w2s_jax.errors import MismatchError, UsageError, W2SError
from w2s_jax.files import fingerprint
from w2s_jax.models.mobilenet import MobileNetV3S

GOLDEN = Path(__file__).parent / "golden"
SMALL = "mobilenetv3_small_050"


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "mobilenet.npz")


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
    check_17k(np.load(GOLDEN / "wav2small_17k.npz"))


@pytest.mark.torch
def test_the_published_17k_layout_live():
    pytest.importorskip("torch")
    from golden.wav2small_17k import golden_17k

    check_17k(golden_17k())


def test_another_layout_is_refused_with_its_differences():
    golden = np.load(GOLDEN / "wav2small_17k.npz")
    state = {key.removeprefix("weight/"): golden[key] for key in golden.files if key.startswith("weight/")}
    state["vgg7.l8.conv.weight"] = state.pop("vgg7.l7.conv.weight")
    state["adv.weight"] = state["adv.weight"][:, :-1]
    state["adv.bias"] = state["adv.bias"] * np.nan
    with pytest.raises(MismatchError) as caught:
        convert.wav2small_17k(state)
    for fault in ("- vgg7.l7.conv.weight", "+ vgg7.l8.conv.weight", "! adv.weight: (3, 337), expected (3, 338)", "! adv.bias"):
        assert fault in str(caught.value)


def test_timm_extras_are_left_out_and_stems_fold(golden, tmp_path):
    state = state_of(golden, SMALL)
    plain = timm_trunk(SMALL, state)
    three = {
        **state,
        "conv_stem.weight": np.repeat(state["conv_stem.weight"] / 3, 3, axis=1),
        "bn1.num_batches_tracked": np.array(7),
        "classifier.weight": np.full((10, 4), np.nan, np.float32),
        "conv_head.bias": np.zeros(4, np.float32),
        "norm_head.running_mean": np.zeros(4, np.float32),
    }
    save_file(three, tmp_path / "model.safetensors")
    folded = load_timm(tmp_path / "model.safetensors", SMALL, fold_stem=True)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), folded, plain)
    with pytest.raises(MismatchError, match=r"1 differences: ! conv_stem.weight: .*fold_stem=True"):
        timm_trunk(SMALL, three)
    # as torch.compile and DataParallel save them
    save_file({f"module._orig_mod.{name}": array for name, array in three.items()}, tmp_path / "wrapped")
    jax.tree.map(np.testing.assert_array_equal, load_timm(tmp_path / "wrapped", SMALL, fold_stem=True), folded)


def test_timm_differences_are_all_listed(golden):
    state = state_of(golden, SMALL)
    del state["blocks.1.0.bn2.running_var"]
    state["blocks.9.0.conv.weight"] = np.zeros((1, 1, 1, 1), np.float32)
    state["bn1.weight"] = np.zeros(3, np.float32)
    state["blocks.0.0.se.conv_reduce.bias"][0] = np.nan
    with pytest.raises(MismatchError) as error:
        timm_trunk(SMALL, state)
    for fault in (
        "4 differences",
        "- blocks.1.0.bn2.running_var (40,)",
        "+ blocks.9.0.conv.weight (1, 1, 1, 1)",
        "! bn1.weight: (3,), expected (16,)",
        "! blocks.0.0.se.conv_reduce.bias: not finite",
    ):
        assert fault in str(error.value)
    with pytest.raises(UsageError, match="mobilenetv4_conv_medium"):
        timm_trunk("mobilenetv5", state)


def test_files_that_are_no_safetensors(tmp_path):
    for name, head in (("zip.bin", b"PK\x03\x04"), ("old.pt", b"\x80\x02}q")):
        (tmp_path / name).write_bytes(head + bytes(100))
        with pytest.raises(UsageError, match="pickle"):
            load_timm(tmp_path / name, SMALL)
    (tmp_path / "cut").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(W2SError, match="damaged"):
        load_timm(tmp_path / "cut", SMALL)
    with pytest.raises(UsageError, match="No such file"):
        load_timm(tmp_path / "none", SMALL)


def test_a_student_starts_from_timms_weights(golden, tmp_path):
    state, path = state_of(golden, SMALL), tmp_path / "model.safetensors"
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(3)).astype(np.float32).reshape(1, 3, 1, 1)  # of red, green and blue
    save_file({**state, "conv_stem.weight": state["conv_stem.weight"] * shares, "classifier.bias": np.zeros(9)}, path)
    student = MobileNetV3S(dimensions=2, width=0.5)
    taken, about = start("mobilenet_v3_s", student, ("a", "b"), path)
    assert {collection: list(tree) for collection, tree in taken.items()} == {"params": ["trunk"], "batch_stats": ["trunk"]}
    trunk = {collection: tree["trunk"] for collection, tree in taken.items()}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), trunk, timm_trunk(SMALL, state))
    licence = "see the source of the weights"
    expected = {"source": "model.safetensors", "what": f"timm {SMALL}", "fingerprint": fingerprint(path), "licence": licence}
    assert about == expected


def test_a_student_does_not_start_from_anything_else(golden, tmp_path):
    path = tmp_path / "model.safetensors"
    state = state_of(golden, "mobilenetv4_conv_small_050")
    save_file(state, path)
    small = MobileNetV3S(width=0.5)
    with pytest.raises(MismatchError) as error:
        start("mobilenet_v3_s", small, ("a", "b", "c"), path)
    ours = {key for key in state_of(golden, SMALL) if key not in state}
    assert all(f"- {key} " in str(error.value) for key in ours)
    assert all(f"+ {key} " in str(error.value) for key in state if key not in state_of(golden, SMALL))
    with pytest.raises(UsageError, match=r"width 0\.6; it has them for width 0\.5 \(mobilenetv3_small_050\), 0\.75 \("):
        start("mobilenet_v3_s", MobileNetV3S(width=0.6), ("a", "b", "c"), path)
    with pytest.raises(UsageError, match=r"nothing to start .* expected a safetensors file of timm's mobilenetv3_small_050 or"):
        start("mobilenet_v3_s", small, ("a", "b", "c"), tmp_path / "none")
    save_file({"params/adv/bias": np.zeros(3, np.float32)}, path)
    with pytest.raises(UsageError, match="arrays of a w2s student"):
        start("mobilenet_v3_s", small, ("a", "b", "c"), path)
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(UsageError, match="pickle"):
        start("mobilenet_v3_s", small, ("a", "b", "c"), path)


def test_what_a_student_takes_over_from_another(run, labels):
    student, variables, about = checkpoint.load_student(run[0])
    taken, _ = convert.start("wav2small", student, labels.dimensions, run[0])
    jax.tree.map(np.testing.assert_array_equal, taken, variables)
    renamed, whence = convert.start(
        "wav2small", models.build("wav2small", channels=2, dimensions=1), ("quality",), run[0] / "student"
    )
    assert set(variables["params"]) - set(renamed["params"]) == {"adv"}
    assert whence["source"] == "student"
    with pytest.raises(MismatchError, match=r"channels: 2 there, 13 here; n_fft: 64 there, 128 here"):
        convert.start("wav2small", models.build("wav2small", n_fft=128), labels.dimensions, run[0])
    with pytest.raises(MismatchError, match="student: wav2small there, wav2small_17k here"):
        convert.start("wav2small_17k", models.build("wav2small_17k", channels=2), labels.dimensions, run[0])
    with pytest.raises(UsageError, match="is a file, from which wav2small cannot start; expected the directory of"):
        convert.start("wav2small", student, labels.dimensions, run[0] / "student" / "model.safetensors")
    with pytest.raises(UsageError, match="no student at .*; to start wav2small, give the directory of"):
        convert.start("wav2small", student, labels.dimensions, run[0] / "tensorboard")


def test_what_a_student_takes_over_from_the_published_17k(tmp_path):
    golden = np.load(GOLDEN / "wav2small_17k.npz")
    state = {key.removeprefix("weight/"): golden[key] for key in golden.files if key.startswith("weight/")}
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    emotion = ("arousal", "dominance", "valence")
    taken, about = convert.start("wav2small_17k", models.build("wav2small_17k"), emotion, path)
    np.testing.assert_allclose(models.build("wav2small_17k").apply(taken, golden["wave"]), golden["logits"], atol=1e-5)
    assert about == {
        "source": "model.safetensors",
        "fingerprint": fingerprint(path),
        "what": "audEERING Wav2Small 17K",
        "licence": "CC BY-NC-SA 4.0",
    }
    renamed, _ = convert.start("wav2small_17k", models.build("wav2small_17k"), ("clarity", "noise", "quality"), path)
    assert set(taken["params"]) - set(renamed["params"]) == {"adv"}
    with pytest.raises(UsageError, match="hop: 32 there, 48 here"):
        convert.start("wav2small_17k", models.build("wav2small_17k", hop=48), emotion, path)
