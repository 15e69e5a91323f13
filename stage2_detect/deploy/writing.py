"""Writing a detector as an ONNX file or a `torch.export` program, and running these files.

NMS, the pooling of RoIs and ReLU6 are custom operators while tracing, translated to ONNX's NonMaxSuppression (ai.onnx 11), RoiAlign (ai.onnx 16) and
Clip.

Shapes: P problems, Q classes, N boxes or RoIs, K of them on one level; see `deploy/graph.py`.
"""

import copy
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssld.shared.deploy.graph_files import Dynamic, read_program, require_onnx, session, write_onnx, write_program
from ssld.shared.deploy.hub import public
from ssld.shared.errors import UserError
from ssld.stage2_detect.config import ResizeConfig
from ssld.stage2_detect.data.padding import PAD_MULTIPLE, padded_side
from ssld.stage2_detect.deploy import graph
from ssld.stage2_detect.detector_file import LoadedDetector
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models.build import Detector

INPUTS = ("pixels", "sizes")
RUNTIME = "onnx_detector.py"
LEAST, _MOST = 5, 256
"""Multiples of 32 along a side of a free canvas: `torch.export` needs maps of more than one cell; the coarsest stride is 128."""
_EXAMPLE = (192, 224)
_KEPT = (
    "arch",
    "class_names",
    "category_ids",
    "mean",
    "std",
    "resize",
    "model",
    "licence",
    "metrics",
    "content_sha256",
)


def write(
    name: str, path: Path, loaded: LoadedDetector, canvas: tuple[int, int] | None, log: Callable[[str], None]
) -> tuple[int, int] | None:
    """Write one file and return its canvas: the given one, or None where height and width are free.

    A network that cannot be traced for free sizes gets the largest canvas of its recipe's evaluation. Raises UserError where that fails too.
    """

    def one(canvas: tuple[int, int] | None) -> None:
        example = (torch.zeros(2, 3, *(canvas or _EXAMPLE), dtype=torch.uint8), torch.tensor([canvas or _EXAMPLE] * 2))
        if name == "onnx":
            net = graph.DetectorGraph(loaded.fast, onnx_nms).eval()
            write_onnx(
                path, net, example, _dynamic(canvas), facts_of(loaded, canvas),
                inputs=INPUTS, outputs=net.output_names, translations=onnx_translations(),
            )  # fmt: skip
        else:
            net = graph.DetectorGraph(loaded.fast).eval()
            write_program(path, net, example, _dynamic(canvas), facts_of(loaded, canvas))

    try:
        one(canvas)
        return canvas
    except UserError as error:
        if canvas is not None:
            raise
        side = padded_side(loaded.resize.long_side)
        log(f"{error}; trying a canvas of {side} x {side} pixels")
    one((side, side))
    return side, side


def try_export(model: Detector, config: DetectorConfig, resize: ResizeConfig, log: Callable[[str], None]) -> None:
    """Export a detector as ONNX into a temporary folder and run it on an empty image; the detector itself is not changed.

    Raises UserError for a detector that cannot be exported.
    """
    try:
        _try_export(model, config, resize, log)
    except UserError as error:
        raise UserError(f"export_check: {error}") from None


def _try_export(model: Detector, config: DetectorConfig, resize: ResizeConfig, log: Callable[[str], None]) -> None:
    roi_heads = getattr(model, "roi_heads", None)
    if roi_heads is not None and roi_heads.nms.kind != "hard":
        raise UserError(graph.SOFT_NMS)
    log("export_check: tracing a copy of the detector and writing it as ONNX")
    started = time.monotonic()
    require_onnx()
    copied = copy.deepcopy(model).cpu().eval()
    loaded = LoadedDetector(copied, (), (), resize, {"model": config.model_dump(mode="json")})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "detector.onnx"
        high, wide = write("onnx", path, loaded, None, log) or _EXAMPLE
        pixels_BCHW = torch.zeros(1, 3, high, wide, dtype=torch.uint8)
        runner("onnx", path)(pixels_BCHW, torch.tensor([[high, wide]]))
    log(f"export_check: the detector can be exported ({time.monotonic() - started:.0f} s)")


@torch.library.custom_op("ssld::nms", mutates_args=())
def onnx_nms(boxes_PN4: Tensor, scores_PQN: Tensor, iou: float, threshold: float, most: int) -> Tensor:
    """`graph.keep_by_nms` as an operator that is not traced into."""
    return graph.keep_by_nms(boxes_PN4, scores_PQN, iou, threshold, most)


