"""INT8 and half-precision versions of an exported ONNX file, and the layers that lose most by INT8.

INT8 is static and in ONNX Runtime's QDQ form: weights per channel in signed, activations per tensor in unsigned 8 bits, in the ranges of
`deploy/calibration.py`. The lower precision is for convolutions and matrix products and for what lies between them. The last layers of heads, the
decoding of boxes and NMS stay in float32, and so do layers that are named for it, with their inputs.
"""

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssld.stage2_detect.deploy.calibration import Observed

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_BETWEEN = ("Add", "Clip", "MaxPool", "Relu", "Resize")
_LAST = re.compile(r"\b(logits|objectness|deltas|boxes|offset)\.weight$")


def layers(model: Any) -> dict[str, str]:
    """Return the weight's name of each layer that may have a lower precision, by the name of its node, in the order of the graph.

    Args:
        model: onnx.ModelProto.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type in _LAYERS:
            own = [name for name in node.input[:2] if name in weights]
            if own and not _LAST.search(own[0]):
                found[node.name] = own[0]
    return found


def title(weight: str) -> str:
    """Name a layer by its weight as a user knows it."""
    return weight.removesuffix(".weight").removeprefix("model.")


def inner_nodes(model: Any, floats: Collection[str] = ()) -> list[str]:
    """List the nodes that may have a lower precision: `layers`, and additions and the like of nothing but their results.

    Args:
        floats: weights of layers to leave in float32; what lies between them and the layers before stays with them.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    kept = _kept(model, floats)
    chosen, made, names = layers(model), set[str](), []
    for node in model.graph.node:
        data = [name for name in _data(node) if name not in weights]
        if node.name in kept:
            continue
        if node.name in chosen or (node.op_type in _BETWEEN and data and made.issuperset(data)):
            names.append(node.name)
            made.update(node.output)
    return names


def tensors(model: Any) -> list[str]:
    """List the tensors that have codes in INT8: inputs and outputs of `inner_nodes`."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inner = set(inner_nodes(model))
    named = [name for node in model.graph.node if node.name in inner for name in (*_data(node), *node.output)]
    return [name for name in dict.fromkeys(named) if name not in weights]


def _data(node: Any) -> list[str]:
    """Inputs of a node without sizes and limits, which follow."""
    return [name for name in (node.input[:1] if node.op_type in ("Resize", "Clip") else node.input) if name]


def _kept(model: Any, floats: Collection[str]) -> set[str]:
    """Name the nodes of layers that stay in float32, and those between them and the layers before."""
    makers = {output: node for node in model.graph.node for output in node.output}
    kept = {node for node, weight in layers(model).items() if weight in floats}
    open_names = [name for node in model.graph.node if node.name in kept for name in node.input]
    while open_names:
        node = makers.get(open_names.pop())
        if node is not None and node.op_type in _BETWEEN and node.name not in kept:
            kept.add(node.name)
            open_names.extend(_data(node))
    return kept


def write_int8(
    source: Path,
    target: Path,
    ranges: Mapping[str, tuple[float, float]],
    *,
    floats: Collection[str] = (),
    reduce_range: bool = False,
) -> int:
    """Write the INT8 version of an ONNX file.

    Args:
        ranges: smallest and largest value of all `tensors`.
        floats: weights of layers that stay in float32, see `inner_nodes`; their inputs are not rounded either.
        reduce_range: weights have 7 bits.

    Returns:
        The number of layers in INT8.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    model = onnx.load(source)
    count = len(set(layers(model).values()) - set(floats))
    facts = list(model.metadata_props)
    data = {name: (np.array(low, np.float32), np.array(high, np.float32)) for name, (low, high) in ranges.items()}
    kept = _kept(model, floats)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantizer = QDQQuantizer(
            model,
            True,  # weights per channel
            reduce_range,
            QuantType.QInt8,
            QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, data),
            inner_nodes(model, floats),
            [],
            [*_LAYERS, *_BETWEEN],
            {},
        )
        quantizer.quantize_model()
    result = quantizer.model.model
    _read_floats(result, kept)
    described = {"precision": "int8"}
    if floats:
        described["float_layers"] = ", ".join(map(title, floats))
    _save(result, target, facts, described)
    return count


def _read_floats(model: Any, readers: Collection[str]) -> None:
    """Let nodes read values as they were before rounding, and drop the codes that nothing reads then."""
    makers = {output: node for node in model.graph.node for output in node.output}

    def before_rounding(name: str) -> str:
        back = makers.get(name)
        if back is None or back.op_type != "DequantizeLinear":
            return name
        code = makers.get(back.input[0])
        return code.input[0] if code is not None and code.op_type == "QuantizeLinear" else name

    for node in model.graph.node:
        if node.name in readers:
            node.input[:] = [before_rounding(name) for name in node.input]
    for op_type in ("DequantizeLinear", "QuantizeLinear"):
        used = {name for node in model.graph.node for name in node.input} | {one.name for one in model.graph.output}
        unused = [node for node in model.graph.node if node.op_type == op_type and not used.intersection(node.output)]
        for node in unused:
            model.graph.node.remove(node)


def write_half(source: Path, target: Path) -> int:
    """Write the half-precision version of an ONNX file; inputs and outputs are the same. Returns the number of layers in half precision."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(source)
    facts, count = list(model.metadata_props), len(set(layers(model).values()))
    inner = set(inner_nodes(model))
    outer = [node.name for node in model.graph.node if node.name not in inner]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        half = convert_float_to_float16(model, keep_io_types=True, node_block_list=outer)
    _save(half, target, facts, {"precision": "half"})
    return count


def losses(source: Path, int8: Path, observed: Mapping[str, Observed]) -> dict[str, float]:
    """Compute the noise that INT8 adds to each layer's result, as a share of its power: of the weights and of the input, worst first.

    The noise of a product is that of its factors, added, if they are independent.

    Args:
        int8: with all layers in INT8.
        observed: values of the inputs.

    Returns:
        Noise by the name of the layer's weight; the largest one of a layer that is used several times.
    """
    import onnx
    from onnx import numpy_helper

    model, quantized = onnx.load(source), onnx.load(int8)
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    scales = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    chosen = layers(model)
    noise: dict[str, float] = {}
    for node in model.graph.node:
        if node.name not in chosen:
            continue
        weight = chosen[node.name]
        name = next(name for name in node.input[:2] if name != weight)
        share = sum(
            _noise(array, scales[f"{factor}_scale"], scales[f"{factor}_zero_point"])
            for factor, array in ((weight, numpy_helper.to_array(values[weight])), (name, observed[name].values_V))
            if f"{factor}_scale" in scales  # pooling shares that of its input
        )
        noise[weight] = max(share, noise.get(weight, 0.0))
    return dict(sorted(noise.items(), key=lambda item: -item[1]))


def _noise(values: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> float:
    """Compute the power of the rounding error over that of the values; `scale` is one number, or one per output channel."""
    if scale.ndim:
        axis = next(axis for axis in range(values.ndim) if values.shape[axis] == len(scale))
        shape = [-1 if place == axis else 1 for place in range(values.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    limits = np.iinfo(zero.dtype)
    rounded = (np.clip(np.rint(values / scale) + zero, limits.min, limits.max) - zero) * scale
    return float(np.square(rounded - values).sum() / max(np.square(values).sum(), 1e-30))


def _save(model: Any, file: Path, facts: Sequence[Any], described: Mapping[str, str]) -> None:
    """Write a model with the metadata of its source, and more of its own."""
    import onnx

    del model.metadata_props[:]
    model.metadata_props.extend(facts)
    for key, value in described.items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, file)
