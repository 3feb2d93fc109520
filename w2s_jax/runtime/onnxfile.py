"""Check an .onnx file, without the onnx package, before onnxruntime opens it.

A model may come from a stranger, and onnxruntime runs whatever it contains: it reads other files that a model names, loops for
ever, and allocates as much memory as a few bytes ask for. So the file is parsed first, in bounded time and memory. Tensors that
become large only with the input are left to the memory limit that every session has (``session.memory_limit``).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

from w2s_jax.errors import W2SError
from w2s_jax.names import line

#: Elements of the largest tensor that constants of a graph may ask for: 128 MB of float32.
LARGEST = 1 << 25
#: Fields of all messages together. A MobileNet has 10,000; a Transformer of 24 layers, as PyTorch writes it, 300,000.
MOST_FIELDS = 1_000_000
#: Bytes that onnxruntime may compute of constants while it loads a file: by one operator, and by all. The weights of the
#: largest student, 80 million stored in 4 bits, pass through half a dozen operators.
FOLDED, ALL_FOLDED = 1 << 26, 1 << 31
#: Levels of ``If`` in ``If``.
DEEPEST = 4
#: Bytes of the metadata.
MOST_METADATA = 1 << 20

#: Standard operators and onnxruntime's own; "ai.onnx" is the long name of "".
DOMAINS = ("", "ai.onnx", "com.microsoft")
#: Operators that repeat a body as often as a constant tells, or read another file.
REFUSED = ("Loop", "Scan", "SequenceMap", "EPContext")
#: Operators whose output size is set by constants → the positions of these among the inputs.
_SIZED = {
    "BlackmanWindow": (0,), "CenterCropPad": (1,), "Col2Im": (1,), "ConstantOfShape": (0,), "DFT": (1,), "Expand": (1,),
    "HammingWindow": (0,), "HannWindow": (0,), "MelWeightMatrix": (0, 1), "OneHot": (1,), "Pad": (1,), "Range": (0, 1, 2),
    "Resize": (1, 2, 3), "Tile": (1,), "Upsample": (1,),
}  # fmt: skip
#: Operators whose output has the first input's shape, or at most its size, or the shape of all, broadcast.
_SAME_SHAPE = ("Abs", "Cast", "Cos", "DequantizeLinear", "Exp", "Identity", "Neg", "Not", "ScatterElements", "Sin", "Sqrt")
_SAME_SIZE = ("Flatten", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
_BROADCAST = ("Add", "And", "Div", "Equal", "Greater", "Less", "Mod", "Mul", "Or", "Pow", "Sub", "Where")
#: Only constants with at most so many elements are read: shapes, not weights.
_SHORT = 64
#: TensorProto.DataType → bits of an element in ``raw_data``; strings are not among them.
_BITS = {
    2: 8, 3: 8, 9: 8, 17: 8, 18: 8, 19: 8, 20: 8, 24: 8, 4: 16, 5: 16, 10: 16, 16: 16, 1: 32, 6: 32, 12: 32,
    7: 64, 11: 64, 13: 64, 14: 64, 15: 128, 21: 4, 22: 4, 23: 4, 25: 2, 26: 2,
}  # fmt: skip
_STRING = 8
#: TensorProto.DataType → its format in ``struct``; floats are sizes of ``Resize``.
_FORMATS = {1: "f", 6: "i", 7: "q", 11: "d"}


def check(content: bytes, name: str) -> int:
    """Refuse the content of an .onnx file that is damaged, or that asks for more than a network from audio to values needs.

    Args:
        content: of the file; an ``mmap`` will do.
        name: for messages.

    Returns:
        Bytes that one operator on constants may make while the file is loaded, so that all of them keep within ``ALL_FOLDED``:
        that memory is taken past the limit which every session has. What makes more is computed in every call, within it.

    Raises:
        W2SError: one line with the reason, and with a way out where there is one.
    """
    file = _File(content, name)
    file.model()
    return FOLDED if file.folded <= ALL_FOLDED else ALL_FOLDED // file.folding


class _File:
    """One pass over a file; every method raises W2SError."""

    def __init__(self, content, name: str):
        self._content, self._name, self._left = content, name, MOST_FIELDS
        self._metadata, self._facts = 0, {}
        self.folding = self.folded = 0  # outputs of operators on constants; at most how many bytes they have

    def _refusal(self, why: str) -> W2SError:
        return W2SError(f"{self._name} is refused: {why}")

    def _damage(self, why: str) -> W2SError:
        return W2SError(f"{self._name} is damaged or not an ONNX model: {why}")

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while at < end and shift < 70:
            byte = self._content[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value & 0xFFFF_FFFF_FFFF_FFFF, at
        raise self._damage(f"a number does not end at byte {at}")

    def _fields(self, at: int, end: int, kinds: dict[int, str]) -> Iterator[tuple[int, int, int]]:
        """(number, start, end) of each field between two bytes, or (number, value, value) of a number.

        ``kinds``: number → wire type of the fields that are read: "n" a number, "m" bytes, "f" four bytes, "d" eight; "*" bytes
        or a number, as a repeated number is.
        """
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise self._refusal(f"it has more than {MOST_FIELDS:,} parts")
            tag, at = self._varint(at, end)
            number, kind = tag >> 3, tag & 7
            if kind == 0:
                value, at = self._varint(at, end)
                start = stop = value
            else:
                if kind == 2:
                    size, at = self._varint(at, end)
                else:
                    size = {1: 8, 5: 4}.get(kind, -1)
                start, stop = at, at + size
                at = stop
                if size < 0 or at > end:
                    raise self._damage(f"it ends within a part, at byte {start}")
            if number == 0 or (number in kinds and {0: "n", 2: "m", 5: "f", 1: "d"}[kind] not in kinds[number]):
                raise self._damage(f"an unexpected part before byte {at}")
            yield number, start, stop

    def _text(self, start: int, end: int) -> str:
        if end - start > MOST_METADATA:
            raise self._refusal(f"a name or a description in it has {end - start:,} bytes")
        try:
            return bytes(self._content[start:end]).decode()
        except UnicodeDecodeError as error:
            raise self._damage(f"a name or a description in it is not UTF-8, at byte {start}") from error

    def model(self) -> None:
        graphs = 0
        kinds = {1: "n", 7: "m", 8: "m", 14: "m", 25: "m"}
        for number, start, end in self._fields(0, len(self._content), kinds):
            if number == 7:
                graphs += 1
                self._graph(start, end, {}, {}, 0)
            elif number == 8:
                self._domain(start, end)
            elif number == 14:
                self._entry(start, end)
            elif number == 25:
                raise self._refusal("it has functions of its own; export it with them inlined (onnx.inliner)")
        if graphs != 1:
            raise self._damage(f"expected one graph, got {graphs}")

    def _domain(self, start: int, end: int) -> None:
        for number, *place in self._fields(start, end, {1: "m"}):
            if number == 1:
                self._text(*place)  # one that no operator uses does no harm

    def _entry(self, start: int, end: int) -> None:
        self._metadata += end - start
        if self._metadata > MOST_METADATA:
            raise self._refusal(f"its metadata has more than {MOST_METADATA:,} bytes")
        entry = {1: "", 2: ""}
        for number, *place in self._fields(start, end, {1: "m", 2: "m"}):
            if number in entry:
                entry[number] = self._text(*place)
        key, value = entry.values()
        if self._facts.setdefault(key, value) != value:  # readers differ in which one they take
            raise self._refusal(f"its metadata has two values for {line(repr(key), 40)}")

    def _graph(self, start: int, end: int, outer: dict[str, list], known: dict[str, tuple | int], depth: int) -> None:
        if depth > DEEPEST:
            raise self._refusal(f"it has graphs in graphs, more than {DEEPEST} deep")
        constants, shapes, nodes = dict(outer), dict(known), []
        kinds = {1: "m", 5: "m", 11: "m", 12: "m", 13: "m", 15: "m"}
        for number, *place in self._fields(start, end, kinds):
            if number == 1:
                nodes.append((*self._node(*place), place[1] - place[0]))
            elif number == 5:
                name, values, sizes = self._tensor(*place)
                shapes[name] = tuple(sizes)
                if values is not None:
                    constants[name] = values
            elif number in (11, 12, 13):
                self._value(*place, number == 11)
            elif number == 15:
                raise self._refusal("it has sparse tensors; export it without them")
        for operator, _, outputs, attributes, _, length in nodes:
            if operator == "Constant" and outputs:
                shapes[outputs[0]] = length  # it has no more numbers than bytes
                if attributes:
                    constants[outputs[0]] = next(iter(attributes.values()))
        coming = {name for _, _, outputs, *_ in nodes for name in outputs}
        for operator, inputs, outputs, attributes, bodies, _ in nodes:
            self._check_sizes(operator, inputs, attributes, constants)
            shapes |= dict.fromkeys(coming.intersection(inputs), FOLDED)  # not in order: it may be a constant, and large
            coming.difference_update(outputs)
            self._fold(operator, inputs, outputs, constants, shapes)
            for body in bodies:
                self._graph(*body, constants, shapes, depth + 1)

    def _fold(
        self, operator: str, inputs: list[str], outputs: list[str], constants: dict[str, list], shapes: dict[str, tuple | int]
    ) -> None:
        """Count what an operator makes of constants. ``shapes`` has theirs; a number where only the size is known."""
        shaped = operator in ("Shape", "Size")  # constant wherever an input's shape is
        if operator == "Constant" or not (shaped or all(name in shapes for name in inputs if name)):
            return
        made = 32 if shaped else _made(operator, [shapes.get(name, 1) for name in inputs], [constants.get(x) for x in inputs])
        for output in outputs:
            shapes[output] = made if _size(made) < FOLDED else FOLDED  # not to reckon with giants
            self.folding += 1
            self.folded += min(4 * _size(made), FOLDED)

    def _node(self, start: int, end: int) -> tuple[str, list[str], list[str], dict[str, list], list]:
        """Operator, names of inputs and outputs, attributes that are numbers, and places of bodies."""
        operator = domain = ""
        inputs, outputs, attributes, bodies = [], [], {}, []
        kinds = {1: "m", 2: "m", 3: "m", 4: "m", 5: "m", 7: "m"}
        for number, *place in self._fields(start, end, kinds):
            if number == 5:
                name, values, graphs = self._attribute(*place)
                bodies += graphs
                if values is not None:
                    attributes[name] = values
            elif number in kinds:
                text = self._text(*place)
                if number == 1:
                    inputs.append(text)
                elif number == 2:
                    outputs.append(text)
                elif number == 4:
                    operator = text
                elif number == 7:
                    domain = text
        if domain not in DOMAINS:
            raise self._refusal(f"the operator {operator!r} is of the domain {domain!r}; expected ONNX's or com.microsoft")
        if operator in REFUSED or (bodies and operator != "If"):
            raise self._refusal(
                f"it has the operator {operator!r}, which no network from audio to values needs; export it without"
            )
        return operator, inputs, outputs, attributes, bodies

    def _attribute(self, start: int, end: int) -> tuple[str, list | None, list]:
        """Name, numbers if it is some, and places of graphs."""
        name, values, bodies = "", None, []
        kinds = {1: "m", 2: "f", 3: "n", 5: "m", 6: "m", 7: "fm", 8: "nm", 10: "m", 11: "m", 22: "m", 23: "m"}
        for number, *place in self._fields(start, end, kinds):
            if number == 1:
                name = self._text(*place)
            elif number == 3:
                values = [_signed(place[0])]
            elif number == 8:
                values = (values or []) + self._integers(*place)
            elif number == 7:
                if place[1] - place[0] <= 4 * _SHORT:
                    flat = bytes(self._content[place[0] : place[1]])
                    values = (values or []) + [value for (value,) in struct.iter_unpack("<f", flat[: len(flat) // 4 * 4])]
            elif number in (5, 10):
                _, values, _ = self._tensor(*place)
            elif number in (6, 11):
                bodies.append(place)
            elif number in (22, 23):
                raise self._refusal("it has sparse tensors; export it without them")
        return name, values, bodies

    def _integers(self, start: int, end: int) -> list[int]:
        """Packed numbers, at most ``_SHORT`` of them, or a single one (start and end are its value)."""
        if start == end:
            return [_signed(start)]
        values = []
        while start < end and len(values) < _SHORT:
            value, start = self._varint(start, end)
            values.append(_signed(value))
        return values

    def _tensor(self, start: int, end: int) -> tuple[str, list | None, list[int]]:
        """Name, values if they are few, and shape."""
        name, kind, sizes, stored, raw, numbers, floats = "", 0, [], 0, None, [], []
        kinds = {1: "*nm", 2: "n", 4: "fm", 5: "nm", 6: "m", 7: "nm", 8: "m", 9: "m", 10: "dm", 11: "nm", 13: "m", 14: "n"}
        for number, *place in self._fields(start, end, kinds):
            if number == 1:
                sizes += self._integers(*place)
            elif number == 2:
                kind = place[0]
            elif number == 8:
                name = self._text(*place)
            elif number == 9:
                raw = place
            elif number == 13 or (number == 14 and place[0]):
                raise self._refusal(
                    f"the values of {name or 'a tensor'!r} are in another file; save it as one file: "
                    "onnx.save(onnx.load('model.onnx'), 'whole.onnx')"
                )
            elif number in (4, 5, 6, 7, 10, 11):
                stored += max(place[1] - place[0], 1)
                if number == 7 and place[1] - place[0] <= 10 * _SHORT and len(numbers) < _SHORT:
                    numbers += self._integers(*place)
                elif number == 4 and place[1] - place[0] <= 4 * _SHORT:
                    floats.append(place)
        if len(sizes) > 32 or any(size < 0 for size in sizes):
            raise self._damage(f"the tensor {name!r} has the shape {sizes[:8]}")
        elements = math.prod(sizes)
        if kind != _STRING and kind not in _BITS:
            raise self._damage(f"the tensor {name!r} has the unknown type {kind}")
        # a number has a byte at least; two of 4 bits share one, and four of 2 bits
        held = (raw[1] - raw[0]) * 8 // _BITS.get(kind, 8) if raw else stored * 4
        if elements > held:
            raise self._damage(f"the tensor {name!r} has the shape {sizes}, but {raw[1] - raw[0] if raw else stored} bytes")
        if elements > _SHORT or kind not in _FORMATS:
            return name, None, sizes
        if raw:
            flat, form = bytes(self._content[raw[0] : raw[1]]), "<" + _FORMATS[kind]
            numbers = [
                value
                for (value,) in struct.iter_unpack(form, flat[: len(flat) // struct.calcsize(form) * struct.calcsize(form)])
            ]
            return name, numbers, sizes
        if floats:
            flat = b"".join(bytes(self._content[at:stop]) for at, stop in floats)
            return name, [value for (value,) in struct.iter_unpack("<f", flat[: len(flat) // 4 * 4])], sizes
        return name, numbers or None, sizes

    def _value(self, start: int, end: int, inward: bool) -> None:
        """Check an input (``inward``) or output of a graph: its names are text, a fixed size of an input is not absurd."""
        for number, *place in self._fields(start, end, {1: "m", 2: "m"}):
            if number == 1:
                self._text(*place)
            elif number == 2:
                for part, *tensor in self._fields(*place, {1: "m"}):
                    if part == 1:
                        self._shape(*tensor, inward)

    def _shape(self, start: int, end: int, inward: bool) -> None:
        sizes = []
        for number, *shape in self._fields(start, end, {2: "m"}):
            if number != 2:
                continue
            for part, *size in self._fields(*shape, {1: "m"}):
                if part != 1:
                    continue
                for which, *value in self._fields(*size, {1: "n", 2: "m"}):
                    if which == 1:
                        sizes.append(max(1, _signed(value[0])))
                    elif which == 2:
                        self._text(*value)
        if inward and math.prod(sizes) > LARGEST:
            raise self._refusal(f"it wants {math.prod(sizes):,} samples at once, expected at most {LARGEST:,}")

    def _check_sizes(self, operator: str, inputs: list[str], attributes: dict[str, list], constants: dict[str, list]) -> None:
        """Refuse an operator whose output constants make huge."""
        given = [constants.get(inputs[at]) for at in _SIZED.get(operator, ()) if at < len(inputs)]
        sizes = [_product(attributes.get(key, [])) for key in ("shape", "output_shape", "output_padding", "scales", "repeats")]
        sizes.append(_around(attributes.get("pads", [])))
        if operator == "Range" and all(given):
            (first,), (last,), (step,) = (values[:1] for values in given)
            sizes.append(abs(last - first) / abs(step) if step else 0)
        elif operator == "Pad" and all(given):
            sizes += map(_around, given)
        elif operator != "Range":
            sizes += [_product(values) for values in given if values]
        if any(not size <= LARGEST for size in sizes):
            raise self._refusal(f"an operator {operator!r} makes {max(sizes):,.0f} numbers, expected at most {LARGEST:,}")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _size(shape: tuple | int) -> int:
    return shape if isinstance(shape, int) else math.prod(shape)


def _made(operator: str, shapes: list[tuple | int], values: list[list | None]) -> tuple | int:
    """The shape that an operator makes of constants, or at most how many numbers."""
    sizes = [_size(shape) for shape in shapes]
    if operator == "Reshape" and len(values) > 1 and values[1] and all(type(size) is int and size > 0 for size in values[1]):
        return tuple(values[1])
    if operator in _SAME_SHAPE and shapes:
        return shapes[0]
    if operator in _SAME_SIZE and sizes:
        return sizes[0]
    if operator == "Concat":
        return sum(sizes)
    if operator == "Gather":
        return math.prod(sizes)
    if operator in _BROADCAST and all(isinstance(shape, tuple) for shape in shapes):
        rank = max(map(len, shapes), default=0)
        return tuple(map(max, zip(*((1,) * (rank - len(shape)) + shape for shape in shapes), strict=True)))
    if operator in _BROADCAST:
        return math.prod(sizes)
    if operator == "ConstantOfShape" and values and values[0]:
        return int(_product(values[0]))
    if operator == "Range" and len(values) == 3 and all(values) and values[2][0]:
        return int(abs(values[1][0] - values[0][0]) / abs(values[2][0])) + 1
    if operator in ("Expand", "Tile") and len(values) == 2 and values[1]:
        return int(sizes[0] * _product(values[1]))
    if operator == "Pad" and len(values) > 1 and values[1]:
        return int(sizes[0] * _around(values[1]))
    return FOLDED


def _product(values: list) -> float:
    """Of sizes; those that are copied from elsewhere (0, -1) count as 1."""
    return math.prod(max(1.0, abs(float(value))) for value in values)


def _around(pads: list) -> float:
    """What zeros on both sides of a single element make of it: begins first, then ends."""
    half = len(pads) // 2
    return math.prod(1.0 + abs(begin) + abs(end) for begin, end in zip(pads[:half], pads[half:], strict=False))
