"""Plans: the same function as the Flax module for every student, their table, and a student from outside the package."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import voice

for package in ("tensorflow", "tf2onnx"):
    pytest.importorskip(package, reason="needs pip install 'w2s-jax[export]'")
onnx = pytest.importorskip("onnx", reason="needs pip install 'w2s-jax[export]'")

from w2s_jax import checkpoint, config, kinds, models, train  # noqa: E402
from w2s_jax.errors import UsageError  # noqa: E402
from w2s_jax.export import build, direct, export_student, judge  # noqa: E402
from w2s_jax.export import onnx as graph  # noqa: E402
from w2s_jax.export import plan as plans  # noqa: E402
from w2s_jax.export.deploy import apply, as_float32, deploy, forward  # noqa: E402
from w2s_jax.models import plan  # noqa: E402
from w2s_jax.runtime import Predictor  # noqa: E402

#: Every student, small, and each pooling.
STUDENTS = {
    "attention": ("wav2small", {"channels": 5, "n_mels": 20, "before": 2, "after": 1}),
    "mean": ("wav2small", {"channels": 5, "pooling": "mean", "before": 1, "after": 1, "stride": 2}),
    "statistics": ("wav2small", {"channels": 4, "pooling": "statistics", "before": 1, "after": 0}),
    "17k": ("wav2small_17k", {"channels": 20, "kernel": 5, "before": 1, "after": 2}),
    "mobilenet_v3_s": ("mobilenet_v3_s", {"width": 0.1}),
    "mobilenet_v4_s": ("mobilenet_v4_s", {"width": 0.1}),
    "cnn14": ("cnn14", {"channels": 2}),
}


def drawn(student, seed=0):
    """Variables with no entry at its initial value, of a size that keeps activations in range."""
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(student.init, jax.random.key(0), jnp.zeros((1, 16_000)))

    def draw(path, leaf):
        if path[0].key == "frontend":
            return np.zeros(leaf.shape, np.float32)
        low, high = (0.5, 1.5) if path[-1].key in ("scale", "var") else (-1, 1)
        width = np.sqrt(np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 1
        return (generator.uniform(low, high, leaf.shape) / width).astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(draw, dict(shapes))
    front = models.frontend.LogMel(student.n_fft, student.hop, student.n_mels)
    frontend = front.init(jax.random.key(0), jnp.zeros((1, student.n_fft)))["frontend"]
    return {**variables, "frontend": {"logmel": frontend}}


@pytest.mark.parametrize("name", STUDENTS)
def test_a_plan_computes_what_the_module_computes(name):
    """As it is folded, merged, and filled up with zeros."""
    student = models.build(STUDENTS[name][0], **STUDENTS[name][1])
    variables, wave = drawn(student), voice(0.5, 1)[None]
    expected = np.asarray(jax.jit(student.apply)(variables, wave))
    folded = plans.fold(student, variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(folded)} == {np.dtype(np.float64)}
    merged = plans.merge(folded)
    for one in (folded, merged, *(plans.fill_channels(merged, where) for where in ("pool", "all"))):
        np.testing.assert_allclose(
            jax.jit(forward)(as_float32(one), wave), expected, atol=2e-5 * max(1, np.abs(expected).max())
        )
    assert folded.macs() == models.macs(student)


def test_a_plan_prints_as_a_table():
    student = models.build("mobilenet_v3_s", width=0.25)
    lines = str(plans.fold(student, drawn(student))).splitlines()
    assert lines[0].split() == ["layer", "output", "for", "5", "s", "parameters", "MACs"]
    assert lines[2].split() == ["Spectrum", "33", "×", "2499", f"{2 * 64 * 33:,}", f"{2499 * 64 * 66:,}"]
    assert any(line.startswith("  SqueezeExcite") for line in lines)  # in a residual
    assert lines[-1].split() == ["all", lines[-1].split()[1], f"{models.macs(student):,}"]
    assert len({len(line) for line in lines}) == 1


def test_zeros_fill_up_whole_blocks():
    student = models.build("wav2small", channels=13)
    merged = plans.merge(plans.fold(student, drawn(student)))

    def widths(one):
        return [len(layer.bias) for layer in direct.trunk_of(one) if isinstance(layer, plan.Convolution)]

    assert widths(merged) == widths(plans.fill_channels(merged, "none")) == [13] * 7
    assert widths(plans.fill_channels(merged, "pool")) == [13, 13, 16, 13, 13, 13, 13]
    assert widths(plans.fill_channels(merged, "all")) == [16] * 6 + [13]


def test_the_reach_of_a_trunk():
    """By the gradient of one output column."""
    student = models.build("wav2small", channels=2, before=2, after=1, kernel=5, stride=2)
    layers = direct.trunk_of(plans.fold(student, drawn(student)))
    stride, reach = plans.context(layers)
    positive = jax.tree.map(lambda leaf: jnp.abs(jnp.asarray(leaf, jnp.float32)), layers)  # so no ReLU cuts anything off

    def column(image):
        for layer in positive:
            image = apply(layer, image)
        return image[..., 25].sum()

    (seen,) = np.nonzero(np.abs(jax.grad(column)(jnp.ones((1, 1, 8, 200)))).sum(axis=(0, 1, 2)))
    assert stride == 4 and 25 * stride - reach <= seen[0] and seen[-1] <= 25 * stride + reach
    assert seen[-1] - seen[0] >= 2 * reach - stride  # of equal maxima one edge of a window may win


def test_every_kind_has_a_builder_and_a_file_of_its_own():
    assert set(build.BUILDERS) == set(kinds.KINDS)
    assert len(set(kinds.FILES.values())) == len(kinds.KINDS)
    known = {"trunk", *(word for words in direct.HEADS.values() for word in words)}
    assert {kind.requires for kind in kinds.KINDS.values()} - {None} <= known
    assert kinds.KINDS["fp32"].exact and not any(kinds.KINDS[kind].exact for kind in kinds.INTEGER_KINDS)


class Own(nn.Module):
    """A student from outside the package, as ``models.Student`` asks for: log-mel, one convolution, mean over time, output."""

    dimensions: int = 2
    n_fft: int = 64
    hop: int = 32
    n_mels: int = 26
    minimum_samples: int = 64

    @nn.compact
    def __call__(self, wave, train=False):
        image = models.frontend.LogMel(name="logmel")(models.frontend.normalise(wave))
        x = nn.relu(nn.Conv(16, (3, 3), padding=1, name="conv")(image[..., None]))
        x = nn.Conv(4, (1, 1), name="mix")(x).transpose(0, 1, 3, 2)
        return nn.Dense(self.dimensions, name="adv")(x.reshape(*x.shape[:2], -1).mean(axis=1))

    @nn.nowrap
    def fold(self, variables):
        conv, mix, adv = (variables["params"][name] for name in ("conv", "mix", "adv"))
        layers = (
            *plan.fold_log_mel(self, variables),
            plan.Convolution(conv["kernel"].transpose(3, 2, 1, 0) * plan.DECIBEL, conv["bias"], 1, "relu"),
            plan.Convolution(mix["kernel"].transpose(3, 2, 1, 0), mix["bias"]),
            plan.Tokens(),
            plan.MomentPooling(deviation=False),
            plan.Dense(adv["kernel"], adv["bias"]),
        )
        return plan.Plan(layers, self.minimum_samples)


def test_a_student_of_ones_own_trains_and_leaves(bank, views, labels, tmp_path, monkeypatch):
    """It has no BatchNorm, and no field that says how it is computed."""
    monkeypatch.setitem(models.STUDENTS, "own", Own)
    monkeypatch.setattr(judge, "PARITY_LENGTHS", (1021,))
    settings = config.load("own", ["steps=2", "batch_size=4", "eval_every=2"])
    train.train(settings, bank, views, labels, tmp_path / "run")
    student, variables, _ = checkpoint.load_student(tmp_path / "run")
    export_student(tmp_path / "run", tmp_path / "model", kinds=["fp32"], measure=False)
    wave = voice(0.5, 1)
    expected = student.apply(variables, wave[None])[0]
    np.testing.assert_allclose(list(Predictor(tmp_path / "model")(wave).values()), expected, atol=1e-4)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "own (" in card and "arXiv" not in card and "The network normalises each recording" in card

    class Unnamed(Own):
        @nn.compact
        def __call__(self, wave, train=False):
            return nn.Dense(self.dimensions, name="out")(wave[:, :64])

    monkeypatch.setitem(models.STUDENTS, "own", Unnamed)
    with pytest.raises(UsageError, match="student own has no output layer adv, an nn.Dense with bias, .*; it has out"):
        train.train(settings, bank, views, labels, tmp_path / "other")


def test_a_student_of_ones_own_with_a_fold_gets_eight_bits():
    student, waves = Own(), [voice(1.0, seed) for seed in range(8)]
    variables = drawn(student)
    assert "int8" in build.kinds_of(student) and "chunked" not in build.kinds_of(student)
    np.testing.assert_allclose(
        forward(deploy(student, variables)[1], waves[0][None]), student.apply(variables, waves[0][None]), atol=1e-4
    )
    fp32, _ = build.fp32_graph(student, variables, waves[:1])
    expected = np.concatenate([student.apply(variables, wave[None]) for wave in waves])
    np.testing.assert_allclose(graph.run(fp32, waves), expected, atol=1e-4)
    content, how = build.build("int8", student, variables, fp32, {}, waves, coverages=(1.0,))
    assert b"QLinearConv" in content and how["weight_bits"] == 7
    # seven bits of these weights are 2 % off, a wrong tap or channel much more
    assert np.abs(graph.run(onnx.load_from_string(content), waves) - expected).mean() < 0.05 * np.abs(expected).mean()
