"""Students in C: against the Flax module, against numpy references of their definitions, on random networks and pushes."""

import ctypes
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("flax", reason="needs pip install 'w2s-jax[train]'")

import jax
import jax.numpy as jnp
from conftest import voice

from w2s_jax import NORM_EPSILON, models
from w2s_jax.errors import UsageError, W2SError
from w2s_jax.export.c import generate, network, quantise, reference
from w2s_jax.export.plan import fold
from w2s_jax.runtime import Predictor, c

slow = pytest.mark.slow
pytestmark = pytest.mark.skipif(os.name != "posix", reason="compilers are called as on POSIX systems")
#: Every field that exports, off its default.
STUDENTS = {
    "72k": ("wav2small", {}),
    "17k": ("wav2small_17k", {"channels": 20, "kernel": 5, "before": 1, "after": 2}),
    "stride": ("wav2small", {"channels": 5, "stride": 2, "n_mels": 21, "n_fft": 128, "hop": 48, "before": 2, "after": 1}),
    "long hop": (
        "wav2small",
        {"channels": 7, "stride": 3, "kernel": 7, "n_mels": 13, "n_fft": 64, "hop": 80, "before": 1, "after": 0},
    ),
    "points": ("wav2small_17k", {"channels": 3, "kernel": 1, "n_mels": 10, "n_fft": 64, "hop": 24, "before": 4, "after": 1}),
    "mean": ("wav2small", {"channels": 5, "pooling": "mean"}),
    "statistics": ("wav2small", {"channels": 18, "pooling": "statistics", "n_mels": 20, "before": 1}),
}
FACTS = {
    "student": "wav2small",
    "dimensions": "arousal,dominance,valence",
    "teacher": 'A "teacher" */ ??/ \\ ü',
    "licence": "MIT",
}
RUNNING, WINDOW = 0, 1


def draw(name):
    """A student whose every parameter matters: BatchNorms with the moments of real activations, outputs of about 1."""
    kind, fields = STUDENTS[name]
    student = models.build(kind, **fields)
    variables = jax.tree.map(np.asarray, dict(student.init(jax.random.key(1), jnp.zeros((1, 8000)))))
    batch = np.stack([voice(0.5, seed) for seed in range(4)])
    _, update = student.apply(variables, batch, train=True, mutable=["batch_stats"])
    stats = zip(*map(jax.tree.leaves, (variables["batch_stats"], update["batch_stats"])), strict=True)
    tree = jax.tree.structure(variables["batch_stats"])
    variables["batch_stats"] = jax.tree.unflatten(tree, [(np.asarray(new) - 0.9 * old) / 0.1 for old, new in stats])
    generator = np.random.default_rng(2)

    def disturb(leaf):
        return (leaf * generator.uniform(0.7, 1.3, leaf.shape) + generator.normal(0, 0.05, leaf.shape)).astype(np.float32)

    variables["params"] = jax.tree.map(disturb, variables["params"])
    variables["params"]["adv"]["kernel"] /= np.abs(student.apply(variables, batch)).max()
    return student, variables


def quantised(plan, waves):
    """An 8-bit network whose ranges end at the largest values of the waves, found without ONNX."""
    parts = network.take_apart(plan)
    images = [reference.log_mel(parts, wave) for wave in waves]
    ends = [max(image.max() for image in images)]
    for layer_at in range(len(parts.before + parts.after)):
        images, end = zip(*(_layer(parts, image, layer_at) for image in images), strict=True)
        ends.append(max(end))
    return parts, quantise.quantise(parts, ends)


def _layer(parts, x, at):
    layer = (parts.before + parts.after)[at]
    x = x if x.ndim == 3 else x[:, :, None]
    reach = layer.kernel.shape[2] // 2
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)))
    size = layer.kernel.shape[2]
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (0, 1))[:: layer.stride, :: layer.stride]
    x = np.maximum(np.einsum("xyitm,oimt->xyo", windows, layer.kernel) + layer.bias, 0)
    end = float(x.max())
    return (reference._pool(x) if at + 1 == len(parts.before) else x), end


