"""INT8 and half precision of exported files: which layers, how exactly, and which of them lose most."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from ssld.shared.deploy.graph_files import session
from ssld.stage2_detect.deploy.precision import inner_nodes, layers, losses, write_half, write_int8

Batch = tuple[torch.Tensor, torch.Tensor]


def batch(number: int) -> Batch:
    draw = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=draw), torch.tensor([[32, 32]])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two convolutions with an addition, a last layer, and a product of its result with the sizes, as in the decoding of boxes."""
    draw = np.random.default_rng(0)
    weights = {
        "model.body.weight": draw.normal(0, 0.2, (8, 3, 3, 3)),
        "model.neck.weight": draw.normal(0, 0.2, (8, 8, 3, 3)) * 10.0 ** draw.uniform(-2, 0, (8, 1, 1, 1)),
        "model.head.logits.weight": draw.normal(0, 0.2, (2, 8, 1, 1)),
        "share": np.array(1 / 255),
    }
    pads: dict[str, Any] = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Cast", ["pixels"], ["values"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["values", "share"], ["scaled"], name="scale"),
        helper.make_node("Conv", ["scaled", "model.body.weight"], ["first"], name="body", **pads),
        helper.make_node("Relu", ["first"], ["positive"], name="relu"),
        helper.make_node("Conv", ["positive", "model.neck.weight"], ["second"], name="neck", **pads),
        helper.make_node("Add", ["positive", "second"], ["sum"], name="add"),
        helper.make_node("Conv", ["sum", "model.head.logits.weight"], ["logits"], name="last"),
        helper.make_node("ReduceMean", ["logits"], ["mean"], name="mean", keepdims=0),
        helper.make_node("Cast", ["sizes"], ["float_sizes"], name="cast_sizes", to=TensorProto.FLOAT),
        helper.make_node("Add", ["float_sizes", "mean"], ["boxes"], name="decode"),
    ]
    shapes: dict[str, Any] = {"pixels": (TensorProto.UINT8, [1, 3, 32, 32]), "sizes": (TensorProto.INT64, [1, 2])}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, *shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("logits", "boxes")],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model.metadata_props.add(key="class_names", value='["a"]')
    onnx.save(model, tmp_path / "a.onnx")
    return tmp_path / "a.onnx"


def logits(file: Path, one: Batch) -> np.ndarray:
    output: np.ndarray = session(file, threads=1).run(["logits"], {"pixels": one[0].numpy(), "sizes": one[1].numpy()})[
        0
    ]
    return output


def test_the_layers(source: Path) -> None:
    model = onnx.load(source)
    assert layers(model) == {"body": "model.body.weight", "neck": "model.neck.weight"}
    assert inner_nodes(model) == ["body", "relu", "neck", "add"]


def test_int8_is_per_channel_and_leaves_the_last_layer(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "int8.onnx"
    assert write_int8(source, target, [batch(number) for number in range(3)]) == 2
    model = onnx.load(target)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    floats = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(source).graph.initializer}
    for name in ("model.body.weight", "model.neck.weight"):
        codes, scale = values[f"{name}_quantized"], values[f"{name}_scale"]
        assert (codes.dtype, scale.shape) == (np.int8, (8,))
        error = codes * scale[:, None, None, None] - floats[name]
        assert (np.abs(error) <= 0.501 * scale[:, None, None, None]).all()
    np.testing.assert_array_equal(values["model.head.logits.weight"], floats["model.head.logits.weight"])
    assert {entry.key: entry.value for entry in model.metadata_props} == {"class_names": '["a"]', "precision": "int8"}
    expected, output = logits(source, batch(9)), logits(target, batch(9))
    relative = np.abs(output - expected).mean() / np.abs(expected).mean()
    assert 1e-5 < relative < 0.03


def test_half_precision(source: Path, tmp_path: Path) -> None:
    assert write_half(source, tmp_path / "half.onnx") == 2
    model = onnx.load(tmp_path / "half.onnx")
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert types["model.neck.weight"] == TensorProto.FLOAT16
    assert types["model.head.logits.weight"] == TensorProto.FLOAT
    assert {entry.key for entry in model.metadata_props} == {"class_names", "precision"}
    expected, output = logits(source, batch(9)), logits(tmp_path / "half.onnx", batch(9))
    assert output.dtype == np.float32
    relative = np.abs(output - expected).mean() / np.abs(expected).mean()
    assert 1e-7 < relative < 1e-3


def test_the_noise_of_each_layer(source: Path, tmp_path: Path) -> None:
    """Against the definition, with the scales of the file."""
    target = tmp_path / "int8.onnx"
    write_int8(source, target, [batch(0)])
    noise = losses(source, target, batch(0), threads=1)
    assert set(noise) == {"body", "neck"}
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(target).graph.initializer}
    pixels = batch(0)[0].numpy() / np.float32(255)
    scale, zero = float(values["scaled_scale"]), int(values["scaled_zero_point"])
    share = (
        sum((((round(v / scale) + zero - zero) * scale) - v) ** 2 for v in pixels.ravel().tolist()) / (pixels**2).sum()
    )
    kernel = numpy_helper.to_array(onnx.load(source).graph.initializer[0]).astype(np.float64)
    steps = values["model.body.weight_scale"][:, None, None, None]
    codes = values["model.body.weight_quantized"]
    share += ((codes * steps - kernel) ** 2).sum() / (kernel**2).sum()
    assert noise["body"] == pytest.approx(share, rel=0.02)
    assert not list(tmp_path.glob("*.inputs"))
    assert list(noise.values()) == sorted(noise.values(), reverse=True)
