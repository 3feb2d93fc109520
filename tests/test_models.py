"""Students against the paper's counts, librosa, and a PyTorch implementation with the same weights."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import librosa
import numpy as np
import optax
import pytest
from conftest import voice
from flax.traverse_util import flatten_dict, unflatten_dict

from w2s_jax import checkpoint, models
from w2s_jax.errors import UsageError, W2SError
from w2s_jax.models import forms, mobilenet
from w2s_jax.models.frontend import LogMel, fourier_kernels, mel_matrix, normalise
from w2s_jax.models.norm import BatchNorm
from w2s_jax.models.pooling import max_pool

GOLDEN = Path(__file__).parent / "golden" / "wav2small.npz"
FORMS = [form for form in forms.CHOICES if form not in ("auto", "native")]  # "native" is float32 only: test_native.py
PEER = Path(__file__).parents[2] / "shared" / "peers" / "torch_wav2small.py"


def test_counts_are_the_papers():
    assert models.count(models.build("wav2small")) == {"trained": 67_577, "fixed": 72_659 - 67_577}


def test_17k_counts_are_the_model_cards():
    # 17,244 is with a 4-class head on the same 338 features, 338·4 + 4 more (arXiv 2408.13920's second model card)
    counts = models.count(models.build("wav2small_17k"))
    assert counts["trained"] + counts["fixed"] + 338 * 4 + 4 == 17_244


@pytest.mark.parametrize("preset", [*models.PRESETS.values(), {"n_fft": 144, "hop": 72, "n_mels": 40}])
def test_logmel_is_librosas(preset):
    n_fft, hop, n_mels = preset["n_fft"], preset["hop"], preset["n_mels"]
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


def check_against(golden, form: str = "direct") -> None:
    student, variables = models.build("wav2small", form=form), flax_variables(golden)
    np.testing.assert_allclose(student.apply(variables, golden["wave"]), golden["logits"], atol=1e-5, rtol=1e-5)
    image = LogMel().apply({"frontend": variables["frontend"]["logmel"]}, normalise(golden["wave"]))
    np.testing.assert_allclose(image, golden["logmel"], atol=1e-3)
    fixed = variables["frontend"]["logmel"]
    np.testing.assert_allclose(fixed["real"].T, golden["weight/logmel.real.weight"][:, 0], atol=1e-6)
    np.testing.assert_allclose(fixed["imag"].T, golden["weight/logmel.imag.weight"][:, 0], atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_forward_is_the_torch_peers_golden(form):
    check_against(np.load(GOLDEN), form)


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


#: Nearly all of a test's time can be XLA's.
CARELESS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
#: Fields of the search space, each away from its default at least once.
FIELDS = {
    "shallow": {"before": 2, "after": 2},
    "nothing behind the pool": {"before": 1, "after": 0, "n_mels": 13},
    "wide kernel": {"kernel": 5, "before": 2, "after": 1},
    "stride": {"stride": 2, "pooling": "mean"},
    "stride that leaves places out": {"stride": 3, "kernel": 1, "pooling": "statistics", "hop": 64, "n_fft": 128},
}


def varied(fields: dict, name: str = "wav2small"):
    """A small student with these fields, random variables, and two waves of 0.2 s."""
    student = models.build(name, channels=4, **fields)
    wave = np.stack([voice(0.2, 1), voice(0.2, 2)])
    return student, drawn(student, wave), wave


def drawn(student, wave: np.ndarray) -> dict:
    """Random variables of a student, but for its front end; nothing is compiled."""
    rng = np.random.default_rng(7)
    flat = flatten_dict(jax.eval_shape(student.init, jax.random.key(0), wave))
    for path, leaf in flat.items():
        if path[-1] == "kernel":
            flat[path] = rng.standard_normal(leaf.shape) / np.sqrt(leaf.size / leaf.shape[-1])
        elif path[-1] in ("scale", "var"):  # those of an untrained BatchNorm would hide mistakes
            flat[path] = rng.uniform(0.5, 1.5, leaf.shape)
        elif path[-1] in ("bias", "mean"):
            flat[path] = rng.standard_normal(leaf.shape)
    real, imag = fourier_kernels(student.n_fft)
    fixed = {"real": real, "imag": imag, "mel": mel_matrix(student.n_fft, student.n_mels)}
    flat |= {("frontend", "logmel", key): array for key, array in fixed.items()}
    return jax.tree.map(np.float32, unflatten_dict(flat))


def logits_and_image(student, variables: dict, wave: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the student says, and the log-mel image [B, time, mel] that its trunk saw (which has tests of its own)."""

    def run(variables, wave):
        return student.apply(
            variables, wave, capture_intermediates=lambda module, _: isinstance(module, LogMel), mutable=["intermediates"]
        )

    logits, seen = jax.jit(run)(variables, wave)
    return np.asarray(logits), np.asarray(seen["intermediates"]["logmel"]["__call__"][0])


