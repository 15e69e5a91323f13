"""Suppression of overlapping boxes as one operator, which an ONNX file says as NonMaxSuppression (ai.onnx 11).

Shapes: P problems, Q classes, N boxes; see `models/graph.py`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssld.stage2_detect.deploy import graph


@torch.library.custom_op("ssld::suppress", mutates_args=())
def suppress(boxes_PN4: Tensor, scores_PQN: Tensor, iou: float, threshold: float, most: int) -> Tensor:
    """`graph.suppress`, which tracing does not look into."""
    return graph.suppress(boxes_PN4, scores_PQN, iou, threshold, most)


@suppress.register_fake
def _(boxes_PN4: Tensor, scores_PQN: Tensor, iou: float, threshold: float, most: int) -> Tensor:
    return torch.empty_like(scores_PQN, dtype=torch.bool)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `write_onnx`: what the operator is in ONNX."""
    from onnxscript import opset18

    op: Any = opset18  # its annotations leave plain numbers out

    def non_max_suppression(boxes: Any, scores: Any, iou: float, threshold: float, most: int) -> Any:
        # Corners in either order will do, so it does not matter that ONNX has y first.
        chosen_S3 = op.NonMaxSuppression(
            boxes,
            scores,
            op.Constant(value_ints=[most]),
            op.Constant(value_floats=[iou]),
            op.Constant(value_floats=[threshold]),
        )
        nothing = op.Expand(op.Constant(value_ints=[0]), op.Shape(scores))
        ones = op.Expand(op.Constant(value_ints=[1]), op.Slice(op.Shape(chosen_S3), [0], [1]))
        return op.Cast(op.ScatterND(nothing, chosen_S3, ones), to=9)  # 9: bool

    return {torch.ops.ssld.suppress.default: non_max_suppression}
