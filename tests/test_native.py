"""The compiled kernel of the trunk against XLA's own operators and PyTorch, and what happens where it cannot be had."""

from __future__ import annotations

import hashlib
import os
import platform
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from w2s_jax import compiled, models
from w2s_jax.errors import UsageError
from w2s_jax.models import native
from w2s_jax.models.forms import trains_natively
from w2s_jax.train import initial_state, train_step

REASON = native.unavailable()
needs_kernel = pytest.mark.skipif(REASON is not None, reason=f"native: {REASON}")

#: batch, time, mel, channels in and out, blocks, blocks before the pool: each odd, even, one, more than one tile of time (768
#: columns), a row of exactly 4 KB, more channels than one tile of registers, nothing behind the pool, everything before it.
SIZES = [
    (2, 70, 6, 1, 5, 3, 2),
    (5, 1, 1, 1, 1, 1, 1),
    (12, 2, 2, 1, 3, 2, 1),
    (2, 33, 7, 2, 13, 4, 2),
    (3, 1100, 5, 1, 13, 3, 3),
    (1, 63, 4, 3, 32, 2, 1),
    (2, 1024, 4, 1, 14, 2, 1),
    (2, 21, 26, 1, 17, 7, 3),
]


def plain_trunk(image, kernels, gammas, betas, before):
    """The same by XLA's operators, differentiated by JAX alone."""
    means, variances = [], []
    for layer, (kernel, gamma, beta) in enumerate(zip(kernels, gammas, betas, strict=True), start=1):
        image = lax.conv_general_dilated(image, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
        mean = image.mean((0, 1, 2))
        variance = jnp.square(image - mean).mean((0, 1, 2))
        means.append(mean)
        variances.append(variance)
        image = jnp.maximum((image - mean) * gamma * lax.rsqrt(variance + 1e-5) + beta, 0)
        if layer == before:
            padding = ((0, 0), (1, 1), (1, 1), (0, 0))
            image = lax.reduce_window(image, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)
    return image, means, variances


def example(batch, time, mel, inputs, channels, blocks, before, seed=0):
    """An image like a log-mel image, parameters, and weights of the features that make a scalar of them."""
    rng = np.random.default_rng(seed)
    image = rng.normal(-40, 5, (batch, time, mel, inputs))
    sizes = [inputs, *[channels] * blocks]
    kernels = [rng.standard_normal((3, 3, i, o)) / np.sqrt(9 * i) for i, o in zip(sizes, sizes[1:], strict=False)]
    gammas, betas = ([rng.normal(mean, 0.3, channels) for _ in kernels] for mean in (1, 0))
    weights = rng.standard_normal((batch, (time + 1) // 2, (mel + 1) // 2, channels))
    return jax.tree.map(np.float32, ((image, kernels, gammas, betas), weights))


def value_and_gradients(trunk, before, inputs, weights):
    """Features and moments, and the gradients of a scalar that depends on all of them."""

    def scalar(inputs):
        features, means, variances = trunk(*inputs, before)
        moments = sum(0.1 * m.sum() for m in means) + sum(0.1 * v.sum() for v in variances)
        return jnp.vdot(features, weights) + moments, (features, means, variances)

    (_, values), gradients = jax.jit(jax.value_and_grad(scalar, has_aux=True))(inputs)
    return values, gradients


def check_close(got, expected, tolerance):
    """All leaves equal up to so much of their largest value."""
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(np.abs(other).max(), 1e-3))


@needs_kernel
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_trunk_is_xlas(size):
    inputs, weights = example(*size)
    values, gradients = value_and_gradients(native.trunk, size[-1], inputs, weights)
    expected, slopes = value_and_gradients(plain_trunk, size[-1], inputs, weights)
    check_close(values, expected, 1e-5)
    check_close(gradients, slopes, 5e-5)


@needs_kernel
@pytest.mark.torch
@pytest.mark.parametrize("silent", [False, True], ids=["noise", "half digital silence"])
def test_trunk_is_torchs(silent):
    torch = pytest.importorskip("torch")
    inputs, weights = example(2, 151, 26, 1, 13, 7, 3)
    if silent:  # equal values: of a window's maxima only the first has the gradient
        inputs[0][:, 40:] = -100
    values, gradients = value_and_gradients(native.trunk, 3, inputs, weights)
    image, *parameters = jax.tree.map(lambda x: torch.tensor(x, dtype=torch.float64).requires_grad_(), inputs)
    x, means, variances = image.permute(0, 3, 1, 2), [], []
    for layer, (kernel, gamma, beta) in enumerate(zip(*parameters, strict=True), start=1):
        x = torch.nn.functional.conv2d(x, kernel.permute(3, 2, 0, 1), padding=1)
        means.append(x.mean((0, 2, 3)))
        variances.append(x.var((0, 2, 3), unbiased=False))
        x = torch.relu(torch.nn.functional.batch_norm(x, None, None, gamma, beta, training=True))
        if layer == 3:
            x = torch.nn.functional.max_pool2d(x, 3, 2, 1)
    features = x.permute(0, 2, 3, 1)
    moments = sum(0.1 * m.sum() for m in means) + sum(0.1 * v.sum() for v in variances)
    ((features * torch.tensor(weights)).sum() + moments).backward()
    plain = partial(jax.tree.map, lambda x: x.detach().numpy())
    check_close(values, plain((features, means, variances)), 2e-5)
    slopes = jax.tree.map(lambda x: x.grad.numpy(), (image, *parameters))
    # in float32 a few values lie on the other side of a ReLU or a maximum; each then moves a gradient by its own share
    check_close(gradients, slopes, 2e-3)


@needs_kernel
def test_silence_gives_its_gradient_to_the_first_maximum():
    # one window of equal values: columns 0 and 1 of both rows; PyTorch's MaxPool2d takes (time, mel) = (0, 0)
    x = jnp.ones((1, 2, 1, native.STEP))
    zero, one = jnp.zeros(1), jnp.ones(1)
    slope = jax.grad(lambda x: native._pool(x, zero, one, zero, 2)[..., :1].sum())(x)
    np.testing.assert_array_equal(slope[0, :, 0, :2], [[1, 0], [0, 0]])


@needs_kernel
def test_moments_keep_their_digits_beside_a_large_mean():
    rng = np.random.default_rng(0)
    image = (-4000 + rng.standard_normal((2, 700, 6, 1))).astype(np.float32)
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[1, 1] = 1
    _, (mean,), (variance,) = native.trunk(image, [kernel], [jnp.ones(1)], [jnp.zeros(1)], 1)
    exact = image.astype(np.float64)
    np.testing.assert_allclose(mean, [exact.mean()], rtol=2e-7)
    np.testing.assert_allclose(variance, [exact.var()], rtol=2e-6)


@needs_kernel
def test_nan_stays_visible():
    inputs, _ = example(2, 20, 4, 1, 3, 2, 1)
    inputs[0][1, 3] = np.nan
    assert not np.isfinite(native.trunk(*inputs, 1)[0]).any()


PROGRAM = """
import hashlib, jax, sys
from test_native import example, native, value_and_gradients
inputs, weights = example(2, 1300, 9, 1, 13, 4, 2)
for _ in range(3):
    found = jax.tree.leaves(value_and_gradients(native.trunk, 2, inputs, weights))
    print(hashlib.sha256(b"".join(bytes(memoryview(x).cast("B")) for x in map(jax.device_get, found))).hexdigest())
"""


def run(program: str, *prefix: str, **variables: str) -> list[str]:
    """The lines that a fresh process with this environment prints."""
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    command = [*prefix, sys.executable, "-c", program]
    result = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path} | variables, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.split("\n")[:-1]


@needs_kernel
def test_bits_do_not_depend_on_threads():
    one, more = (run(PROGRAM, XLA_FLAGS="", NPROC=threads) for threads in ("1", "3"))
    assert len(set(one + more)) == 1


@needs_kernel
@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are of x86-64")
@pytest.mark.parametrize("machine", ["x86-64-v3", "x86-64"], ids=["eight lanes", "four lanes"])
def test_shorter_vectors(tmp_path, machine):
    compiler = tmp_path / "c++"
    command = " ".join(native.compiler())
    compiler.write_text(f'#!/bin/bash\nexec {command} "${{@/-march=native/-march={machine}}}"\n')
    compiler.chmod(0o700)
    run(
        "import pytest, test_native as t\nassert not t.REASON\nfor size in t.SIZES:\n    t.test_trunk_is_xlas(size)",
        CXX=str(compiler),
        XDG_CACHE_HOME=str(tmp_path),
    )


def broken_compiler(path, says: str, version_too: bool) -> str:
    """A compiler that fails; with ``version_too`` not even its version can be asked."""
    allowed = "" if version_too else '[ "$1" = --version ] && exit 0\n'
    path.write_text(f"#!/bin/sh\n{allowed}echo '{says}' >&2\nexit 3\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


SAYS_WHY = "from w2s_jax.models import native, forms; import jax.numpy as n; print(native.unavailable()); "
SAYS_WHY += "print(forms.trains_natively('auto', 3, 1, n.float32, None))"


@pytest.mark.parametrize("version_too", [False, True])
def test_broken_compiler_is_a_reason(tmp_path, version_too):
    compiler = broken_compiler(tmp_path / "c++", "fatal error: no such header", version_too)
    found = run(SAYS_WHY, CXX=compiler, XDG_CACHE_HOME=str(tmp_path))
    assert found == [f"{compiler} ended with 3: fatal error: no such header", "False"]
    assert list(tmp_path.glob("w2s_jax/*")) == []  # no half library


def test_no_compiler_and_no_wish_are_reasons(tmp_path):
    assert "no-such-compiler" in run(SAYS_WHY, CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))[0]
    assert "no C++ compiler" in run(SAYS_WHY, CXX="", PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))[0]
    assert run(SAYS_WHY, W2S_NATIVE="0") == ["W2S_NATIVE=0 turns it off", "False"]