def by_hand(student, variables: dict, image: np.ndarray) -> np.ndarray:
    """What the fields say of an image, in NumPy and float64: logits [B, dimensions]."""
    windows = np.lib.stride_tricks.sliding_window_view
    params, stats = (jax.tree.map(lambda a: np.asarray(a, np.float64), variables[c]) for c in ("params", "batch_stats"))
    x, pad = image[..., None].astype(np.float64), student.kernel // 2
    for layer in range(1, student.before + student.after + 1):
        block, moments = params["vgg7"].pop(f"l{layer}"), stats["vgg7"].pop(f"l{layer}")["norm"]
        seen = windows(np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0))), (student.kernel, student.kernel), (1, 2))
        if layer == 1:
            seen = seen[:, :: student.stride, :: student.stride]
        x = np.einsum("btmcij,ijco->btmo", seen, block["conv"]["kernel"])
        x = (x - moments["mean"]) / np.sqrt(moments["var"] + 1e-5) * block["norm"]["scale"] + block["norm"]["bias"]
        x = np.maximum(x, 0)
        if layer == student.before:
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
            x = windows(padded, (3, 3), (1, 2))[:, ::2, ::2].max(axis=(-1, -2))
    assert not params["vgg7"]  # no block is left over
    dense = lambda x, part: x @ part["kernel"].reshape(x.shape[-1], -1) + part["bias"]  # noqa: E731
    attention = getattr(student, "pooling", "attention") == "attention"
    if "mix" in params:
        x = dense(x, params["mix"]).swapaxes(2, 3).reshape(*x.shape[:2], -1)
    if attention:
        weight = np.exp(dense(x, params["pool"]["sof"]))
        x = (dense(x, params["pool"]["lin"]) * weight).sum(axis=1) / weight.sum(axis=1)
    elif student.pooling == "mean":
        x = x.mean(axis=1)
    else:
        x = np.concatenate([x.mean(axis=1), np.sqrt(x.var(axis=1) + 1e-5)], axis=1)
    if "mix" not in params:
        x = np.concatenate([x.swapaxes(1, 2), x.swapaxes(1, 2) @ x], axis=2).reshape(len(x), -1)
    return dense(x, params["adv"])


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_fields_do_what_they_say(fields):
    student, variables, wave = varied(fields)
    logits, image = logits_and_image(student, variables, wave)
    np.testing.assert_allclose(logits, by_hand(student, variables, image), rtol=1e-5, atol=1e-5)


def test_17k_has_the_same_fields():
    fields = {"before": 2, "after": 1, "kernel": 5, "stride": 2}
    student, variables, wave = varied(fields, "wav2small_17k")
    logits, image = logits_and_image(student, variables, wave)
    expected = by_hand(student, variables, image)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())  # X·Xᵀ is in the hundreds


