"""INT8 and half precision of exported files: ranges, which layers, how exactly, which of them lose most, and which stay in float32."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from ssld.shared.deploy.graph_files import session
from ssld.stage2_detect.deploy.calibration import Observed, observe, range_of, ranges
from ssld.stage2_detect.deploy.precision import inner_nodes, layers, losses, tensors, write_half, write_int8

Batch = tuple[torch.Tensor, torch.Tensor]


def batch(number: int) -> Batch:
    draw = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=draw), torch.tensor([[32, 32]])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three convolutions with an addition, a last layer, and a sum of its result with the sizes, as in the decoding of boxes."""
    draw = np.random.default_rng(0)
    weights = {
        "model.body.weight": draw.normal(0, 0.2, (8, 3, 3, 3)),
        "model.neck.weight": draw.normal(0, 0.2, (8, 8, 3, 3)) * 10.0 ** draw.uniform(-2, 0, (8, 1, 1, 1)),
        "model.side.weight": draw.normal(0, 0.2, (8, 8, 1, 1)),
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
        helper.make_node("Conv", ["positive", "model.side.weight"], ["third"], name="side"),
        helper.make_node("Add", ["third", "second"], ["sum"], name="add"),
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


def observed_in(source: Path, count: int) -> dict[str, Observed]:
    return observe(source, tensors(onnx.load(source)), [batch(number) for number in range(count)], 1, print)


def write(source: Path, target: Path, floats: tuple[str, ...] = ()) -> int:
    return write_int8(source, target, ranges(observed_in(source, 3), "minmax"), floats=floats)


def logits(file: Path, one: Batch) -> np.ndarray:
    output: np.ndarray = session(file, threads=1).run(["logits"], {"pixels": one[0].numpy(), "sizes": one[1].numpy()})[
        0
    ]
    return output


def test_the_layers(source: Path) -> None:
    model = onnx.load(source)
    assert layers(model) == {name: f"model.{name}.weight" for name in ("body", "neck", "side")}
    assert inner_nodes(model) == ["body", "relu", "neck", "side", "add"]
    assert inner_nodes(model, ["model.neck.weight"]) == [
        "body",
        "side",
    ]  # the relu before it, and the addition of its result, too
    assert tensors(model) == ["scaled", "first", "positive", "second", "third", "sum"]


def test_int8_is_per_channel_and_leaves_the_last_layer(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "int8.onnx"
    assert write(source, target) == 3
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
    assert write_half(source, tmp_path / "half.onnx") == 3
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
    observed = observed_in(source, 1)
    write_int8(source, target, ranges(observed, "minmax"))
    noise = losses(source, target, observed)
    assert set(noise) == {f"model.{name}.weight" for name in ("body", "neck", "side")}
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
    assert noise["model.body.weight"] == pytest.approx(share, rel=0.02)
    assert not list(tmp_path.glob("*.observed"))
    assert list(noise.values()) == sorted(noise.values(), reverse=True)


def test_named_layers_and_their_inputs_stay_in_float(source: Path, tmp_path: Path) -> None:
    """Against the float network with the first layer's rounding alone, and that of the input of the one that stays in INT8."""
    target = tmp_path / "int8.onnx"
    assert write(source, target, ("model.neck.weight",)) == 2
    model, original = onnx.load(target), onnx.load(source)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    floats = {tensor.name: numpy_helper.to_array(tensor) for tensor in original.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    np.testing.assert_array_equal(values["model.neck.weight"], floats["model.neck.weight"])
    assert "model.neck.weight_quantized" not in values
    assert list(nodes["neck"].input) == ["positive", "model.neck.weight"]
    assert list(nodes["relu"].input) == ["first"] == list(nodes["body"].output)
    assert nodes["side"].input[0] == "positive_DequantizeLinear_Output"
    assert {entry.key: entry.value for entry in model.metadata_props}["float_layers"] == "neck"

    def rounded(codes: np.ndarray, name: str) -> np.ndarray:
        scale, zero = values[f"{name}_scale"], values[f"{name}_zero_point"].astype(np.float64)
        result: np.ndarray = (np.clip(np.rint(codes / scale) + zero, 0, 255) - zero) * scale
        return result

    def convolved(maps: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        pads = (kernel.shape[-1] - 1) // 2
        output: np.ndarray = torch.nn.functional.conv2d(
            torch.tensor(maps, dtype=torch.float64), torch.tensor(kernel, dtype=torch.float64), padding=pads
        ).numpy()
        return output

    def weight(name: str) -> np.ndarray:
        codes: np.ndarray = values[f"{name}_quantized"] * values[f"{name}_scale"].reshape(-1, 1, 1, 1)
        return codes

    scaled = rounded(batch(9)[0].numpy() / np.float32(255), "scaled")
    positive = convolved(scaled, weight("model.body.weight")).clip(min=0)
    third = rounded(convolved(rounded(positive, "positive"), weight("model.side.weight")), "third")
    total = third + convolved(positive, floats["model.neck.weight"])
    expected = convolved(total, floats["model.head.logits.weight"])
    error = np.abs(logits(target, batch(9)) - expected)
    step = float(values["third_scale"]) * np.abs(floats["model.head.logits.weight"]).sum(axis=1).max()
    assert np.median(error) < 1e-5  # a value between two codes may be rounded to either
    assert error.max() < step


def test_the_first_layer_in_float_leaves_the_input_as_it_is(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "int8.onnx"
    assert write(source, target, ("model.body.weight",)) == 2
    model = onnx.load(target)
    assert not {"scaled", "first"} & {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert {tensor.name for tensor in model.graph.initializer} >= {"model.body.weight", "model.neck.weight_quantized"}


def test_what_is_observed(source: Path) -> None:
    observed = observed_in(source, 3)["scaled"]
    expected = np.concatenate([batch(number)[0].numpy() for number in range(3)]) / np.float32(255)
    np.testing.assert_allclose(np.sort(observed.values_V), np.sort(expected.ravel()))
    assert (observed.lowest, observed.highest) == (expected.min(), expected.max())
    many = Observed()
    values = np.random.default_rng(0).normal(size=(2, 3, 100, 100)).astype(np.float32)
    many.add(values, np.random.default_rng(0), 500)
    assert len(many.values_V) == 500
    assert np.isin(many.values_V, values).all()
    assert (many.lowest, many.highest) == (values.min(), values.max())


def test_ranges() -> None:
    """Percentiles by NumPy, the least squares by a search, and both without the far values that minmax keeps."""
    values = np.random.default_rng(0).laplace(size=20_000).astype(np.float32)
    values[0] = 40.0
    observed = Observed()
    observed.add(values, np.random.default_rng(0), len(values))
    assert range_of(observed, "minmax") == (values.min(), 40)
    assert range_of(observed, "percentile") == pytest.approx(tuple(np.quantile(values, (1e-4, 1 - 1e-4))))

    def error(low: float, high: float) -> float:
        step = (high - low) / 255
        zero = round(-low / step)
        codes = np.clip(np.round(values.astype(np.float64) / step) + zero, 0, 255)
        return float((((codes - zero) * step - values) ** 2).mean())

    best = range_of(observed, "mse")
    assert best[1] < 40
    tried = [error(factor * values.min(), factor * 40) for factor in np.linspace(0.3, 1, 36)]
    assert error(*best) == pytest.approx(min(tried), rel=1e-3)
    positive, constant, nothing = Observed(), Observed(), Observed()
    positive.add(np.linspace(2, 3, 100, dtype=np.float32), np.random.default_rng(0), 100)
    constant.add(np.zeros(5, np.float32), np.random.default_rng(0), 100)
    for method in ("mse", "percentile", "minmax"):
        assert range_of(positive, method)[0] == 0  # a range contains 0
        assert range_of(constant, method) == range_of(nothing, method) == (0, 1)