#: Loads, through the cache, a library that is compiled in no time.
ANSWERS = """
import pathlib
from w2s_jax.models import native
native.SOURCE = pathlib.Path(sys.argv[1])
print(native.load(native.compiler()).answer())
"""


def answers(tmp_path) -> list[str]:
    """What a fresh process's library answers, with the cache and the temporary files in ``tmp_path``."""
    source = tmp_path / "answer.cc"
    source.write_text('extern "C" int answer() { return 42; }\n')
    (tmp_path / "tmp").mkdir(exist_ok=True)
    program = ANSWERS.replace("sys.argv[1]", repr(str(source)))
    return run(program, XDG_CACHE_HOME=str(tmp_path / "cache"), TMPDIR=str(tmp_path / "tmp"))


def cached(directory) -> Path:
    (found,) = directory.iterdir()
    return found


@needs_kernel
def test_a_damaged_library_is_compiled_again(tmp_path):
    """A truncated one ended the process with SIGBUS, an empty one gave the slow path for good."""
    assert answers(tmp_path) == ["42"]
    library = cached(tmp_path / "cache" / "w2s_jax")
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    whole = library.read_bytes()
    unloadable = b"no library" + hashlib.sha256(b"no library").digest()
    for damaged in (whole[: len(whole) // 2], b"", unloadable):
        library.write_bytes(damaged)
        assert answers(tmp_path) == ["42"]
        assert cached(library.parent).stat().st_size == len(whole)


@needs_kernel
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give files away")
def test_a_library_of_another_user_is_not_executed(tmp_path, monkeypatch):
    assert answers(tmp_path) == ["42"]
    library = cached(tmp_path / "cache" / "w2s_jax")
    foreign = tmp_path / "foreign.cc"
    foreign.write_text('extern "C" int answer() { return 666; }\n')
    monkeypatch.setattr(native, "SOURCE", foreign)
    compiled.build([*native.compiler(), *native._flags(), str(native.SOURCE)], library)
    assert answers(tmp_path) == ["666"]  # the user's own is believed
    os.chown(library, 65534, 65534)
    assert answers(tmp_path) == ["42"]
    # and where the whole directory is another user's, nothing in it is
    compiled.build([*native.compiler(), *native._flags(), str(native.SOURCE)], library)
    os.chown(library.parent, 65534, 65534)
    assert answers(tmp_path) == ["42"]
    assert cached(tmp_path / "tmp" / f"w2s_jax-{os.geteuid()}").name == library.name


@needs_kernel
def test_a_directory_that_others_can_write_is_not_used(tmp_path):
    directory = tmp_path / "cache" / "w2s_jax"
    directory.mkdir(parents=True)
    directory.chmod(0o770)
    assert answers(tmp_path) == ["42"]
    assert list(directory.iterdir()) == []
    assert stat.S_IMODE((tmp_path / "tmp" / f"w2s_jax-{os.geteuid()}").stat().st_mode) == 0o700
    (tmp_path / "tmp" / f"w2s_jax-{os.geteuid()}").chmod(0o707)
    with pytest.raises(AssertionError, match=f"w2s_jax-{os.geteuid()} is not safe for the compiled kernel"):
        answers(tmp_path)


@needs_kernel
def test_a_home_that_cannot_be_written_is_no_reason(tmp_path):
    (tmp_path / "cache").write_text("a file, which not even root can write into")
    assert answers(tmp_path) == ["42"]


@needs_kernel
def test_two_first_uses_at_once(tmp_path):
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda _: answers(tmp_path), range(2)))
    assert found == [["42"], ["42"]]
    cached(tmp_path / "cache" / "w2s_jax")  # one file, no drafts