def write(files, directory):
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name → what a student is and has become, made once."""
    known = {}

    def make(name, kind="c"):
        if (name, kind) not in known:
            student, variables = known[name, "c"].source if (name, "c") in known else draw(name)
            plan, facts = fold(student, variables), FACTS | {"minimum_samples": str(student.minimum_samples)}
            directory = tmp_path_factory.mktemp("c") / kind
            if kind == "c":
                parts, numbers, files = network.take_apart(plan), None, generate.generate(plan, facts)
            else:
                parts, numbers = quantised(plan, [voice(1.0, seed) for seed in range(4)])
                files = generate.generate_int8(plan, numbers, facts, SHIFT)
            known[name, kind] = SimpleNamespace(
                source=(student, variables), student=student, directory=write(files, directory), parts=parts, numbers=numbers,
                flax=jax.jit(lambda wave: student.apply(variables, wave[None])[0]), session=c.Session(directory),
            )  # fmt: skip
        return known[name, kind]

    return make


SHIFT = np.array([0.125, -0.25, 0.0625], np.float32)


def call(session, wave):
    return session.run(None, {"signal": wave[None]})[0][0]


def signals(length):
    generator = np.random.default_rng(length)
    yield "noise", generator.normal(size=length).astype(np.float32)
    yield "voice", voice(length / 16_000, length) + np.float32(0.05)
    yield "silence", np.zeros(length, np.float32)
    click = np.zeros(length, np.float32)
    click[length // 3] = 1.0
    yield "click", click


@pytest.mark.parametrize("name", STUDENTS)
def test_whole_recordings_equal_flax(made, name):
    it = made(name)
    shortest = it.student.minimum_samples
    for length in (shortest, shortest + 1, shortest + it.student.hop, 517, 1021, 4096, 16_000):
        for kind, wave in signals(length):
            np.testing.assert_allclose(call(it.session, wave), it.flax(wave), atol=5e-5, err_msg=f"{kind} of {length}")


@slow
def test_ten_minutes_equal_flax(made):
    it = made("72k")
    generator = np.random.default_rng(0)
    long = np.concatenate([voice(60, seed) for seed in range(10)]) * np.repeat(generator.uniform(0.05, 1, 600), 16_000)
    for wave in (long.astype(np.float32), np.zeros(9_600_000, np.float32)):
        np.testing.assert_allclose(call(it.session, wave), it.flax(wave), atol=1e-4)


@pytest.mark.parametrize("name", STUDENTS)
def test_eight_bits_are_those_of_the_reference(made, name):
    it = made(name, "c-int8")
    for length in (it.student.minimum_samples, 1021, 16_000):
        for kind, wave in signals(length):
            expected = reference.predict(it.parts, it.numbers, wave, SHIFT)
            np.testing.assert_array_equal(call(it.session, wave), expected, err_msg=f"{kind} of {length}")


def test_eight_bits_are_close_to_float32(made):
    """A wrong scale, zero point or tap moves the values by as much as the waves do."""
    exact, rounded = made("72k"), made("72k", "c-int8")
    waves = [voice(1.0, seed) for seed in range(20, 32)]
    wanted = np.array([call(exact.session, wave) for wave in waves])
    found = np.array([call(rounded.session, wave) for wave in waves]) - SHIFT
    assert np.abs(found - wanted).mean() < 0.25 * wanted.std(axis=0).max()


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_random_networks_in_eight_bits(tmp_path_factory, seed, data):
    """Plans that no training has made, with ranges that cut off much: every saturation is reached."""
    from w2s_jax.models import plan as p
    from w2s_jax.models.frontend import fourier_kernels

    random = np.random.default_rng(seed)
    n_fft = data.draw(st.sampled_from([16, 32, 64]), "n_fft")
    hop, bands = data.draw(st.integers(4, 40), "hop"), data.draw(st.integers(2, 20), "bands")
    channels, kernel = data.draw(st.integers(1, 20), "channels"), data.draw(st.sampled_from([1, 3, 5]), "kernel")
    before, after = data.draw(st.integers(1, 3), "before"), data.draw(st.integers(0, 2), "after")
    head = data.draw(st.sampled_from(["tokens", "gram", "mean", "statistics"]), "head")
    stride = data.draw(st.integers(1, 3), "stride")
    layers = [p.Normalise(), p.Spectrum(*(part.astype(np.float64) for part in fourier_kernels(n_fft)), hop)]
    layers += [p.Mel(np.abs(random.normal(size=(n_fft // 2 + 1, bands)))), p.Log()]
    for at in range(before + after):
        shape = channels, channels if at else 1, kernel, kernel
        scale = 1 / np.sqrt(np.prod(shape[1:])) * (1 if at else 0.2)
        layers.append(
            p.Convolution(random.normal(size=shape) * scale, random.normal(size=channels), 1 if at else stride, "relu")
        )
        layers += [p.MaxPool()] if at + 1 == before else []
    mels = -(-bands // stride)
    mels = (mels + 1) // 2
    mix = p.Convolution(random.normal(size=(channels, channels, 1, 1)), random.normal(size=channels))
    size = mels * channels
    if head == "tokens":
        pooling = [
            mix,
            p.Tokens(),
            p.AttentionPooling(*(random.normal(size=(size, size)) / 9 for _ in range(2)), random.normal(size=size)),
        ]
    elif head == "gram":
        matrices = (random.normal(size=(channels, channels)) for _ in range(2))
        pooling, size = [p.AttentionPooling(*matrices, random.normal(size=channels)), p.Gram()], channels * (mels + channels)
    else:
        pooling, size = [mix, p.Tokens(), p.MomentPooling(head == "statistics")], size * (2 if head == "statistics" else 1)
    plan = p.Plan((*layers, *pooling, p.Dense(random.normal(size=(size, 2)), random.normal(size=2))), n_fft)
    parts = network.take_apart(plan)
    numbers = quantise.quantise(parts, random.uniform(0, 6, 1 + before + after))
    files = generate.generate_int8(plan, numbers, FACTS | {"dimensions": "a,b", "minimum_samples": str(n_fft)})
    session = c.Session(write(files, tmp_path_factory.mktemp("random")))
    for length in (n_fft, int(random.integers(n_fft, 3000)), 9000):
        wave = (random.normal(size=length) * random.uniform(0.001, 3)).astype(np.float32)
        np.testing.assert_array_equal(call(session, wave), reference.predict(parts, numbers, wave))


# --- streams


def running_reference(it, wave, window, hop):
    """Values of a stream as w2s_model.h defines them, by Flax's own layers on frames that numpy has normalised, in float64."""
    student = it.student
    n_fft, step = student.n_fft, student.hop
    frames = 1 + (len(wave) - n_fft) // step
    sizes = network.sizes_of(it.parts)
    # whole steps of frames, of which the trunk keeps the last ones until it has seen what lies behind them
    steps = (len(wave) - (sizes["SAMPLES"] - sizes["FRAMES"] * step)) // (sizes["FRAMES"] * step)
    frames = steps * sizes["FRAMES"]
    mean = variance = heard = 0.0
    rows = []
    for frame in range(frames):
        samples = wave[frame * step : frame * step + n_fft].astype(np.float64)
        new = samples if frame == 0 else samples[-min(step, n_fft) :]
        heard = min(heard + len(new), window)
        share, distance = min(1.0, len(new) / heard), new.mean() - mean
        mean += share * distance
        variance += share * (new.var() + (1 - share) * distance**2 - variance)
        rows.append((samples - mean) / np.sqrt(variance + NORM_EPSILON))
    rows = np.array(rows)
    power = (rows @ it.parts.spectrum.real) ** 2 + (rows @ it.parts.spectrum.imag) ** 2
    x = np.log(np.maximum(power @ it.parts.mel.matrix, 1e-10))
    for at in range(len(it.parts.before + it.parts.after)):
        x, _ = _layer(it.parts, x, at)
    tokens = x[: steps * 4 - sizes["LAG"]].reshape(-1, sizes["PLACES"], sizes["DEPTH"])
    products = tokens @ network.head_matrix(it.parts)
    half, features = products.shape[2] // 2, sizes["FEATURES"]
    scores, values = products[..., :features], products[..., half : half + features]
    # the last block of hops that has a token, and those before
    block = np.arange(len(tokens)) * 2 * sizes["STRIDE"] * step // hop
    last = block > block[-1] - window // hop
    weight = np.exp(scores[last] - scores[last].max(axis=0))
    pooled = (weight * values[last]).sum(axis=0) / weight.sum(axis=0)
    return pooled.ravel() @ generate.output_layer(it.parts)["output_kernel"].T + generate.output_layer(it.parts)["output_bias"]