@pytest.mark.torch
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_fields_are_torchs(fields):
    torch = pytest.importorskip("torch")
    from torch import nn

    student, variables, wave = varied(fields)
    logits, image = logits_and_image(student, variables, wave)
    params, stats = variables["params"], variables["batch_stats"]
    tensor = lambda array: torch.from_numpy(np.array(array))  # noqa: E731
    layers, inputs = [], 1
    for layer in range(1, student.before + student.after + 1):
        stride = student.stride if layer == 1 else 1
        convolution = nn.Conv2d(inputs, 4, student.kernel, stride, padding=student.kernel // 2, bias=False)
        convolution.weight.data = tensor(params["vgg7"][f"l{layer}"]["conv"]["kernel"].transpose(3, 2, 0, 1))
        norm = nn.BatchNorm2d(4)
        norm.weight.data, norm.bias.data = (tensor(params["vgg7"][f"l{layer}"]["norm"][n]) for n in ("scale", "bias"))
        norm.running_mean, norm.running_var = (tensor(stats["vgg7"][f"l{layer}"]["norm"][n]) for n in ("mean", "var"))
        layers += [convolution, norm, nn.ReLU()] + [nn.MaxPool2d(3, 2, 1)] * (layer == student.before)
        inputs = 4
    linear = lambda x, part: x @ tensor(part["kernel"]) + tensor(part["bias"])  # noqa: E731
    with torch.no_grad():
        x = nn.Sequential(*layers).eval()(tensor(image)[:, None])
        x = nn.functional.conv2d(x, tensor(params["mix"]["kernel"].transpose(3, 2, 0, 1)), tensor(params["mix"]["bias"]))
        x = x.permute(0, 2, 1, 3).flatten(2)  # [B, time, channels × mel]
        if student.pooling == "attention":
            x = (linear(x, params["pool"]["lin"]) * linear(x, params["pool"]["sof"]).softmax(1)).sum(1)
        elif student.pooling == "mean":
            x = x.mean(1)
        else:
            x = torch.cat([x.mean(1), (x.var(1, unbiased=False) + 1e-5).sqrt()], 1)
        expected = linear(x, params["adv"]).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["attention", "mean", "statistics"])
def test_gradients_are_finite(pooling):
    student, variables, wave = varied({"pooling": pooling, "stride": 2, "before": 1, "after": 1})
    # the second utterance is silent: nothing changes over time, where a bare standard deviation has no gradient
    wave = wave * np.array([[1.0], [0.0]], np.float32)

    def loss(params):
        logits, _ = student.apply({**variables, "params": params}, wave, train=True, mutable=["batch_stats"])
        return jnp.square(logits).sum()

    gradients = flatten_dict(jax.jit(jax.grad(loss))(variables["params"]))
    for path, gradient in gradients.items():
        assert np.isfinite(gradient).all(), path
        # the softmax over time does not change with the bias of its input
        assert path == ("pool", "sof", "bias") or np.abs(gradient).max() > 0, path


