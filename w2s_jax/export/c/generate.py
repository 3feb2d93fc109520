"""A student as C99: one header and one file of code and weights, for anything that has a C compiler.

The hand-written parts lie beside this file: ``basics.c`` (vectors, products of matrices), ``float.c`` or ``int8.c``
(convolutions and the product behind them) and ``engine.c`` (front end, order of the layers, pooling, streams). What is written
here are their sizes, as macros, and the weights, in the order in which they are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from types import MappingProxyType

import numpy as np

from w2s_jax import SAMPLING_RATE, __version__
from w2s_jax.export.c.network import BATCH, GROUP, PANEL, Network, head_matrix, sizes_of, take_apart
from w2s_jax.export.c.quantise import Numbers
from w2s_jax.kinds import HEADER, SOURCE
from w2s_jax.models.plan import Plan
from w2s_jax.names import line

PLACE = Path(__file__).parent
#: Bytes that work memory may be moved by, to a line of the cache; LINE in basics.c.
LINE = 64
#: numpy's type → C's.
C_TYPES = {"f4": "float", "i1": "int8_t", "i4": "int32_t"}
#: Winograd's F(4, 3) of a kernel [3] over time (Lavin and Gray, arXiv 1509.09308).
WINOGRAD = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)
WINOGRAD_OF_TWO = np.array([[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, -1]])


def generate(plan: Plan, facts: Mapping[str, str], packed: bool = False) -> dict[str, bytes]:
    """The files of the kind "c".

    Args:
        plan: as ``plan.fold`` gives it.
        facts: what the file says of itself.
        packed: store the larger weights in 8 bits, with a scale for each column of a block. A function ``w2s_unpack`` makes
            float32 of them, in variables, and has to be called before all others.

    Returns:
        name → content.

    Raises:
        UsageError: C has no code for this network; says for what of it.
    """
    network = take_apart(plan)
    arrays = {name: value.astype(np.float32) for name, value in (_front_end(network) | _floats(network)).items()}
    return _compose(plan, network, arrays, facts, "float", packed=_pack(network, arrays) if packed else {})


def generate_int8(plan: Plan, numbers: Numbers, facts: Mapping[str, str], shift: np.ndarray | float = 0.0) -> dict[str, bytes]:
    """The files of the kind "c-int8".

    Args:
        plan: as ``plan.fold`` gives it.
        numbers: of ``quantise.quantise``.
        facts: what the file says of itself.
        shift: of the outputs, [D].

    Returns:
        name → content.
    """
    network = take_apart(plan)
    arrays = {name: value.astype(np.float32) for name, value in _front_end(network).items()}
    arrays["output_bias"] = arrays["output_bias"] + np.asarray(shift, np.float32)
    return _compose(plan, network, arrays | _integers(network, numbers), facts, "int8", numbers)


def panels(matrix: np.ndarray) -> np.ndarray:
    """A matrix [taps, depth, columns] as ``multiply`` in basics.c reads it: [panel, taps, depth, PANEL], filled with zeros."""
    taps, depth, columns = matrix.shape
    filled = np.pad(matrix, ((0, 0), (0, 0), (0, -columns % PANEL)))
    return filled.reshape(taps, depth, -1, PANEL).transpose(2, 0, 1, 3).ravel()


def _front_end(network: Network) -> dict[str, np.ndarray]:
    """The arrays that all kinds have in float32, and the output layer."""
    sizes, spectrum = sizes_of(network), network.spectrum
    sines = slice(sizes["FIRST_SINE"], sizes["FIRST_SINE"] + sizes["PARTS_OF_SPECTRUM"] - sizes["BINS"])
    fourier = np.concatenate([spectrum.real, spectrum.imag[:, sines]], axis=1)
    arrays = {"fourier": panels(fourier[None]), "mel_bands": panels(network.mel.matrix[None])}
    return arrays | output_layer(network)


def output_layer(network: Network) -> dict[str, np.ndarray]:
    """The arrays behind the pooling: its features are ordered (place, feature)."""
    sizes, arrays = sizes_of(network), {}
    kernel, bias = network.output.kernel, network.output.bias
    features, channels, mels = (sizes[name] for name in ("FEATURES", "CHANNELS", "MELS_AFTER"))
    if network.gram:  # [feature, mels + features] flattened → [mel, feature], then [feature, feature]
        rows = kernel.reshape(features, mels + features, -1)
        kernel = np.concatenate(
            [rows[:, :mels].transpose(1, 0, 2).reshape(mels * features, -1), rows[:, mels:].reshape(features**2, -1)]
        )
        bias_of_pooling = network.pooling.bias
        arrays["pooled_bias"] = np.zeros(features) if bias_of_pooling is None else bias_of_pooling
    elif network.mix is not None:  # moments of [channel, mel] → [mel, channel]; the mean has the bias that the values lack
        rows = kernel.reshape(-1, channels, mels, kernel.shape[1])
        bias = bias + np.einsum("c,cmo->o", network.mix.bias, rows[0])
        kernel = rows.transpose(0, 2, 1, 3).reshape(len(kernel), -1)
    return arrays | {"output_kernel": kernel.T, "output_bias": bias}


def _floats(network: Network) -> dict[str, np.ndarray]:
    """The arrays of the convolutions and of the product behind them."""
    first, *others = network.before + network.after
    channels = len(first.bias)
    # [out, in, mel, time] → [time, mel · in, out]
    kernels = [layer.kernel.transpose(3, 2, 1, 0) for layer in others]
    if first.kernel.shape[2] == 3:
        # the combinations of WINOGRAD over time; over mel F(2, 3), whose last one is only ever subtracted
        kernels = [np.einsum("kt,jm,tmio->kjio", WINOGRAD, WINOGRAD_OF_TWO, kernel) for kernel in kernels]
        kernels = [np.stack([panels(part) for part in kernel]) for kernel in kernels]
    else:
        kernels = [panels(kernel.reshape(len(kernel), -1, channels)) for kernel in kernels]
    fill = -channels % PANEL
    return {
        "first_kernel": panels(first.kernel[:, 0].transpose(2, 1, 0)),
        "first_bias": np.pad(first.bias, (0, fill)),
        "kernels": np.stack([kernel.ravel() for kernel in kernels]) if others else np.zeros((1, PANEL)),
        "biases": np.pad(np.stack([layer.bias for layer in others]), ((0, 0), (0, fill))) if others else np.zeros((1, PANEL)),
        "head_kernel": panels(head_matrix(network)[None]),
    }


def words(matrix: np.ndarray) -> np.ndarray:
    """Weights int8 [taps, depth, columns] as ``multiply_bytes`` in int8.c reads them: [panel, taps, word, PANEL, 4]."""
    taps, depth, columns = matrix.shape
    filled = np.pad(matrix, ((0, 0), (0, -depth % 4), (0, -columns % PANEL)))
    return filled.reshape(taps, -1, 4, filled.shape[2] // PANEL, PANEL).transpose(3, 0, 1, 4, 2).ravel()


def _integers(network: Network, numbers: Numbers) -> dict[str, np.ndarray]:
    """The arrays of the convolutions and of the product behind them, in eight bits."""
    first, *others = numbers.layers
    fill = (0, -len(first.bias) % PANEL)

    def kernel(layer) -> np.ndarray:  # [out, in, mel, time] → [time, mel · in, out]
        by_time = layer.kernel.transpose(3, 2, 1, 0)
        return words(by_time.reshape(len(by_time), -1, by_time.shape[3]))

    none = {"kernels": np.zeros((1, PANEL), np.int8), "biases": np.zeros((1, PANEL), np.int32)}
    behind = {
        "kernels": np.stack([kernel(layer) for layer in others]),
        "biases": np.stack([np.pad(layer.bias, fill) for layer in others]),
        "steps_of": np.stack([np.pad(layer.scale, fill) for layer in others]),
    } if others else none | {"steps_of": np.zeros((1, PANEL), np.float32)}  # fmt: skip
    return {
        "first_kernel": kernel(first),
        "first_bias": np.pad(first.bias, fill),
        "first_scale": np.pad(first.scale, fill),
        **behind,
        "head_kernel": words(numbers.head[None]),
        "head_scale": numbers.head_scale,
    }


def _bytes(sizes: Mapping[str, int], cell: int) -> dict[str, int]:
    """Bytes of the structures of engine.c, whose ``CHECK`` compares them with what the compiler makes of it."""
    filled = {name: -(-sizes[name] // PANEL) * PANEL for name in ("PARTS_OF_SPECTRUM", "BANDS", "CHANNELS", "FEATURES")}
    wide, channels, reach, frames = filled["CHANNELS"], sizes["CHANNELS"], sizes["REACH"], sizes["FRAMES"]
    winograd, pairs, places = cell == 4 and sizes["W2S_KERNEL"] == 3, (sizes["MELS"] + 1) // 2, sizes["PLACES"]
    margins = 0 if winograd else 2 * reach
    column, column_after = ((sizes[name] + margins) * channels for name in ("MELS", "MELS_AFTER"))
    image, more = sizes["BANDS"] + 2 * reach, wide - channels
    if cell == 1:
        image, column, column_after = (-(-size // 4) * 4 + 4 for size in (image, column, column_after))
        trunk = 4 * GROUP * sizes["MELS"] * wide
    else:
        trunk = 4 * (2 * (6 if winograd else GROUP) * pairs * wide + (4 * pairs * wide if winograd else 1))
    kept = max(sizes["KEPT_OF_IMAGE"], 1) * image + (sizes["BEFORE"] - 1) * 2 * reach * column
    kept += sizes["AFTER"] * 2 * reach * column_after + 2 * more + sizes["MELS_AFTER"] * wide
    token = places * sizes["PARTS"] * filled["FEATURES"]
    front = frames * (sizes["W2S_FFT"] + filled["PARTS_OF_SPECTRUM"] + sizes["BINS"] + filled["BANDS"])
    images = frames * image + GROUP * (column + column_after + 2 * more)
    pooled = places * filled["FEATURES"]
    pipeline = _words(8 + 4 * sizes["SAMPLES"] + cell * kept)
    sums, block = (12 * pooled, 8 * places * sizes["FEATURES"]) if sizes["W2S_ATTENTION"] else (4 + 8 * pooled,) * 2
    work = _words(8 * frames + max(4 * front, trunk, 4 * GROUP * token, sums + block) + cell * images)
    return {
        "predict_base": pipeline + work + 2 * sums + block + LINE + _words(cell * GROUP * sizes["TOKEN"]),
        "predict_token": 4 * token + cell * sizes["TOKEN"],
        "scratch_bytes": work + LINE,
        "stream_base": 44 + sums + pipeline,
        "stream_block": block,
    }


def _words(size: int) -> int:
    """The next multiple of 4."""
    return -(-size // 4) * 4


def _text(value: str) -> str:
    """A C string literal."""
    body = "".join(chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\?' else f"\\{byte:03o}" for byte in value.encode())
    return f'"{body}"'


def _array(name: str, value: np.ndarray, kind: str) -> str:
    """A C array: float32 in their shortest exact form, whole numbers as they are."""
    flat = value.reshape(-1) if value.ndim == 1 else value.reshape(len(value), -1)
    rows = [flat] if flat.ndim == 1 else flat
    form = (lambda number: f"{number!s}f") if kind == "float" else str
    lines = []
    for row in rows:
        texts = [form(number) for number in row]
        body = ",\n".join(", ".join(texts[at : at + 12]) for at in range(0, len(texts), 12))
        lines.append(body if flat.ndim == 1 else f"{{{body}}}")
    shape = "".join(f"[{size}]" for size in flat.shape)
    return f"static const ALIGNED {kind} {name}{shape} = {{\n" + ",\n".join(lines) + "};\n"


def _pack(network: Network, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The larger arrays in 8 bits: for each, a variable of float32, numbers and scales, and a function that unpacks them."""
    others = (network.before + network.after)[1:]
    head = arrays["head_kernel"].reshape(-1, len(head_matrix(network)), PANEL)
    numbers, scales = _round_columns(head)
    packed = {
        "head_kernel": _unpacking(
            "head_kernel",
            arrays,
            numbers,
            scales,
            f"""\
    for (int i = 0; i < {head.size}; i++)
        head_kernel[i] = head_kernel_scales[i / {head[0].size} * {PANEL} + i % {PANEL}] * (float)head_kernel_numbers[i];
""",
        )
    }
    if not others or others[0].kernel.shape[2] != 3:
        return packed
    # [out, in, mel, time] → [layer, panel, time · mel · in, PANEL]: as they are, and combined only when they are unpacked
    plain = [panels(layer.kernel.transpose(3, 2, 1, 0).reshape(9, -1, len(layer.bias))) for layer in others]
    channels = len(others[0].bias)
    numbers, scales = _round_columns(np.stack(plain).reshape(-1, 9 * channels, PANEL).astype(np.float32))
    tables = _array("over_time", WINOGRAD.astype(np.float32), "float")
    tables += _array("over_mel", WINOGRAD_OF_TWO.astype(np.float32), "float")
    count = -(-channels // PANEL)
    return packed | {
        "kernels": tables
        + _unpacking(
            "kernels",
            arrays,
            numbers,
            scales,
            f"""\
    float *to = &kernels[0][0];
    for (int layer = 0; layer < {len(others)}; layer++)
        for (int k = 0; k < 6; k++)
            for (int panel = layer * {count}; panel < (layer + 1) * {count}; panel++)
                for (int j = 0; j < 4; j++)
                    for (int at = 0; at < {channels * PANEL}; at++) {{
                        float sum = 0.0f;
                        for (int tap = 0; tap < 9; tap++)
                            sum += over_time[k][tap / 3] * over_mel[j][tap % 3]
                                   * (float)kernels_numbers[(panel * 9 + tap) * {channels * PANEL} + at];
                        *to++ = sum * kernels_scales[panel * {PANEL} + at % {PANEL}];
                    }}
""",
        )
    }


def _round_columns(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks [N, depth, PANEL] → whole numbers up to 127, int8, and the scale of each column of a block, float32 [N, PANEL]."""
    scales = np.maximum(np.abs(blocks).max(axis=1) / 127, 1e-30).astype(np.float32)
    return np.rint(blocks / scales[:, None]).astype(np.int8), scales


def _unpacking(name: str, arrays: Mapping[str, np.ndarray], numbers: np.ndarray, scales: np.ndarray, body: str) -> str:
    """A variable, what it is made of, and the function that makes it."""
    value = arrays[name]
    shape = "".join(f"[{size}]" for size in (value.shape if value.ndim == 1 else (len(value), value[0].size)))
    return (
        f"static ALIGNED float {name}{shape};\n"
        + _array(f"{name}_numbers", numbers.ravel(), "int8_t")
        + _array(f"{name}_scales", scales.ravel(), "float")
        + f"static void unpack_{name}(void)\n{{\n{body}}}\n"
    )


def _compose(
    plan: Plan,
    network: Network,
    arrays: Mapping[str, np.ndarray],
    facts: Mapping[str, str],
    part: str,
    numbers: Numbers | None = None,
    packed: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, bytes]:
    """The files, from the arrays and the sizes; ``part`` is the hand-written part for numbers of their kind."""
    sizes = sizes_of(network)
    codes = [(PLACE / f"{name}.c").read_text("utf-8") for name in ("basics", part, "engine")]
    weights = "\n".join(packed.get(name) or _array(name, value, C_TYPES[value.dtype.str[1:]]) for name, value in arrays.items())
    if packed:
        calls = " ".join(f"unpack_{name}();" for name in packed)
        weights += f"\nvoid w2s_unpack(void);\nvoid w2s_unpack(void)\n{{\n    {calls}\n}}\n"
    macros = "\n".join(f"#define {name} {value}" for name, value in sizes.items())
    macros += (
        f"\n#define FLOOR {np.float32(network.log.floor)!s}f\n#define NORM_EPSILON {np.float32(network.normalise.epsilon)!s}f"
    )
    if sizes["W2S_DEVIATION"]:
        macros += f"\n#define DEVIATION_EPSILON {np.float32(network.pooling.epsilon)!s}f"
    if numbers is not None:
        macros += f"\n#define W2S_EXACT\n#define IMAGE_STEPS {numbers.steps!s}f\n#define IMAGE_ZERO {numbers.zero}"
    names = facts["dimensions"].split(",")
    texts = f"const char *const w2s_dimensions[W2S_DIMENSIONS] = {{{', '.join(map(_text, names))}}};\n"
    token, step = 2 * sizes["STRIDE"] * sizes["W2S_HOP"], sizes["FRAMES"] * sizes["W2S_HOP"]
    first = sizes["SAMPLES"] - step + -(-(sizes["LAG"] + 1) // GROUP) * step
    latency = sizes["SAMPLES"] + sizes["LAG"] * token
    facts = dict(facts) | {"token_samples": str(token), "latency_samples": str(latency)}
    texts += f"const char *const w2s_metadata =\n    {_text(json.dumps(dict(facts), ensure_ascii=False))};\n"
    body = "\n".join([macros, "", codes[0], texts, weights, *codes[1:]])
    memory = _bytes(sizes, 1 if part == "int8" else 4)
    template = Template((PLACE / "model.h").read_text("utf-8"))
    header = template.substitute(
        title=_comment(f"{facts.get('student', 'a student')}: {SAMPLING_RATE} Hz mono speech in, {', '.join(names)} out."),
        about=_comment(_describe(facts)),
        version=_text(__version__),
        fingerprint=hashlib.sha256((macros + weights + "".join(codes)).encode()).hexdigest()[:8],
        rate=SAMPLING_RATE,
        dimensions=len(names),
        minimum=plan.minimum_samples,
        token=token,
        first=first,
        latency=latency,
        batch=BATCH,
        **memory,
    )
    intro = f'/* Made by w2s_jax {__version__}; see w2s_model.h. */\n\n#include "w2s_model.h"\n\n'
    files = {HEADER: header, SOURCE: intro + body, "example.c": (PLACE / "example.c").read_text("utf-8")}
    files["README.md"] = Template((PLACE / "README.template.md").read_text("utf-8")).substitute(
        title=line(facts.get("student", "A student")),
        what="8-bit" if part == "int8" else "float32",
        flags="-ffp-contract=off" if part == "int8" else "-ffp-contract=fast",
        names=", ".join(names),
        minimum=plan.minimum_samples,
        latency=f"{1000 * latency / SAMPLING_RATE:.0f}",
        stream=f"{memory['stream_base'] + 19 * memory['stream_block']:,}",
        scratch=f"{memory['scratch_bytes']:,}",
        predict=f"{memory['predict_base'] + BATCH * memory['predict_token']:,}",
        small=f"{memory['predict_base'] + GROUP * memory['predict_token']:,}",
        teacher=line(facts.get("teacher", "not recorded")),
        licence=line(facts.get("licence", "not recorded")),
    )
    return {name: text.encode() for name, text in files.items()}


def _describe(facts: Mapping[str, str]) -> str:
    lines = [f"{key}: {facts[key]}" for key in ("teacher", "licence", "source", "w2s_jax") if facts.get(key)]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> str:
    """Text that does not end a comment, whatever a teacher calls itself."""
    return text.replace("*/", "* /").replace("/*", "/ *").replace("\\", "/").replace("??", "? ?")