def test_running_streams_equal_their_definition(made):
    it = made("72k")
    wave = np.concatenate([voice(1.5, 1), 0.2 * voice(1.0, 2) + 0.1, voice(0.5, 3)]).astype(np.float32)
    stream = it.session.stream("running", 16_000, 4000)
    at = 0
    for end in (900, 4000, 8001, 16_000, 20_000, 31_999, 48_000):
        stream.push(wave[at:end])
        at = end
        np.testing.assert_allclose(stream.read(), running_reference(it, wave[:end], 16_000, 4000), atol=5e-5)


@pytest.mark.parametrize("name", ["stride", "mean", "long hop", "points"])
def test_a_stream_that_knows_its_level_equals_the_whole(made, name):
    """With a level that never changes, and a window that holds all of it, a stream is the whole recording but for its end."""
    it = made(name)
    wave = np.tile(np.random.default_rng(0).normal(size=it.student.n_fft), 400).astype(
        np.float32
    )  # each period has the moments of all
    wave = wave if it.student.hop % it.student.n_fft else wave
    stream = it.session.stream("running", 64_000, 16_000)
    stream.push(wave)
    np.testing.assert_allclose(stream.read(), call(it.session, wave), atol=0.02)


@pytest.mark.parametrize("kind", ["c", "c-int8"])
@pytest.mark.parametrize("normalisation", ["running", "window"])
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    end=st.integers(700, 16_000),
    pieces=st.lists(st.tuples(st.integers(0, 2000), st.booleans(), st.booleans(), st.booleans()), max_size=12),
)
def test_any_split_of_the_pushes_gives_the_same_bits(made, kind, normalisation, end, pieces):
    it = made("72k", kind)
    integers = np.round(voice(1.0, 5) * 32_767).astype(np.int16)[:end]
    floats = integers.astype(np.float32) / np.float32(32_768)
    whole, parts, other = (it.session.stream(normalisation, 8000, 2000) for _ in range(3))
    whole.push(floats)
    at = 0
    for size, as_integers, saved, read in [*pieces, (end, False, False, False)]:
        parts.push((integers if as_integers else floats)[at : at + size])
        at += size
        other.push(np.full(size, 0.3, np.float32))  # another stream, between
        if saved:  # away and back
            state = parts.state
            parts = it.session.stream(normalisation, 8000, 2000)
            parts.state = state
        if read:
            parts.read()  # which changes nothing
    np.testing.assert_array_equal(parts.read(), whole.read())


