"""MobileNet trunks against timm with the same weights, their counts, and their training step."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import voice
from golden.mobilenet import SEEDS, SIZES, image, state_of
from safetensors.numpy import save_file

from w2s_jax.convert import TIMM, start, timm_trunk
from w2s_jax.models import build
from w2s_jax.models.frontend import LogMel
from w2s_jax.models.mobilenet import (
    BatchNorm,
    Convolution,
    MobileNetV3L,
    MobileNetV3S,
    MobileNetV4L,
    MobileNetV4M,
    MobileNetV4S,
    Trunk,
    convolution,
    hard_swish,
)

GOLDEN = Path(__file__).parent / "golden" / "mobilenet.npz"
SMALL = "mobilenetv3_small_050"
#: What is compared in every run; the scaled ones and the largest, 120 MB of weights, are marked slow.
SMALLER = ("mobilenetv3_small_100", "mobilenetv4_conv_small")
LARGER = ("mobilenetv3_large_100", "mobilenetv4_conv_medium")
#: Nearly all of the time goes into compiling, which XLA can do carelessly.
careless = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


def size(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def trunk_shapes(*fields) -> dict:
    return jax.eval_shape(Trunk(*fields).init, jax.random.key(0), jnp.zeros((1, 64, 26, 1)))


@pytest.mark.parametrize(
    ("student", "trunk", "total"),
    # trunks: timm 1.0.31's with in_chans=1 and without head. Totals: with C channels out of the trunk, 2 · (C² + C) of the
    # pooling, 3 · C + 3 of the output and 5,082 of Wav2Small's front end on top. The paper says 3.12M of V4-S
    [
        (MobileNetV3S, 926_720, 1_598_237),
        (MobileNetV3L, 2_971_664, 4_824_749),
        (MobileNetV4S, 1_261_088, 3_114_173),
        (MobileNetV4M, 7_202_576, 9_055_661),
        (MobileNetV4L, 30_078_072, 31_931_157),
    ],
)
def test_counts_are_timms_and_the_papers(student, trunk, total):
    # n_fft samples, which are one frame, are the fewest
    logits, shapes = jax.eval_shape(student(dimensions=3).init_with_output, jax.random.key(0), jnp.zeros((2, 64)))
    assert logits.shape == (2, 3)
    assert set(shapes) == {"params", "batch_stats", "frontend"}
    assert size(shapes["params"]["trunk"]) == trunk
    assert size(shapes["frontend"]) == 5_082
    assert size(shapes["params"]) + size(shapes["frontend"]) == total


@pytest.mark.parametrize(
    ("student", "width", "trunk"),
    # timm 1.0.31's, as above: mobilenetv3_small_050, mobilenetv3_large_075, mobilenetv4_conv_small_035, and what its
    # generator of mobilenetv4_conv_medium makes with channel_multiplier=0.5
    [
        (MobileNetV3S, 0.5, 272_000),
        (MobileNetV3L, 0.75, 1_789_360),
        (MobileNetV4S, 0.35, 191_168),
        (MobileNetV4M, 0.5, 1_904_952),
    ],
)
def test_width_counts_are_timms(student, width, trunk):
    assert size(trunk_shapes(student.architecture, width)["params"]) == trunk


def compare(golden, name: str, sizes) -> None:
    variables = timm_trunk(name, state_of(golden, name))
    apply = careless(Trunk(*TIMM[name]).apply)
    for frames, mels in sizes:
        features = apply(variables, image(frames, mels)[None, :, :, None])
        expected = golden[f"features/{name}/{frames}x{mels}"]
        np.testing.assert_allclose(features[0], expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", SMALLER)
def test_features_are_timms(golden, name):
    compare(golden, name, SIZES[:2])


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER)
def test_features_are_timms_one_size(golden, name):
    compare(golden, name, SIZES[:1])


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEDS)
def test_features_are_timms_all_sizes(golden, name):
    compare(golden, name, SIZES)


def draw(student, waves: np.ndarray) -> dict:
    """Variables of a student, by numpy: to compile the random numbers of ``init`` takes longer than all else."""
    rng = np.random.default_rng(0)

    def fill(path, leaf) -> np.ndarray:
        if path[-1].key == "kernel":
            value = rng.standard_normal(leaf.shape) * math.sqrt(1.4 / math.prod(leaf.shape[:-1]))
        elif path[-1].key in ("scale", "var"):
            value = rng.uniform(0.7, 1.3, leaf.shape)
        else:
            value = 0.3 * rng.standard_normal(leaf.shape)
        return value.astype(np.float32)

    shapes = jax.eval_shape(student.init, jax.random.key(0), waves)
    variables = {part: jax.tree_util.tree_map_with_path(fill, shapes[part]) for part in ("params", "batch_stats")}
    return {**variables, "frontend": {"logmel": LogMel().init(jax.random.key(0), waves)["frontend"]}}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "timm"), [("mobilenet_v3_s", SMALL), ("mobilenet_v4_s", "mobilenetv4_conv_small_050")])
def test_step_from_timms_weights_changes_everything(name, timm, golden, tmp_path):
    student = build(name, dimensions=2, width=0.5)
    waves = np.stack([voice(0.4, 1), voice(0.4, 2)])
    save_file(state_of(golden, timm), tmp_path / "model.safetensors")
    taken, _ = start(name, student, ("a", "b"), tmp_path / "model.safetensors")
    variables = {collection: {**tree, **taken.get(collection, {})} for collection, tree in draw(student, waves).items()}

    @careless
    def step(variables, waves):
        def loss(params):
            logits, changed = student.apply({**variables, "params": params}, waves, train=True, mutable=["batch_stats"])
            return jnp.mean((logits - 0.5) ** 2), (logits, changed)

        (value, (logits, changed)), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda param, slope: param - 0.1 * slope, variables["params"], gradient)
        return value, logits, {"params": params, **changed}

    value, logits, after = step(variables, waves)
    assert logits.shape == (2, 2)
    assert np.isfinite(value)
    for part in ("params", "batch_stats"):
        assert jax.tree.structure(after[part]) == jax.tree.structure(variables[part])
        news = jax.tree.leaves(after[part])
        for (path, old), new in zip(jax.tree.leaves_with_path(variables[part]), news, strict=True):
            assert np.isfinite(new).all(), path
            # a block's last shift may come out again in the next BatchNorm, and then has no gradient
            if [key.key for key in path[-3:]] != ["project", "norm", "bias"]:
                # but for the bias of the pooling's softmax, which changes nothing
                assert np.array_equal(old, new) == ("sof" in str(path) and "bias" in str(path)), path


@pytest.mark.parametrize(("size", "stride", "depthwise", "shape"), [
    (3, 1, True, (2, 7, 5, 4)), (5, 2, True, (3, 8, 1, 2)), (5, 2, True, (1, 9, 6, 3)), (3, 2, False, (2, 6, 5, 3)),
    (3, 2, False, (1, 1, 1, 2)), (1, 1, False, (2, 3, 4, 5)),
])  # fmt: skip
def test_forms_for_the_cpu_are_xlas_convolution(size, stride, depthwise, shape):
    layer = Convolution(shape[-1] if depthwise else 6, size, stride, depthwise)
    x = jax.random.normal(jax.random.key(0), shape)
    variables = layer.init(jax.random.key(1), x)
    kernel = variables["params"]["kernel"]
    exact = partial(convolution, stride=stride)
    weight = jax.random.normal(jax.random.key(2), exact(x, kernel).shape)  # a loss whose gradients differ from place to place

    def ours(x, kernel):
        return (weight * layer.apply({"params": {"kernel": kernel}}, x)).sum()

    np.testing.assert_allclose(layer.apply(variables, x), exact(x, kernel), atol=1e-5)
    expected = jax.grad(lambda x, kernel: (weight * exact(x, kernel)).sum(), (0, 1))(x, kernel)
    for ours_, theirs in zip(jax.grad(ours, (0, 1))(x, kernel), expected, strict=True):
        np.testing.assert_allclose(ours_, theirs, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "stride", "depthwise"), [(5, 2, True), (3, 2, False)])
def test_forms_for_the_cpu_are_float32_rounded(size, stride, depthwise):
    layer = Convolution(4, size, stride, depthwise)
    shapes = (size, size, 1 if depthwise else 4, 4), (2, 9, 6, 4)
    kernel, x = (jax.random.normal(jax.random.key(at), shape).astype(jnp.bfloat16) for at, shape in enumerate(shapes))

    def run(dtype):  # the same values in both, which bfloat16 can hold; the parameter is float32 in both
        y, pullback = jax.vjp(
            lambda k, x: layer.apply({"params": {"kernel": k}}, x), kernel.astype(jnp.float32), x.astype(dtype)
        )
        return y, *pullback(jnp.ones_like(y))

    for rounded, exact, dtype in zip(run(jnp.bfloat16), run(jnp.float32), ("bfloat16", "float32", "bfloat16"), strict=True):
        assert rounded.dtype == dtype
        # to 8 bits once, or where patches overlap a few times
        np.testing.assert_allclose(rounded.astype(np.float32), exact, atol=2**-8 * np.abs(exact).max())


def test_batchnorm_moments_are_stable_and_global():
    # a small spread around a large mean, two devices with different data: numpy in float64 says what is right
    rng = np.random.default_rng(0)
    x = (-4000 + 0.25 * rng.standard_normal((2, 3, 5, 4, 2)) + [[[[[0]]]], [[[[1]]]]]).astype(np.float32)
    norm = BatchNorm(axis_name="batch")
    variables = BatchNorm().init(jax.random.key(0), x[0], True)

    def apply(x):
        return norm.apply(variables, x, True, mutable=["batch_stats"])

    y, changed = jax.vmap(apply, axis_name="batch")(x)
    exact = x.astype(np.float64)
    mean, var = exact.mean(axis=(0, 1, 2, 3)), exact.var(axis=(0, 1, 2, 3))
    np.testing.assert_allclose(y, (exact - mean) / np.sqrt(var + 1e-5), atol=5e-3)  # float32 at -4000 has steps of 2.4e-4
    np.testing.assert_allclose(changed["batch_stats"]["mean"], [0.1 * mean] * 2, rtol=1e-5)
    np.testing.assert_allclose(changed["batch_stats"]["var"], [0.9 + 0.1 * var] * 2, rtol=1e-4)


def test_hard_swish_is_the_papers():
    x = np.linspace(-5, 5, 41, dtype=np.float32)
    np.testing.assert_allclose(hard_swish(x), x * np.clip(x + 3, 0, 6) / 6, atol=1e-6)  # arXiv 1905.02244, section 5.2