def test_a_compiler_that_hangs_is_a_reason(tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nsleep 60 | sleep 60\n")  # as a compiler's driver waits for its parts
    compiler.chmod(0o700)
    monkeypatch.setattr(native, "VERSION_SECONDS", 0.2)
    monkeypatch.setenv("CXX", str(compiler))
    began = time.monotonic()
    assert native._load.__wrapped__() == f"{compiler} did not end within 0.2 s"
    assert time.monotonic() - began < 10


def test_demanded_but_not_to_be_had(monkeypatch):
    monkeypatch.setenv("W2S_NATIVE", "0")
    with pytest.raises(UsageError, match="W2S_NATIVE=0"):
        trains_natively("native", 3, 1, jnp.float32, None)
    with pytest.raises(UsageError, match="5×5"):
        trains_natively("native", 5, 1, jnp.float32, None)
    assert not trains_natively("auto", 5, 1, jnp.float32, None)
    assert not trains_natively("direct", 3, 1, jnp.float32, None)


@needs_kernel
def test_several_devices_without_a_pmap_take_xlas_form(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert not trains_natively("auto", 3, 1, jnp.float32, None)
    assert trains_natively("auto", 3, 1, jnp.float32, "batch")


def steps(form: str, count: int = 5):
    """Losses of some training steps of a small student, and the state after them."""
    student = models.build("wav2small", channels=5, before=2, after=1, form=form)
    waves = np.random.default_rng(0).standard_normal((4, 2000)).astype(np.float32)
    targets = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
    variables = jax.jit(student.init)(jax.random.key(0), waves[:1])
    optimizer = optax.sgd(0.01)
    step = partial(train_step, student=student, frontend=variables["frontend"], optimizer=optimizer, l2=0.1)
    state, step, losses = initial_state(variables, optimizer), jax.jit(step), []
    for _ in range(count):
        state, measured = step(state, (waves, targets))
        losses.append(float(measured["loss"]))
    return losses, state


@pytest.mark.slow
@needs_kernel
def test_training_steps_are_those_of_the_direct_form():
    losses, state = steps("native")
    expected, direct = steps("direct")
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert jax.tree.structure(state) == jax.tree.structure(direct)
    check_close(state.batch_stats, direct.batch_stats, 1e-4)
    check_close(state.params, direct.params, 1e-3)


PMAP = """
import jax, numpy as np
import pmap_against_jit as both
from w2s_jax.models import forms
from w2s_jax.models.wav2small import VGG
asked, before = [], forms.native.trunk
forms.native.trunk = lambda *a: asked.append(a[5]) or before(*a)
both.main("auto")
print(sorted(set(map(str, asked))))
"""


@pytest.mark.slow
@needs_kernel
def test_many_devices_have_the_moments_of_the_global_batch():
    figures, asked = run(PMAP, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    devices, loss, parameters = map(float, figures.split())
    # the step on one of them is XLA's form, as there are two devices
    assert asked == "['batch']"
    assert (devices, loss < 1e-4, parameters < 1e-3) == (2, True, True)