def image_and_kernel(shape, channels: int, size: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image, a kernel, and weights of the result, so that a loss has other gradients from place to place."""
    rng = np.random.default_rng(0)
    arrays = (shape, (size, size, shape[-1], channels), (*shape[:-1], channels))
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in arrays)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "direct"])
@pytest.mark.parametrize(("shape", "channels", "size"), [
    ((2, 9, 26, 13), 13, 3), ((2, 5, 13, 13), 13, 3), ((1, 1, 26, 1), 8, 3), ((3, 4, 7, 3), 16, 3), ((1, 3, 1, 2), 5, 3),
    ((2, 6, 10, 2), 3, 5),
])  # fmt: skip
def test_forms_of_a_convolution_are_equal(form, shape, channels, size):
    x, kernel, weight = image_and_kernel(shape, channels, size)

    def run(x, kernel, weight, layer):
        def loss(x, kernel):
            y = layer.apply({"params": {"kernel": kernel}}, x)
            return (weight * y).sum(), y

        gradients, y = jax.grad(loss, (0, 1), has_aux=True)(x, kernel)
        return y, *gradients

    run = jax.jit(run, static_argnums=3)
    expected = run(x, kernel, weight, nn.Conv(channels, (size, size), padding=size // 2, use_bias=False))
    for ours, theirs in zip(run(x, kernel, weight, forms.FormedConvolution(channels, size, form=form)), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.torch
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 9, 26, 13), (2, 5, 13, 13), (1, 1, 26, 1), (3, 4, 15, 8)])
def test_forms_of_a_convolution_are_torchs(form, shape):
    torch = pytest.importorskip("torch")
    arrays = image_and_kernel(shape, 13)
    image, weights, factor = (torch.from_numpy(array).double().requires_grad_() for array in arrays)
    y = torch.nn.functional.conv2d(image.permute(0, 3, 1, 2), weights.permute(3, 2, 0, 1), padding=1).permute(0, 2, 3, 1)
    (factor * y).sum().backward()
    layer = forms.FormedConvolution(13, form=form)
    ours, pullback = jax.vjp(lambda x, kernel: layer.apply({"params": {"kernel": kernel}}, x), *arrays[:2])
    for array, tensor in zip((ours, *pullback(arrays[2])), (y.detach(), image.grad, weights.grad), strict=True):
        np.testing.assert_allclose(array, tensor, rtol=1e-5, atol=1e-5 * tensor.abs().max().item())


@pytest.mark.parametrize("name", ["wav2small", "wav2small_17k"])
def test_how_it_runs_is_not_what_it_is(name, tmp_path):
    fields = {"channels": 4, "before": 1, "after": 1}
    plain = models.build(name, **fields)
    wave = jax.ShapeDtypeStruct((2, 1600), jnp.float32)
    for form in forms.CHOICES:
        student = models.build(name, **fields, form=form, dtype="bfloat16")
        shapes = [jax.eval_shape(module.init, jax.random.key(0), wave) for module in (student, plain)]
        assert shapes[0] == shapes[1]
        assert models.macs(student, 1600) == models.macs(plain, 1600)
    assert set(forms.FORMS.values()) <= set(FORMS)
    given = drawn(plain, wave)
    about = {
        "dimensions": ["a", "b", "c"],
        "teacher": {"name": "none", "licence": "none", "fingerprint": "0" * 16, "stand_in": False},
    }
    checkpoint.save_student(tmp_path, name, {**fields, "form": "blocks", "dtype": "bfloat16", "axis_name": "i"}, given, about)
    loaded, variables, config = checkpoint.load_student(tmp_path)
    assert config["fields"] == fields
    assert loaded == plain
    jax.tree.map(np.testing.assert_array_equal, variables, given)


def test_layers_start_as_flax_has_them():
    x, key = np.ones((1, 4, 5, 3), np.float32), jax.random.key(1)
    pairs = [
        (forms.FormedConvolution(6, form="blocks"), nn.Conv(6, (3, 3), use_bias=False)),
        (forms.Dense(6), nn.Dense(6)),
        (forms.Dense(6, axes=2), nn.Conv(6, (1, 1))),
    ]
    for ours, theirs in pairs:
        jax.tree.map(np.testing.assert_array_equal, ours.init(key, x), theirs.init(key, x))


def equations(jaxpr):
    """All equations of a jaxpr and of those in it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in equation.params.values():
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def training_gradient(student, variables: dict, wave):
    """A function of the parameters: gradient, changed statistics and logits of a training step."""

    def loss(params):
        logits, changed = student.apply({**variables, "params": params}, wave, train=True, mutable=["batch_stats"])
        return jnp.square(logits - jnp.arange(logits.shape[0])[:, None]).mean(), (changed["batch_stats"], logits)

    return jax.grad(loss, has_aux=True)


class EveryRow(mobilenet.MobileNetStudent):
    """A MobileNet with each kind of row once."""

    architecture = mobilenet.Architecture(
        stem=mobilenet.Conv(3, 2, 8, mobilenet.hard_swish),
        fixed_stem_below=1.0,
        stages=(
            (mobilenet.Separable(3, 1, 8, True, mobilenet.relu), mobilenet.Fused(3, 2, 2, 16)),
            (mobilenet.Bottleneck(5, 2, 2, 16, True, mobilenet.hard_swish), mobilenet.Universal(3, 5, 1, 2, 16)),
        ),
    )


BFLOAT16 = {
    **{f"wav2small {form}": partial(models.build, "wav2small", form=form) for form in FORMS},
    **{pooling: partial(models.build, "wav2small", form="direct", pooling=pooling) for pooling in ("mean", "statistics")},
    "wav2small_17k": partial(models.build, "wav2small_17k", form="direct"),
    "every row of a mobilenet": EveryRow,
    "cnn14": partial(models.build, "cnn14"),
}


@pytest.mark.parametrize("build", BFLOAT16.values(), ids=BFLOAT16)
def test_bfloat16_is_what_lies_between_layers_and_nothing_else(build):
    student, plain, bfloat16, float32 = build(dtype="bfloat16"), build(), {jnp.dtype("bfloat16")}, {jnp.dtype("float32")}
    wave = jax.ShapeDtypeStruct((2, 16_000), jnp.float32)
    variables = jax.eval_shape(student.init, jax.random.key(0), wave)  # nothing is computed

    def step(variables, wave):
        return training_gradient(student, variables, wave)(variables["params"])

    def layers(variables, wave):
        wanted = lambda module, _: isinstance(module, (BatchNorm, mobilenet.Block))  # noqa: E731
        return student.apply(variables, wave, capture_intermediates=wanted, mutable=["intermediates"])[1]

    jaxpr, out = jax.make_jaxpr(step, return_shape=True)(variables, wave)
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, out))} == float32  # parameters, gradients, statistics, logits
    normed = jax.eval_shape(layers, variables, wave)["intermediates"]
    normed.pop("norm", None)  # CNN14's own front end
    assert {leaf.dtype for leaf in jax.tree.leaves(normed)} == bfloat16
    sums, images = set(), set()
    for equation in equations(jaxpr.jaxpr):
        kinds = {operand.aval.dtype for operand in (*equation.invars, *equation.outvars)}
        if equation.primitive.name == "reduce_sum":
            sums |= kinds
        # the Fourier transform is a convolution of rows; the gates of squeeze-excite are images of one place
        elif equation.primitive.name == "conv_general_dilated" and len(equation.outvars[0].aval.shape) == 4:
            images |= kinds if math.prod(equation.invars[0].aval.shape[1:3]) > 1 else set()
    assert sums == float32
    assert images <= bfloat16  # none where a CPU computes them as matrix products

    def kept(student) -> int:
        """Bytes that wait for the backward pass."""

        def pullback(variables, wave):
            run = lambda params: student.apply({**variables, "params": params}, wave, train=True, mutable=["batch_stats"])  # noqa: E731
            return jax.vjp(run, variables["params"], has_aux=True)[1]

        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(pullback, variables, wave)))

    assert kept(student) < 0.6 * kept(plain)  # half, but for the pooling over time and the gates


