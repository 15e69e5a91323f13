"""INT8 and half-precision versions of an exported ONNX file, and the layers that lose most by INT8.

INT8 is static and in ONNX Runtime's QDQ form: weights per channel in signed, activations per tensor in unsigned 8 bits, with the ranges that
they have on calibration images. The lower precision is for convolutions and matrix products and for what lies between them. The last layers of heads,
the decoding of boxes and NMS stay in float32.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ssld.shared.deploy.graph_files import session

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


def inner_nodes(model: Any) -> list[str]:
    """List the nodes that may have a lower precision: `layers`, and additions and the like of nothing but their results."""
    weights = {tensor.name for tensor in model.graph.initializer}
    chosen, made, names = layers(model), set[str](), []
    for node in model.graph.node:
        data = [name for name in node.input if name and name not in weights]
        if node.op_type in ("Resize", "Clip"):
            data = data[:1]  # sizes and limits follow
        if node.name in chosen or (node.op_type in _BETWEEN and data and made.issuperset(data)):
            names.append(node.name)
            made.update(node.output)
    return names


def write_int8(source: Path, target: Path, images: Sequence[tuple[Tensor, Tensor]]) -> int:
    """Write the INT8 version of an ONNX file.

    Args:
        images: pixels uint8 [B, 3, H, W] and sizes int64 [B, 2] to calibrate on.

    Returns:
        The number of layers in INT8.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[tuple[Tensor, Tensor]] = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"pixels": batch[0].numpy(), "sizes": batch[1].numpy()}

    model = onnx.load(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_static(
            source,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*_LAYERS, *_BETWEEN],
            nodes_to_quantize=inner_nodes(model),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
    _describe(target, model, "int8")
    return len(layers(model))


def write_half(source: Path, target: Path) -> int:
    """Write the half-precision version of an ONNX file; inputs and outputs are the same. Returns the number of layers in half precision."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(source)
    inner = set(inner_nodes(model))
    outer = [node.name for node in model.graph.node if node.name not in inner]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        half = convert_float_to_float16(model, keep_io_types=True, node_block_list=outer)
    onnx.save(half, target)
    _describe(target, onnx.load(source), "half")
    return len(layers(onnx.load(source)))


def losses(source: Path, int8: Path, batch: tuple[Tensor, Tensor], threads: int) -> dict[str, float]:
    """Compute the noise that INT8 adds to each layer's result, as a share of its power: of the weights and of the input on one batch, worst first.

    The noise of a product is that of its factors, added, if they are independent.
    """
    import onnx
    from onnx import numpy_helper

    model, quantized = onnx.load(source), onnx.load(int8)
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    scales = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    chosen = layers(model)
    inputs = {
        node.name: next(name for name in node.input[:2] if name != chosen[node.name])
        for node in model.graph.node
        if node.name in chosen
    }
    present = {output.name for output in model.graph.output}
    wanted = sorted(set(inputs.values()) - present)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    widened = int8.with_name(f"{int8.name}.inputs")
    try:
        onnx.save(model, widened)
        results = session(widened, threads=threads).run(wanted, {"pixels": batch[0].numpy(), "sizes": batch[1].numpy()})
    finally:
        widened.unlink(missing_ok=True)
    noise: dict[str, float] = {}
    activations = dict(zip(wanted, results, strict=True))
    for node, weight in chosen.items():
        share = 0.0
        for name, array in ((weight, numpy_helper.to_array(values[weight])), (inputs[node], activations[inputs[node]])):
            if f"{name}_scale" in scales:
                share += _noise(array, scales[f"{name}_scale"], scales[f"{name}_zero_point"])
        noise[weight.removesuffix(".weight").removeprefix("model.")] = share
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


def _describe(file: Path, source: Any, precision: str) -> None:
    """Give a file the metadata of its source, and its own precision."""
    import onnx

    model = onnx.load(file)
    del model.metadata_props[:]
    model.metadata_props.extend(source.metadata_props)
    model.metadata_props.add(key="precision", value=precision)
    onnx.save(model, file)
