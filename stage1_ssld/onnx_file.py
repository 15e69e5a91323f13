"""A classifier as an ONNX file, and its answers in ONNX Runtime against those in torch.

Pixels go in as they come out of a decoder, uint8 [batch, 3, height, width]: the normalisation is inside. Only the batch is dynamic: timm's networks
resolve what depends on the image size while they are traced. Deliberately absent: quantisation, half precision.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.backbones import Classifier
from shared.errors import UserError

INPUT, OUTPUT = "pixels", "logits"
_LARGEST = 2**31  # bytes of a protobuf message


def require_onnx() -> None:
    """Raises UserError where a package that the export needs is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"export: needs onnx, onnxscript and onnxruntime ({error.name} is missing); pip install 'ssld[export]'"
        ) from None


def write_onnx(path: Path, classifier: Classifier, size: tuple[int, int], facts: dict[str, Any]) -> None:
    """Write a classifier in evaluation mode for images of `size` (height, width); `facts` become metadata, JSON where they are not text.

    Raises UserError for a network that cannot be traced, or too large for one file.
    """
    import onnx

    weights = sum(parameter.numel() * parameter.element_size() for parameter in classifier.parameters())
    if weights >= _LARGEST:
        raise UserError(f"export: {weights / 1e9:.1f} GB of weights; one ONNX file holds 2 GB")
    # A batch of one would be taken for a constant.
    example = torch.zeros(2, 3, *size, dtype=torch.uint8)
    try:
        program = torch.onnx.export(
            classifier,
            (example,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"export: this network cannot be traced ({why})") from None
    assert program is not None
    model = program.model_proto
    _forget_sources(model)
    for key, value in facts.items():
        model.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def _forget_sources(model: Any) -> None:
    """Drop what the exporter notes on every node: the files, lines and folders of the machine that it ran on."""
    for graph in (model.graph, *model.functions):
        for entry in (*graph.node, *getattr(graph, "input", ()), *getattr(graph, "output", ()), *graph.value_info):
            if hasattr(entry, "metadata_props"):
                del entry.metadata_props[:]
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]


@torch.no_grad()
def compare(path: Path, classifier: Classifier, batches: Iterable[Tensor], *, threads: int) -> dict[str, float]:
    """Answers of an ONNX file and of the classifier it was written from, on the CPU, to batches of uint8 [B,3,H,W].

    The first image of every batch is asked for alone once more, so that two batch sizes are tried.

    Returns:
        `images`; `largest_difference` of two logits; `largest_logit` of torch's, without its sign; `relative_difference`, the one by the other;
        `top1_agreement`, the share of images with the same first class.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    images, same, difference, largest = 0, 0, 0.0, 0.0
    for pixels in batches:
        ours = classifier(pixels).double()
        theirs = torch.from_numpy(session.run([OUTPUT], {INPUT: pixels.numpy()})[0]).double()
        alone = torch.from_numpy(session.run([OUTPUT], {INPUT: pixels[:1].numpy()})[0]).double()
        images += len(pixels)
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        # A NaN would lose every comparison: count it as infinitely far.
        gaps = torch.cat([(ours - theirs).abs().flatten(), (ours[:1] - alone).abs().flatten()])
        difference = max(difference, gaps.nan_to_num(nan=float("inf")).max().item())
        largest = max(largest, ours.abs().max().item())
    return {
        "images": images,
        "largest_difference": difference,
        "largest_logit": largest,
        "relative_difference": difference / largest if largest else difference,
        "top1_agreement": same / images if images else 0.0,
    }