def check_bfloat16(name: str, fields: dict, waves: np.ndarray, logits: float, gradient: float) -> None:
    """Norms of the differences, relative to those of the float32 results, stay below the bounds ``logits`` and ``gradient``."""
    results = []
    for dtype in forms.DTYPES:
        student = models.build(name, **fields, dtype=dtype)
        variables = drawn(student, waves)
        run = jax.jit(training_gradient(student, variables, waves), compiler_options=CARELESS)
        results.append(run(variables["params"]))
    (slope, (stats, said)), (rounded_slope, (rounded_stats, rounded_said)) = results
    for rounded, exact, bound in (
        (rounded_said, said, logits), (rounded_stats, stats, 0.01), (rounded_slope, slope, gradient)
    ):  # fmt: skip
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(rounded))
        difference = optax.tree.norm(jax.tree.map(jnp.subtract, rounded, exact)) / optax.tree.norm(exact)
        assert 0 < difference < bound


# bfloat16 has 8 bits: every layer adds an error of up to 2^-9 of each value, 0.2 %, independent of one another; gradients
# gather those of both ways, and where a value crosses 0 its ReLU lets through another gradient
@pytest.mark.parametrize(("name", "fields"), [
    ("wav2small", {"channels": 8, "before": 1, "after": 1}), ("wav2small_17k", {"channels": 8, "before": 1, "after": 0}),
])  # fmt: skip
def test_bfloat16_is_float32_but_for_rounding(name, fields):
    check_bfloat16(name, fields, np.stack([voice(0.2, seed) for seed in range(3)]), 0.02, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fields", "gradient"), [
    # not MobileNetV4-S: with weights like these, noise of 2^-9 on the parameters alone moves its float32 gradient by 0.91 of it
    ("wav2small", {"form": "direct"}, 0.4), ("wav2small_17k", {}, 0.4), ("mobilenet_v3_s", {"width": 0.25}, 0.4),
])  # fmt: skip
def test_bfloat16_is_float32_but_for_rounding_in_deep_students(name, fields, gradient):
    check_bfloat16(name, fields, np.stack([voice(1.0, seed) for seed in range(8)]), 0.1, gradient)


#: Images [time, mel] whose windows have one maximum, several, or nothing but equals.
TIES = {
    "none": np.random.default_rng(0).standard_normal((9, 26)),
    "few values": np.random.default_rng(1).integers(-2, 3, (31, 13)),
    "after a ReLU": np.random.default_rng(2).integers(-3, 2, (16, 7)).clip(0),
    "silence": np.zeros((8, 26)),
    "low": np.full((5, 6), -100),
    "one frame": np.random.default_rng(3).integers(0, 2, (1, 9)),
    "one bin": np.random.default_rng(4).integers(0, 2, (9, 1)),
    "one place": np.full((1, 1), -1),
}