def test_a_stream_after_a_reset_is_a_new_one(made):
    it = made("72k")
    used, new = (it.session.stream("running", 8000, 2000) for _ in range(2))
    used.push(voice(2.0, 1))
    used.reset()
    for stream in (used, new):
        stream.push(voice(1.0, 2))
    np.testing.assert_array_equal(used.read(), new.read())


def test_windows_of_a_stream_are_those_of_the_predictor(made):
    predictor = Predictor(made("72k").directory)
    wave = voice(3.0, 7)
    stream = predictor.stream(window=1.0, hop=0.25)
    assert not stream.incremental and stream.read() is None
    found, wanted = list(stream.feed(wave)), list(predictor.windows(wave, window=1.0, hop=0.25))
    assert [row[:2] for row in found] == [row[:2] for row in wanted]
    for (*_, values), (*_, expected) in zip(found, wanted, strict=True):
        np.testing.assert_allclose(list(values.values()), list(expected.values()), atol=1e-5)
    inner = made("72k").session.stream("window", 16_000, 4000)  # the same in C
    inner.push(wave)
    np.testing.assert_allclose(inner.read(), list(found[-1][2].values()), atol=1e-5)


def test_streams_are_saved_and_say_what_they_are(made):
    predictor = Predictor(made("72k").directory)
    stream = predictor.stream(1.0, 0.25, "running")
    assert stream.incremental and (stream.window, stream.hop) == (16_000, 4000)
    stream.push(voice(0.7, 1))
    other = predictor.stream(1.0, 0.25, "running")
    other.restore(stream.save())
    for one in (stream, other):
        one.push((voice(0.6, 2) * 32_767).astype(np.int16))
    assert stream.read() == other.read()
    rows = list(other.feed(voice(1.0, 3)))
    assert [round(end * 4, 6) for _, end, _ in rows] == [6, 7, 8, 9] and all(end - start == 1 for start, end, _ in rows)
    with pytest.raises(UsageError, match="expected a state of"):
        other.restore(predictor.stream(2.0, 0.25, "running").save())
    with pytest.raises(UsageError, match="the same model and settings"):
        other.restore(predictor.stream(2.0, 0.5, "running").save())  # of as many bytes
    for settings_of, says in (
        ((1.0, 0.3, "running"), "a window that is a multiple of the hop"),
        ((1.0, 0.25, "mean"), "normalisation is 'mean'"),
        ((0.001, 0.25, "window"), "a window needs at least 64 samples"),
        ((float("nan"), 0.25, "window"), "window and hop are seconds"),
        ((1.0, 0.0, "window"), "hop must be at least one sample"),
    ):
        with pytest.raises(UsageError, match=says):
            predictor.stream(*settings_of)