@onnx_nms.register_fake
def _(boxes_PN4: Tensor, scores_PQN: Tensor, iou: float, threshold: float, most: int) -> Tensor:
    return torch.empty_like(scores_PQN, dtype=torch.bool)


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translate `onnx_nms`, `pooling.onnx_pool_rois` and `graph.onnx_clip` to ONNX, for `write_onnx`."""
    from onnxscript import opset18

    op: Any = opset18  # its annotations do not allow plain numbers

    def non_max_suppression(boxes: Any, scores: Any, iou: float, threshold: float, most: int) -> Any:
        # ONNX has y first; NMS does not depend on the order of the axes.
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

    def pool_rois(maps: Any, rois: Any, level: Any, scales: Any, size: int, sampling_ratio: int, aligned: bool) -> Any:
        def axis(start: int, end: int) -> Any:
            return op.Slice(rois, op.Constant(value_ints=[start]), op.Constant(value_ints=[end]), one)

        def rows_of(number: int) -> Any:
            return op.Squeeze(op.NonZero(op.Equal(level, op.Constant(value_int=number))), zero)

        zero, one = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
        boxes_N4, image_N = axis(1, 5), op.Cast(op.Squeeze(axis(0, 1), one), to=7)  # 7: int64
        rows_K = [rows_of(number) for number in range(len(maps) + 1)]
        pooled_KCSS = [
            op.RoiAlign(
                feature,
                op.Gather(boxes_N4, row_K),
                op.Gather(image_N, row_K),
                coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
                output_height=size,
                output_width=size,
                sampling_ratio=sampling_ratio,
                spatial_scale=scale,
            )
            for feature, row_K, scale in zip(maps, rows_K, scales, strict=False)
        ]
        # Zeros for the RoIs of no level, which are the last ones; then everything in the order of the RoIs.
        shape = op.Concat(op.Shape(rows_K[-1]), op.Shape(pooled_KCSS[0], start=1), axis=0)
        pooled_NCSS = op.Concat(*pooled_KCSS, op.Expand(op.Constant(value_float=0.0), shape), axis=0)
        row_N = op.Concat(*rows_K, axis=0)
        count = op.Squeeze(op.Shape(row_N), zero)
        place_N = op.ScatterElements(row_N, row_N, op.Range(op.Constant(value_int=0), count, op.Constant(value_int=1)))
        return op.Gather(pooled_NCSS, place_N)

    def clip(values: Any, low: float, high: float) -> Any:
        return op.Clip(values, op.Constant(value_float=low), op.Constant(value_float=high))

    return {
        torch.ops.ssld.nms.default: non_max_suppression,
        torch.ops.ssld.pool_rois.default: pool_rois,
        torch.ops.ssld.clip.default: clip,
    }


def facts_of(loaded: LoadedDetector, canvas: tuple[int, int] | None) -> dict[str, Any]:
    """Build the metadata of a file."""
    size = (
        f"{canvas[0]}, {canvas[1]}"
        if canvas
        else f"height, width: multiples of {PAD_MULTIPLE} from {PAD_MULTIPLE * LEAST} on"
    )
    facts = {
        "kind": "detector",
        "pixels": f"uint8 RGB [batch, 3, {size}] in 0..255, padded at the bottom and the right; normalized inside",
        "pad_multiple": PAD_MULTIPLE,
        "least_side": PAD_MULTIPLE * LEAST,
        "sizes": "int64 [batch, 2]: height and width of each image inside the padding",
        "boxes": "float32 [batch, most, 4]: x1, y1, x2, y2 in pixels of the input; divide by (network size / original size)",
        "scores": "float32 [batch, most] in 0..1, falling",
        "labels": "int64 [batch, most]: indices in class_names, -1 in empty rows",
        "count": "int64 [batch]: number of rows with a detection",
    }
    if loaded.has_masks:
        facts["masks"] = "float32 [batch, most, side, side]: probability of the mask, stretched over the box"
        facts["mask_threshold"] = loaded.metadata["model"]["mask"]["threshold"]
    return facts | {key: public(loaded.metadata[key]) for key in _KEPT if loaded.metadata.get(key) is not None}


def write_runtime(folder: Path) -> Path:
    """Copy `onnx_detector.py`, which runs the ONNX file without torch and this project, into a folder."""
    target = folder / RUNTIME
    shutil.copyfile(Path(__file__).with_name(RUNTIME), target)
    return target


def require_openvino() -> None:
    """Raise UserError where OpenVINO is not installed."""
    try:
        import openvino  # noqa: F401
    except ImportError:
        raise UserError("openvino: is not installed; pip install -e '.[openvino]' in the clone") from None


def openvino_runner(path: Path) -> Callable[[Tensor, Tensor], Sequence[np.ndarray]]:
    """Return a function that runs an ONNX file by OpenVINO on the CPU, in the precision of the file, on torch's number of threads."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    try:
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"openvino {openvino.__version__} cannot run {path.name} ({why}); leave openvino out") from None

    def by_openvino(pixels_BCHW: Tensor, sizes_B2: Tensor) -> list[np.ndarray]:
        output = compiled({"pixels": pixels_BCHW.numpy(), "sizes": sizes_B2.numpy()})
        return [np.array(output[place]) for place in range(len(compiled.outputs))]

    return by_openvino


def runner(name: str, path: Path) -> Callable[[Tensor, Tensor], Sequence[np.ndarray]]:
    """Return a function that runs an exported file on the CPU, on torch's number of threads."""
    if name == "onnx":
        onnx = session(path, threads=torch.get_num_threads())

        def by_onnx(pixels_BCHW: Tensor, sizes_B2: Tensor) -> list[np.ndarray]:
            output: list[np.ndarray] = onnx.run(None, {"pixels": pixels_BCHW.numpy(), "sizes": sizes_B2.numpy()})
            return output

        return by_onnx
    program, _ = read_program(path)

    @torch.no_grad()
    def by_torch(pixels_BCHW: Tensor, sizes_B2: Tensor) -> list[np.ndarray]:
        return [part.numpy() for part in program(pixels_BCHW, sizes_B2)]

    return by_torch


def _dynamic(canvas: tuple[int, int] | None) -> Dynamic:
    batch = torch.export.Dim("batch")
    if canvas is not None:
        return ({0: batch}, {0: batch})
    rows, columns = (torch.export.Dim(side, min=LEAST, max=_MOST) for side in ("rows", "columns"))
    return ({0: batch, 2: PAD_MULTIPLE * rows, 3: PAD_MULTIPLE * columns}, {0: batch})
