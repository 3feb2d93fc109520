"""Counts of ONNX graphs against arithmetic by hand."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs pip install 'w2s-jax[export]'")
from onnx import TensorProto, helper  # noqa: E402
from toys import save, save_own, save_toy  # noqa: E402

from w2s_jax import operations  # noqa: E402
from w2s_jax.errors import UsageError, W2SError  # noqa: E402


@pytest.fixture
def toy(tmp_path):
    return save_toy(tmp_path / "toy.onnx")


@pytest.fixture
def own(tmp_path):
    return save_own(tmp_path / "own.onnx")


def test_counts_are_those_by_hand(toy):
    counted = operations.count(toy, seconds=1.6)
    assert counted["macs"] == 799 * 8 * 64 + 799 * 8 * 3 + 799 * 8 * 5 + 5 * 4
    assert counted["parameters"] == 8 * 64 + 8 * 3 + 8 + 8 * 5 + 4 * 5
    assert counted["uncounted"] == []


def test_quantised_products_are_counted_and_others_named(tmp_path):
    eight = {
        "w": np.ones((4, 1, 64), np.int8), "s": np.float32(0.1), "z": np.int8(0), "axes": np.array([1]),
        "lw": np.ones((1, 8, 4), np.float32), "lr": np.ones((1, 8, 2), np.float32),
    }  # fmt: skip
    path = save(
        tmp_path / "q.onnx",
        [
            ("Unsqueeze", ["signal", "axes"], "x", {}),
            ("DequantizeLinear", ["w", "s", "z"], "wf", {}),
            ("Conv", ["x", "wf"], "conv", {"strides": [64]}),
            ("Transpose", ["conv"], "rows", {"perm": [2, 0, 1]}),
            ("LSTM", ["rows", "lw", "lr"], "y", {"hidden_size": 2}),
        ],
        eight,
    )
    counted = operations.count(path, seconds=1.0)
    assert counted["macs"] == 250 * 4 * 64
    assert counted["uncounted"] == ["LSTM"]
    assert counted["parameters"] == 4 * 64 + 8 * 4 + 8 * 2  # scale and zero point are none


def test_operators_of_onnxruntime_are_counted(own):
    counted = operations.count(own, seconds=1.6)
    assert counted["macs"] == 6398 * 16 * 4 * 3 + 3199 * 16 * 5
    assert counted["parameters"] == 16 * 4 * 3 + 16 + 16 * 5
    assert counted["uncounted"] == []


def test_weights_that_are_expanded_at_load(tmp_path):
    """3 stored channels of int8 become 4 of float: 0.1 s are 25 frames of 64."""
    path = save(
        tmp_path / "compact.onnx",
        [
            ("Cast", ["w"], "wf", {"to": TensorProto.FLOAT}),
            ("Mul", ["wf", "s"], "ws", {}),
            ("Pad", ["ws", "pads"], "wp", {}),
            ("MatMul", ["left", "left"], "square", {}),  # at load, once
            ("Unsqueeze", ["signal", "axes"], "x", {}),
            ("Conv", ["x", "wp"], "c", {"strides": [64]}),
            ("MatMul", ["square", "c"], "y", {}),
        ],
        {
            "w": np.ones((3, 1, 64), np.int8), "s": np.ones((3, 1, 1), np.float32), "pads": np.array([0, 0, 0, 1, 0, 0]),
            "left": np.ones((4, 4), np.float32), "axes": np.array([1]),
        },
    )  # fmt: skip
    counted = operations.count(path, seconds=0.1)
    assert counted == {"parameters": 4 * 64 + 4 * 4, "macs": 25 * 4 * 64 + 25 * 4 * 4, "uncounted": []}
    model = onnx.load(path)
    helper.set_model_props(model, {"parameters": "192"})
    onnx.save(model, path)
    assert operations.count(path, seconds=0.1)["parameters"] == 192


def test_bodies_are_named(tmp_path):
    def branch(node):
        return helper.make_graph([node], "branch", [], [helper.make_empty_tensor_value_info("b")])

    path = save(
        tmp_path / "if.onnx",
        [
            ("ReduceMax", ["signal"], "m", {"keepdims": 0}),
            ("Greater", ["m", "zero"], "loud", {}),
            (
                "If",
                ["loud"],
                "y",
                {
                    "then_branch": branch(helper.make_node("Gemm", ["signal", "w"], ["b"], transB=1)),
                    "else_branch": branch(helper.make_node("Identity", ["signal"], ["b"])),
                },
            ),
        ],
        {"zero": np.float32(0), "w": np.ones((3, 16_000), np.float32)},
    )
    assert operations.count(path, seconds=1.0)["uncounted"] == ["Gemm in If"]


def test_what_cannot_be_counted(toy, tmp_path):
    (tmp_path / "torn.onnx").write_bytes(toy.read_bytes()[:100])
    with pytest.raises(W2SError, match="damaged"):
        operations.count(tmp_path / "torn.onnx")
    with pytest.raises(UsageError, match="no such file"):
        operations.count(tmp_path / "none.onnx")