@pytest.mark.parametrize("normalisation", ["running", "window"])
def test_samples_that_are_no_numbers_leave_a_stream_as_it_was(made, normalisation):
    stream = Predictor(made("72k").directory).stream(1.0, 0.25, normalisation)
    stream.push(voice(1.0, 1))
    before = stream.read()
    for bad in (np.nan, np.inf, -np.inf, 1e20):
        with pytest.raises(W2SError, match="sample"):
            stream.push(np.array([0.1, bad], np.float32))
    assert stream.read() == before


# --- C's own


def c_call(library, name, *arguments):
    function = getattr(library, name)
    return function(*(ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments))


@pytest.mark.parametrize("kind", ["c", "c-int8"])
def test_error_codes(made, kind):
    it = made("72k", kind)
    library, size = it.session._library, ctypes.c_size_t
    memory, values = np.zeros(it.session._bytes, np.uint8), np.full(3, 7, np.float32)
    wave, none, bad = voice(0.1, 1), None, voice(0.1, 1)
    bad[800] = np.nan
    ok = size(len(memory)), wave, size(len(wave)), values
    assert c_call(library, "w2s_predict", none, *ok) == c_call(library, "w2s_predict", memory, ok[0], none, *ok[2:]) == -1
    assert c_call(library, "w2s_predict", memory, *ok[:3], none) == -1
    assert c_call(library, "w2s_predict", memory, size(len(memory) - 1), *ok[1:]) == -2
    assert c_call(library, "w2s_predict", memory[1:], *ok) == -2  # not aligned
    assert c_call(library, "w2s_predict", memory, ok[0], wave, size(63), values) == -3
    assert c_call(library, "w2s_predict", memory, ok[0], wave, size(2**62), values) == -3
    assert c_call(library, "w2s_predict", memory, ok[0], bad, size(len(bad)), values) == -4
    assert (values == 7).all()
    assert c_call(library, "w2s_predict", memory, *ok) == 0 and np.isfinite(values).all()

    state = np.zeros(library.w2s_stream_bytes(RUNNING, 8000, 2000), np.uint8)
    scratch = np.zeros(it.session._scratch_bytes, np.uint8)
    whole, some = size(len(state)), size(len(scratch))
    assert (
        c_call(library, "w2s_stream_push", state, scratch, some, wave, size(len(wave))) == -6
    )  # nobody has made a stream of it
    for window, hop in ((8000, 3000), (8000, 0), (8000, 63), (0, 0), (63, 63), (2**32 - 2000, 2000), (2**31, 64)):
        assert c_call(library, "w2s_stream_init", state, whole, RUNNING, ctypes.c_uint32(window), ctypes.c_uint32(hop)) == -5
    assert c_call(library, "w2s_stream_init", state, whole, 2, 8000, 2000) == -5
    assert c_call(library, "w2s_stream_init", none, whole, RUNNING, 8000, 2000) == -1
    assert c_call(library, "w2s_stream_init", state, size(len(state) - 4), RUNNING, 8000, 2000) == -2
    assert c_call(library, "w2s_stream_init", state, whole, RUNNING, 8000, 2000) == 0
    assert c_call(library, "w2s_stream_read", state, scratch, some, values) == -7
    assert c_call(library, "w2s_stream_push", state, none, some, wave, size(len(wave))) == -1
    assert c_call(library, "w2s_stream_push", state, scratch, size(len(scratch) - 1), wave, size(len(wave))) == -2
    assert c_call(library, "w2s_stream_push", state, scratch, some, none, size(len(wave))) == -1
    assert c_call(library, "w2s_stream_push", none, scratch, some, wave, size(len(wave))) == -1
    assert c_call(library, "w2s_stream_push", state, scratch, some, bad, size(len(bad))) == -4  # and counts as 0
    for at, value in (
        (0, 1),
        (4, 7),
        (8, 1),
        (16, 10**9),
        (20, 10**9),
    ):  # damaged memory is no stream
        damaged = state.copy()
        damaged[at : at + 4] = np.frombuffer(np.uint32(value).tobytes(), np.uint8)
        assert c_call(library, "w2s_stream_push", damaged, scratch, some, wave, size(len(wave))) == -6
        assert c_call(library, "w2s_stream_read", damaged, scratch, some, values) == -6
        assert c_call(library, "w2s_stream_reset", damaged) == (0 if at >= 16 else -6)
    clean = np.where(np.isnan(bad), 0, bad).astype(np.float32)
    other = it.session.stream("running", 8000, 2000)
    other.push(clean)
    assert c_call(library, "w2s_stream_read", state, scratch, some, values) == 0
    np.testing.assert_array_equal(values, other.read())
    assert state.tobytes() == other.state