def pooled(image: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pool of two different images made of this one, [2, time, mel, 1]; its gradient, and of which loss."""
    x = jnp.asarray(np.stack([image, image[::-1]])[..., None], dtype)
    # small whole numbers: their sums are exact in whatever order
    factor = np.random.default_rng(5).integers(1, 9, (2, -(-image.shape[0] // 2), -(-image.shape[1] // 2), 1))

    def run(x, factor):
        y, pullback = jax.vjp(max_pool, x)
        return y, *pullback(factor), max_pool(x)  # without a gradient it is computed otherwise

    y, gradient, alone = jax.jit(run, compiler_options=CARELESS)(x, jnp.asarray(factor, dtype))
    np.testing.assert_array_equal(alone, y)
    return np.asarray(y, np.float32), np.asarray(gradient, np.float32), factor


@pytest.mark.parametrize("dtype", forms.DTYPES)
@pytest.mark.parametrize("image", TIES.values(), ids=TIES)
def test_the_first_maximum_has_the_gradient(image, dtype):
    y, gradient, factor = pooled(image, dtype)
    x = np.asarray(jnp.asarray(np.stack([image, image[::-1]]), dtype), np.float32)
    expected, highest = np.zeros_like(gradient), np.zeros_like(y)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    for place in np.ndindex(y.shape[:3]):
        batch, time, mel = place
        window = padded[batch, 2 * time : 2 * time + 3, 2 * mel : 2 * mel + 3]
        row, column = np.unravel_index(window.argmax(), window.shape)  # argmax takes the first, row by row
        highest[place] = window[row, column]
        expected[batch, 2 * time + row - 1, 2 * mel + column - 1] += factor[place]
    np.testing.assert_array_equal(y, highest)
    np.testing.assert_array_equal(gradient, expected)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", forms.DTYPES)
@pytest.mark.parametrize("image", TIES.values(), ids=TIES)
def test_the_pool_is_torchs(image, dtype):
    torch = pytest.importorskip("torch")
    y, gradient, factor = pooled(image, dtype)
    x = torch.tensor(np.stack([image, image[::-1]])[:, None], dtype=getattr(torch, dtype), requires_grad=True)
    theirs = torch.nn.functional.max_pool2d(x, 3, 2, 1)
    theirs.backward(torch.tensor(factor).movedim(-1, 1).to(x.dtype))
    np.testing.assert_array_equal(y, theirs.detach().float().movedim(1, -1))
    np.testing.assert_array_equal(gradient, x.grad.float().movedim(1, -1))


def test_counts_follow_the_fields():
    counts = models.count(models.build("wav2small", channels=8, before=2, after=1, kernel=5, n_mels=20, pooling="statistics"))
    blocks = 25 * 8 + 2 * 25 * 8 * 8 + 3 * 2 * 8
    assert counts["trained"] == blocks + (8 * 8 + 8) + (2 * 8 * 10 * 3 + 3)  # 20 bands are 10 behind the pool
    assert counts["fixed"] == 2 * 33 * 64 + 33 * 20


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("wav2small", {"before": 0}, "before is 0; expected a whole number of at least 1"),
        ("wav2small_17k", {"before": 2.0}, "before is 2.0; expected a whole number"),
        ("wav2small", {"after": -1}, "after is -1; expected a whole number of at least 0"),
        ("wav2small", {"kernel": 4}, "kernel is 4; expected an odd number"),
        ("wav2small_17k", {"kernel": -3}, "kernel is -3; expected a whole number of at least 1"),
        ("wav2small", {"stride": 0}, "stride is 0; expected a whole number of at least 1"),
        ("wav2small", {"channels": "13"}, "channels is '13'; expected a whole number"),
        ("wav2small", {"pooling": "max"}, "pooling is 'max'; expected one of attention, mean, statistics"),
        ("wav2small_17k", {"pooling": "mean"}, "no field pooling"),
        ("wav2small", {"form": "block"}, "form is 'block'; expected one of auto, direct, blocks, native"),
        ("mobilenet_v4_s", {"form": "blocks"}, "no field form"),
        ("cnn14", {"dtype": "float16"}, "dtype is 'float16'; expected one of float32, bfloat16"),
    ],
)
def test_fields_that_make_no_network_are_refused(name, fields, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        models.build(name, **fields)


def test_macs_are_those_counted_by_hand():
    # 5 s: 1 + (80,000 - 64) // 32 = 2,499 frames of 26 bands, 1,250 of 13 behind the pool. The paper says 0.4 G.
    layers = {
        "Fourier transform": 2499 * 64 * 66,
        "mel": 2499 * 33 * 26,
        "l1": 2499 * 26 * 9 * 13,
        "l2, l3": 2 * 2499 * 26 * 9 * 13 * 13,
        "l4 to l7": 4 * 1250 * 13 * 9 * 13 * 13,
        "mix": 1250 * 13 * 13 * 13,
        "lin, sof": 2 * 1250 * 169 * 169,
        "adv": 169 * 3,
    }
    assert models.macs(models.build("wav2small")) == sum(layers.values())
    # 17K: lin and sof are 1×1 convolutions, and X·Xᵀ is 13 × 13 × 13
    layers |= {"mix": 0, "lin, sof": 2 * 1250 * 13 * 13 * 13, "gram": 13**3, "adv": 338 * 3}
    assert models.macs(models.build("wav2small_17k")) == sum(layers.values())


def test_macs_follow_the_fields():
    student = models.build("wav2small", channels=8, before=1, after=1, kernel=5, stride=2, pooling="mean")
    # 1 s: 499 frames of 26 bands, 250 of 13 behind the stride, 125 of 7 behind the pool
    trunk = 250 * 13 * 25 * 8 + 125 * 7 * 25 * 8 * 8
    assert models.macs(student, 16_000) == 499 * (64 * 66 + 33 * 26) + trunk + 125 * 7 * 8 * 8 + 56 * 3
    with pytest.raises(UsageError, match="samples is 63; Wav2Small needs at least 64"):
        models.macs(student, 63)


@pytest.mark.parametrize(("kernel", "stride", "depthwise"), [(1, 1, False), (3, 2, False), (5, 2, True), (3, 1, True)])
def test_what_is_counted_is_what_is_computed(kernel, stride, depthwise):
    # macs() puts this operator in the place of whatever the backend computes fastest
    module = mobilenet.Convolution(6, kernel, stride, depthwise)
    x = np.random.default_rng(0).standard_normal((2, 9, 8, 6)).astype(np.float32)
    expected, variables = module.init_with_output(jax.random.key(0), x)
    plain = mobilenet.convolution(x, variables["params"]["kernel"], stride)
    np.testing.assert_allclose(plain, expected, rtol=1e-5, atol=1e-5)


def mobilenet_macs(architecture: mobilenet.Architecture, frames: int, mel: int) -> int:
    """A trunk's multiply-accumulates, row by row of its table."""
    total, channels = 0, 1

    def convolve(kernel: int, stride: int, inputs: int, outputs: int) -> None:  # inputs: per output channel
        nonlocal total, frames, mel
        frames, mel = -(-frames // stride), -(-mel // stride)
        total += frames * mel * kernel * kernel * inputs * outputs

    convolve(architecture.stem.kernel, architecture.stem.stride, channels, architecture.stem.channels)
    channels = architecture.stem.channels
    for row in (row for stage in architecture.stages for row in stage):
        wide = mobilenet.round_channels(channels * getattr(row, "expansion", 1))
        if isinstance(row, mobilenet.Conv):
            convolve(row.kernel, row.stride, channels, row.channels)
            channels = row.channels
            continue
        if isinstance(row, mobilenet.Separable):
            convolve(row.kernel, row.stride, 1, channels)
        elif isinstance(row, mobilenet.Bottleneck):
            convolve(1, 1, channels, wide)
            convolve(row.kernel, row.stride, 1, wide)
        elif isinstance(row, mobilenet.Fused):
            convolve(row.kernel, row.stride, channels, wide)
        else:
            if row.before:
                convolve(row.before, 1 if row.middle else row.stride, 1, channels)
            convolve(1, 1, channels, wide)
            if row.middle:
                convolve(row.middle, row.stride, 1, wide)
        if getattr(row, "squeeze", False):
            total += 2 * wide * mobilenet.round_channels(wide / 4)
        convolve(1, 1, wide, row.channels)
        channels = row.channels
    return total + 2 * frames * mel * channels * channels + channels * 3  # attention pooling, and the output


@pytest.mark.parametrize(
    ("name", "architecture"), [("mobilenet_v3_s", mobilenet.V3_SMALL), ("mobilenet_v4_s", mobilenet.V4_SMALL)]
)
def test_mobilenet_macs_are_those_of_its_table(name, architecture):
    # depthwise convolutions count as what they are, also where they are computed as sums of shifted products
    expected = 499 * (64 * 66 + 33 * 26) + mobilenet_macs(architecture, 499, 26)
    assert models.macs(models.build(name), 16_000) == expected


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


@pytest.mark.slow
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


def hostile_configs():
    """A student's config.json with one thing changed: (where, value)."""
    values = (
        None,
        True,
        -1,
        0,
        4.5,
        1e308,
        float("nan"),
        10**30,
        "",
        "\x1b[2J",
        "x" * 70,
        [],
        [3],
        {},
        {"a": 1},
        ["a", "a", "a"],
    )
    keys = ("version", "student", "fields", "sampling_rate", "dimensions", "teacher", "pretrained", "validation_ccc")
    places = [(key,) for key in keys] + [("teacher", key) for key in ("name", "fingerprint", "licence", "stand_in")]
    fields = models.STUDENTS["wav2small"].__dataclass_fields__
    places += [("fields", field) for field in fields if field not in ("parent", "name")] + [
        ("fields", "a\nb"),
        ("fields", "parent"),
    ]
    places += [("pretrained", key) for key in ("what", "source", "fingerprint", "licence")] + [("validation_ccc", "a")]
    return [(place, value) for place in places for value in values]


def test_a_strangers_config_is_refused_in_one_line(tmp_path):
    """Every key with every hostile value: an error of ours, or a student that has what it promises."""
    plain = models.build("wav2small", channels=2, before=1, after=0)
    given = drawn(plain, jax.ShapeDtypeStruct((1, 1600), jnp.float32))
    about = {
        "dimensions": ["a", "b", "c"],
        "teacher": {"name": "none", "licence": "none", "fingerprint": "0" * 16, "stand_in": False},
        "pretrained": {"what": "w", "source": "s", "fingerprint": "f", "licence": "l"},
        "validation_ccc": {"a": 0.5, "b": 0.5, "c": 0.5},
    }
    checkpoint.save_student(tmp_path, "wav2small", {"channels": 2, "before": 1, "after": 0}, given, about)
    good = json.loads((tmp_path / "config.json").read_text())
    good.pop("checksum")
    refused = 0
    for place, value in hostile_configs():
        config = json.loads(json.dumps(good))
        inner = config
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        (tmp_path / "config.json").write_text(json.dumps(config))
        try:
            student, variables, read = checkpoint.load_student(tmp_path)
            assert student.dimensions == len(set(read["dimensions"])) == 3, place
        except W2SError as error:
            refused += 1
            assert "\n" not in str(error), (place, value)
            assert "\x1b" not in str(error), (place, value)
    assert refused > 300


def test_a_students_files_are_checked(tmp_path):
    plain = models.build("wav2small", channels=2, before=1, after=0)
    about = {
        "dimensions": ["a", "b", "c"],
        "teacher": {"name": "none", "licence": "none", "fingerprint": "0" * 16, "stand_in": False},
    }
    given = drawn(plain, jax.ShapeDtypeStruct((1, 1600), jnp.float32))
    checkpoint.save_student(tmp_path, "wav2small", {"channels": 2, "before": 1, "after": 0}, given, about)
    config, weights = (tmp_path / name for name in ("config.json", "model.safetensors"))
    kept = {path: path.read_bytes() for path in (config, weights)}
    damaged = bytearray(kept[weights])
    damaged[-5] ^= 4
    weights.write_bytes(damaged)
    with pytest.raises(W2SError, match="model.safetensors is damaged: its fingerprint is .* copy it again"):
        checkpoint.load_student(tmp_path)
    weights.write_bytes(kept[weights])
    config.write_bytes(kept[config].replace(b'"b"', b'"q"'))
    with pytest.raises(W2SError, match="config.json is damaged, or was changed by hand"):
        checkpoint.load_student(tmp_path)
    config.write_bytes(kept[config].replace(b'"version": 1', b'"version": 99'))
    with pytest.raises(W2SError, match="has version 99, expected 1"):
        checkpoint.load_student(tmp_path)
    old = {key: value for key, value in json.loads(kept[config]).items() if key not in ("weights", "checksum")}
    config.write_text(json.dumps(old))  # as 0.1 wrote it
    assert checkpoint.load_student(tmp_path)[0] == plain
