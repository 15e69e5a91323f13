"""Networks as files that run without this project: ONNX for ONNX Runtime, and `torch.export` programs (.pt2); measuring their speed.

Both are traced from a module with tensors in and tensors out, and have metadata: in ONNX's own, and in `metadata.json` inside a .pt2 file. They do
not name files or folders of the machine that wrote them. Quantization and half precision are in `stage2_detect/deploy/precision.py`.
"""

import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from ssld.shared.errors import UserError
from ssld.shared.machine import without_collector

Dynamic = tuple[dict[int, Any], ...]
"""`torch.export.Dim` by axis, for each input."""
_LARGEST = 2**31  # bytes of a protobuf message
_METADATA = "metadata.json"
_OPSET = 20  # 19 is the first with deformable convolution


def require_onnx() -> None:
    """Raise UserError where a package that the export needs is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"export: needs onnx, onnxscript and onnxruntime ({error.name} is missing); pip install -e '.[export]' in the clone"
        ) from None


def write_onnx(
    path: Path,
    net: nn.Module,
    example: tuple[Tensor, ...],
    dynamic: Dynamic,
    facts: dict[str, Any],
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    translations: dict[Callable[..., Any], Callable[..., Any]] | None = None,
) -> None:
    """Write a network in evaluation mode as one ONNX file.

    Args:
        example: inputs; an axis of size 1 would become a constant.
        facts: metadata, written as JSON where they are not text.
        translations: of custom operators, see `torch.onnx.export`.

    Raises UserError for a network that cannot be traced, or too large for one file.
    """
    import onnx

    weights = sum(parameter.numel() * parameter.element_size() for parameter in net.parameters())
    if weights >= _LARGEST:
        raise UserError(
            f"export: {weights / 1e9:.1f} GB of weights; ONNX files are limited to 2 GB; use --formats torch"
        )
    try:
        with torch.no_grad(), without_collector(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter warns of its own open points
            program = torch.onnx.export(
                net,
                example,
                dynamo=True,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=dynamic,
                custom_translation_table=translations,
                opset_version=_OPSET,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UserError(f"export: this network cannot be traced ({_why(error)})") from None
    assert program is not None
    model = program.model_proto
    _forget_sources(model)
    _merge_padding(model)
    for key, value in facts.items():
        model.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def write_program(
    path: Path, net: nn.Module, example: tuple[Tensor, ...], dynamic: Dynamic, facts: dict[str, Any]
) -> None:
    """Write a network in evaluation mode as a `torch.export` program; arguments as of `write_onnx`.

    Raises UserError for a network that cannot be traced.
    """
    try:
        with torch.no_grad(), without_collector(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(net, example, dynamic_shapes=dynamic, strict=False)
            for module in program.graph_module.modules():
                for node in getattr(getattr(module, "graph", None), "nodes", ()):
                    for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
                        node.meta.pop(key, None)
            with path.open("wb") as file:
                torch.export.save(program, file, extra_files={_METADATA: json.dumps(facts)})
    except Exception as error:  # the tracer raises many types, all of them about the network
        if isinstance(error, OSError):
            raise
        raise UserError(f"export: this network cannot be traced ({_why(error)})") from None


def read_program(path: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """Read a `torch.export` program: a module that runs it on `device`, and its facts.

    Programs are traced on the CPU, and a traced graph names the device of each tensor that it makes, such as anchors. So moving the module is
    not enough: the graph is rewritten.
    """
    files = {_METADATA: ""}
    with warnings.catch_warnings(), path.open("rb") as file:  # open, as its name may end in something else
        warnings.simplefilter("ignore")
        program = torch.export.load(file, extra_files=files)
        if torch.device(device).type != "cpu":
            program = move_to_device_pass(program, device)
        module: nn.Module = program.module()
    return module, json.loads(files[_METADATA])


def session(path: Path, *, threads: int) -> Any:
    """Open an `onnxruntime.InferenceSession` on the CPU. Raises UserError for a file that this ONNX Runtime cannot run."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no public base class
        raise UserError(
            f"export: onnxruntime {onnxruntime.__version__} cannot run this network ({_why(error)}); a newer one may"
        ) from None


def interleaved(calls: Mapping[str, Callable[[], object]], *, rounds: int = 10) -> dict[str, float]:
    """Measure median seconds of each call. Calls take turns, so that other load on the machine affects all of them; a first round is discarded."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def speed_lines(latency: Mapping[str, float], throughput: Mapping[str, float], batch: int) -> list[str]:
    """Format a table of milliseconds for one image, images per second in batches of `batch`, and the latency's ratio to torch's, from medians in
    seconds."""
    width = max(map(len, latency))
    return [f"{'':<{width}}  latency, batch 1  throughput, batch {batch}  latency / torch's"] + [
        f"{name:<{width}}  {1000 * latency[name]:>13.1f} ms  {batch / throughput[name]:>13.1f} images/s  "
        f"{latency[name] / latency['torch']:>17.2f}"
        for name in latency
    ]


def _why(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _forget_sources(model: Any) -> None:
    """Drop the files, lines and folders of this machine that the exporter notes on every node."""
    for graph in (model.graph, *model.functions):
        for entry in (*graph.node, *getattr(graph, "input", ()), *getattr(graph, "output", ()), *graph.value_info):
            if hasattr(entry, "metadata_props"):
                del entry.metadata_props[:]
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]


def _merge_padding(model: Any) -> None:
    """Let convolutions pad by zeros themselves where a node before them does. Runtimes merge the two in float32 graphs alone: in an INT8 file the
    padding would be a float32 operation between two roundings.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    outputs = {output.name for output in graph.output}
    for pad in [node for node in graph.node if node.op_type == "Pad"]:
        sides, *values = [constants.get(name) for name in pad.input[1:] if name]
        readers = [node for node in graph.node if pad.output[0] in node.input]
        of_zeros = not pad.attribute or helper.get_attribute_value(pad.attribute[0]) == b"constant"
        of_zeros = of_zeros and len(values) < 2 and all(value is not None and not value.any() for value in values)
        if sides is None or not of_zeros or outputs & {*pad.output} or not all(map(_pads_by_number, readers)):
            continue
        before, after = sides.reshape(2, -1)
        if min(sides) < 0 or before[:2].any() or after[:2].any():  # of the batch or of the channels
            continue
        for node in readers:
            given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
            more = np.concatenate((before[2:], after[2:]))
            given["pads"] = (np.array(given.get("pads", 0 * more)) + more).tolist()
            del node.attribute[:]
            node.attribute.extend(helper.make_attribute(key, value) for key, value in given.items())
            node.input[0] = pad.input[0]
        graph.node.remove(pad)


def _pads_by_number(node: Any) -> bool:
    from onnx import helper

    named = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    return node.op_type == "Conv" and named.get("auto_pad", b"NOTSET") == b"NOTSET"