def defined(directory, name):
    """A number among the macros of w2s_model.h."""
    return eval(re.search(rf"define {name} ([^/\n]*)", (directory / "w2s_model.h").read_text())[1], {"W2S_BATCH": 12})


def test_memory_of_the_published_student(made):
    """The figures of export/README.md."""
    for kind, most in (("c", 64_000), ("c-int8", 48_000)):
        it = made("72k", kind)
        state = it.session._library.w2s_stream_bytes(RUNNING, 80_000, 4000)
        assert state + defined(it.directory, "W2S_SCRATCH_BYTES") <= most
        assert defined(it.directory, "W2S_PREDICT_BYTES") == it.session._bytes < 70_000
    assert defined(it.directory, "W2S_TOKEN_SAMPLES") == 64


def test_first_samples_and_latency(made):
    it = made("stride")
    first, latency = (defined(it.directory, f"W2S_{name}_SAMPLES") for name in ("FIRST", "LATENCY"))
    stream = it.session.stream("running", 19_200, 4800)
    stream.push(voice(1.0, 1)[: first - 1])
    assert stream.read() is None
    stream.push(voice(1.0, 1)[first - 1 : first])
    assert stream.read() is not None
    wave = voice(1.0, 1)
    for at in (5000, 5001, 7777):  # a click is in the values after that many samples, and the level before
        quiet, loud = (it.session.stream("running", 19_200, 4800) for _ in range(2))
        quiet.push(wave[: at + latency])
        click = wave[: at + latency].copy()
        click[at] += 0.5
        loud.push(click)
        assert (quiet.read() != loud.read()).any()


STRICT = ["-std=c99", "-Wall", "-Wextra", "-Wshadow", "-pedantic", "-Werror"]


def compile_all(it, tmp_path, command):
    for flags in (["-O0"], ["-O3", "-march=native"], ["-O2", "-DW2S_PLAIN", "-DW2S_BATCH=4"]):
        sources = [it.directory / "w2s_model.c", it.directory / "example.c"]
        subprocess.run([*command, *STRICT, *flags, *sources, "-lm", "-o", tmp_path / "example"], check=True)
    return tmp_path / "example"


@pytest.mark.parametrize("kind", ["c", "c-int8"])
def test_strict_compilation_and_the_example(made, kind, tmp_path):
    it = made("72k", kind)
    example = compile_all(it, tmp_path, c.compiler())
    samples = (voice(5.5, 3) * 32_767).astype(np.int16)
    printed = subprocess.run([example], input=samples.tobytes(), capture_output=True, check=True).stdout.decode().splitlines()
    assert printed[0].split() == ["seconds", "arousal", "dominance", "valence"] and len(printed) == 23
    stream = it.session.stream("running", 80_000, 4000)
    stream.push(samples)
    np.testing.assert_allclose([float(cell) for cell in printed[-1].split()], [5.5, *stream.read()], atol=2e-4)


@slow
@pytest.mark.parametrize("name", STUDENTS)
def test_clang_of_ziglang(made, name, tmp_path):
    pytest.importorskip("ziglang")
    zig = [sys.executable, "-m", "ziglang", "cc"]
    for kind in ("c", "c-int8"):
        it = made(name, kind)
        compile_all(it, tmp_path, zig)
        for target in (["wasm32-freestanding", "-msimd128"], ["wasm32-freestanding"], ["aarch64-linux-gnu", "-mcpu=apple_m1"]):
            subprocess.run(
                [*zig, "-target", *target, *STRICT, "-O2", "-c", it.directory / "w2s_model.c", "-o", tmp_path / "o"], check=True
            )


#: Values of a recording, and of a stream that it is pushed into in pieces, as their bits.
PROBE = r"""
#include <stdio.h>
#include <stdlib.h>
#include "w2s_model.h"
int main(void)
{
    size_t count = 20011, bytes = w2s_stream_bytes(W2S_RUNNING, 8000, 2000), at = 0, piece = 1;
    int16_t *samples = malloc(2 * count);
    void *predict = malloc(W2S_PREDICT_BYTES), *stream = malloc(bytes), *scratch = malloc(W2S_SCRATCH_BYTES);
    union { float number[W2S_DIMENSIONS]; uint32_t bits[W2S_DIMENSIONS]; } values;
    if (fread(samples, 2, count, stdin) != count) return 1;
    for (size_t length = W2S_MINIMUM_SAMPLES; length < count; length = length * 3 / 2 + 1) {
        float *exact = malloc(4 * length); /* of the very size, so that a sanitizer sees what is read behind it */
        for (size_t i = 0; i < length; i++) exact[i] = samples[i] / 32768.0f;
        if (w2s_predict(predict, W2S_PREDICT_BYTES, exact, length, values.number)) return 2;
        for (int i = 0; i < W2S_DIMENSIONS; i++) printf("%u ", (unsigned)values.bits[i]);
        free(exact);
    }
    if (w2s_stream_init(stream, bytes, W2S_RUNNING, 8000, 2000)) return 3;
    for (; at < count; at += piece, piece = piece * 7 % 1009 + 1) {
        if (piece > count - at) piece = count - at;
        if (w2s_stream_push_int16(stream, scratch, W2S_SCRATCH_BYTES, samples + at, piece)) return 4;
        w2s_stream_read(stream, scratch, W2S_SCRATCH_BYTES, values.number);
    }
    for (int i = 0; i < W2S_DIMENSIONS; i++) printf("%u ", (unsigned)values.bits[i]);
    free(samples); free(predict); free(stream); free(scratch);
    return 0;
}
"""


def probe(it, tmp_path, command, *flags, run=()):
    (tmp_path / "probe.c").write_text(PROBE)
    out = tmp_path / "probe"
    sources = [tmp_path / "probe.c", it.directory / "w2s_model.c"]
    subprocess.run([*command, "-I", it.directory, *flags, *sources, "-lm", "-o", out], check=True)
    samples = (voice(2.0, 9) * 32_767).astype(np.int16)[:20_011]
    ran = subprocess.run([*run, out], input=samples.tobytes(), capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()[-2000:]
    return np.array(ran.stdout.split(), np.uint32)


@slow
@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("kind", ["c", "c-int8"])
def test_sanitizers(made, name, kind, tmp_path):
    flags = ["-g", "-O1", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-std=gnu99"]
    plain = ["-DW2S_PLAIN", "-DW2S_BATCH=4"]
    for more in ([], plain) if name == "72k" else (plain,):  # with vectors, what is checked takes minutes to compile
        probe(made(name, kind), tmp_path, c.compiler(), *flags, *more)


@pytest.mark.parametrize("name", ["72k", "17k", "statistics"])
@pytest.mark.slow
def test_every_processor_and_compiler_says_the_same_in_eight_bits(made, name, tmp_path):
    """Vectors of all widths or none, dot products or none, products that may be added unrounded or not."""
    it = made(name, "c-int8")
    ways = [["-O3", "-march=native", "-ffp-contract=fast"], ["-O2", "-DW2S_PLAIN"], ["-O3", "-mavx2", "-mfma"], ["-O0"]]
    cpuinfo = Path("/proc/cpuinfo")
    if not (cpuinfo.exists() and "avx2" in cpuinfo.read_text()):
        ways = ways[:2]
    found = [probe(it, tmp_path, c.compiler(), "-std=gnu99", *flags) for flags in ways]
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize("name", ["72k", "17k", "statistics"])
@pytest.mark.slow
def test_vectors_of_all_widths_are_close_in_float32(made, name, tmp_path):
    ways = [["-O3", "-march=native"], ["-O2", "-DW2S_PLAIN", "-DW2S_BATCH=4"], ["-O2"]]
    found = [probe(made(name), tmp_path, c.compiler(), "-std=gnu99", *flags).view(np.float32) for flags in ways]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=2e-5)


#: Emulator, its processor, ziglang's target and processor: dot products of 2013 and of ARM, old and new, 32-bit instructions.
EMULATED = {
    "haswell": ("x86_64", "Haswell", "x86_64-linux-musl", "haswell"),
    "x86-64": ("x86_64", "Nehalem", "x86_64-linux-musl", "nehalem"),
    "arm64": ("aarch64", "cortex-a57", "aarch64-linux-musl", "cortex_a57"),
    "arm64 dotprod": ("aarch64", "max", "aarch64-linux-musl", "cortex_a76"),
    "arm64 i8mm": ("aarch64", "max", "aarch64-linux-musl", "neoverse_v1"),
    "arm32": ("arm", "cortex-a15", "arm-linux-musleabihf", "cortex_a15-neon"),
}


@slow
@pytest.mark.parametrize("processor", EMULATED)
@pytest.mark.parametrize("kind", ["c", "c-int8"])
def test_on_an_emulated_processor(made, kind, processor, tmp_path):
    pytest.importorskip("ziglang")
    emulator, cpu, target, own = EMULATED[processor]
    if shutil.which(f"qemu-{emulator}") is None:
        pytest.skip("needs qemu-user")
    it = made("72k", kind)
    native = probe(it, tmp_path, c.compiler(), "-O3", "-march=native")
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", target, f"-mcpu={own}", "-static"]
    other = probe(it, tmp_path, zig, "-O2", run=[f"qemu-{emulator}", "-cpu", cpu])
    if kind == "c-int8":
        np.testing.assert_array_equal(other, native)
    else:
        np.testing.assert_allclose(other.view(np.float32), native.view(np.float32), atol=2e-5)


# --- as a kind


def test_the_predictor_behaves_as_with_every_kind(made, tmp_path):
    it = made("72k")
    predictor = Predictor(it.directory)
    assert predictor.dimensions == ("arousal", "dominance", "valence") and predictor.minimum_samples == 64
    assert predictor.metadata["teacher"] == FACTS["teacher"]
    assert "arousal, dominance, valence" in str(predictor)
    wave = voice(0.5, 1)
    assert predictor(wave) == pickle.loads(pickle.dumps(predictor))(wave)
    np.testing.assert_allclose(list(predictor(wave).values()), it.flax(wave), atol=5e-5)
    with pytest.raises(UsageError, match="expected at least 64 samples"):
        predictor(wave[:63])
    with pytest.raises(W2SError, match="sample 3 is nan"):
        predictor(np.array([0, 0, 0, np.nan] * 40, np.float32))


def test_without_a_compiler_the_way_out_is_named(made, monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(c.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"no C compiler: .*\[c\].*or take another kind"):
        Predictor(made("72k").directory)


def test_code_that_does_not_compile_is_damaged(made, tmp_path):
    broken = shutil.copytree(made("72k").directory, tmp_path / "broken")
    (broken / "w2s_model.c").write_text((broken / "w2s_model.c").read_text()[:-200])
    with pytest.raises(W2SError, match=r"cannot compile .*w2s_model.c: .* ended with 1"):
        Predictor(broken)
    (broken / "w2s_model.c").write_text("int nothing;\n")
    with pytest.raises(W2SError, match="has no code of this package"):
        Predictor(broken)


def test_two_models_in_one_process(made):
    one, other = made("72k"), made("mean")
    wave = voice(0.5, 1)
    np.testing.assert_allclose(call(one.session, wave), one.flax(wave), atol=5e-5)
    np.testing.assert_allclose(call(other.session, wave), other.flax(wave), atol=5e-5)


def test_other_networks_are_refused_with_the_reason():
    student = models.build("mobilenet_v4_s")
    with pytest.raises(UsageError, match="C has no code for"):
        network.take_apart(models.outline(student))


def test_metadata_survives_as_json(made):
    text = ctypes.c_char_p.in_dll(made("72k").session._library, "w2s_metadata").value.decode()
    assert json.loads(text)["teacher"] == FACTS["teacher"]
