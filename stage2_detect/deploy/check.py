"""Comparison of a detector's exported files with the detector itself: detections and speed.

Detections are compared within classes, each with the one of the nearest box; one without any within `_FAR` pixels has no counterpart.

Shapes: B images of a batch, N and M detections of an image, H height, W width.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssld.shared.deploy.graph_files import interleaved, speed_lines
from ssld.shared.errors import UserError
from ssld.shared.files import IMAGE_SUFFIXES, spread
from ssld.shared.images import UnreadableImage, decode_image
from ssld.stage2_detect.config import ResizeConfig
from ssld.stage2_detect.data.image_files import find_images
from ssld.stage2_detect.data.padding import PAD_MULTIPLE, pad_images
from ssld.stage2_detect.data.views import View, fit_view, view_image
from ssld.stage2_detect.deploy.graph import SOFT_NMS, DetectorGraph
from ssld.stage2_detect.deploy.writing import LEAST
from ssld.stage2_detect.detector_file import LoadedDetector
from ssld.stage2_detect.export_config import ExportDetectorConfig
from ssld.stage2_detect.models.batch import ImageBatch
from ssld.stage2_detect.models.build import Detector

Batch = tuple[Tensor, Tensor]
"""pixels uint8 [B, 3, H, W] and true sizes int64 [B, 2]"""
Run = Callable[[Tensor, Tensor], Sequence[np.ndarray]]
"""Outputs of an exported file: boxes, scores, labels, count and perhaps masks."""
_FAR = 2.0  # pixels


def find_photos(config: ExportDetectorConfig, without: Collection[Path] = ()) -> tuple[Path, list[str]]:
    """Find the images of `config.images`: their folder, and their names in it. Raises UserError where there are none.

    Args:
        without: resolved paths of images to leave out.
    """
    assert config.images is not None
    folder, names = find_images(config.images)
    names = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    left = [name for name in names if (Path(folder) / name).resolve() not in without]
    if names and not left:
        raise UserError(
            f"images: {config.images} has no image that is not in val_annotations; the ranges of INT8 need others, some of those for training"
        )
    return Path(folder), left


def images_of(
    config: ExportDetectorConfig,
    log: Callable[[str], None],
    count: int | None = None,
    without: Collection[Path] = (),
) -> list[Tensor]:
    """Decode evenly chosen images, `check_images` of them or `count`, or draw noise: uint8 [3, H, W] each.

    Raises UserError where there are none, or none can be read.
    """
    count = count or config.check_images
    if config.images is None:
        return _noise(count)
    folder, names = find_photos(config, without)
    chosen = [names[place] for place in spread(len(names), count)]
    images = []
    for name in chosen:
        try:
            images.append(decode_image(folder / name))
        except UnreadableImage as error:
            log(f"{error}; left out")
    if not images:
        raise UserError(f"{config.images}: none of the {len(chosen)} images tried can be read")
    return images


def batches_of(
    images: Sequence[Tensor], resize: ResizeConfig, canvas: tuple[int, int] | None, batch_size: int
) -> list[Batch]:
    """Resize images as the recipe does, or to fit into the canvas, and pad them to batches."""
    resized = [fitted(image_CHW, resize, canvas)[0] for image_CHW in images]
    return [padded(resized[i : i + batch_size], canvas) for i in range(0, len(resized), batch_size)]


def _noise(count: int) -> list[Tensor]:
    """Draw images of colored rectangles, in which a detector has more detections than in noise per pixel."""
    draw = np.random.default_rng(0)
    images = []
    for _ in range(count):
        pixels = np.full((240, 320, 3), draw.integers(0, 244, 3), np.uint8)
        for _ in range(12):
            y, x, height, width = draw.integers(0, (200, 280, 120, 160))
            pixels[y : y + 8 + height, x : x + 8 + width] = draw.integers(0, 244, 3)
        pixels += draw.integers(0, 12, pixels.shape, np.uint8)
        images.append(torch.from_numpy(pixels).permute(2, 0, 1))
    return images


def fitted(image_CHW: Tensor, resize: ResizeConfig, canvas: tuple[int, int] | None) -> tuple[Tensor, float]:
    """Resize an image as the recipe does, or to fit into the canvas; returns it with its scale."""
    height, width = image_CHW.shape[1:]
    view = fit_view(height, width, short_side=resize.short_side, long_side=resize.long_side)
    if canvas is not None and (view.height > canvas[0] or view.width > canvas[1]):
        scale = min(canvas[0] / height, canvas[1] / width)
        high, wide = (max(1, int(scale * side + 0.5)) for side in (height, width))
        view = View(scale, high, wide)
    return view_image(image_CHW, view, resize.interpolation, resize.kernel), view.scale


def padded(images: Sequence[Tensor], canvas: tuple[int, int] | None) -> Batch:
    """Pad resized images to one batch for an exported file."""
    batch = pad_images(images, [1.0] * len(images), least_side=LEAST * PAD_MULTIPLE, canvas=canvas)
    return batch.pixels_BCHW, batch.sizes_B2


@torch.no_grad()
def compare(run: Run, model: Detector, batches: Sequence[Batch]) -> dict[str, float]:
    """Compare the outputs of an exported file with those of the detector it was written from.

    The first image of every batch runs alone once more, so that two batch sizes are compared.

    Returns:
        `images`: number of images; `detections`, `detections_by_file`: number of detections by torch and by the file; `missing`: share of both
        without counterpart; largest differences among pairs: `box_difference` (pixels of the input), `score_difference` and `mask_difference` (of a
        probability; 0 without masks).
    """
    result = dict.fromkeys(("images", "detections", "detections_by_file", "alone"), 0)
    largest = dict.fromkeys(("box_difference", "score_difference", "mask_difference"), 0.0)
    for pixels_BCHW, sizes_B2 in batches:
        by_torch = reference(model, pixels_BCHW, sizes_B2)
        outputs = [run(pixels_BCHW, sizes_B2), run(pixels_BCHW[:1], sizes_B2[:1])]
        for output, expected in ((outputs[0], by_torch), (outputs[1], by_torch[:1])):
            for of_torch, of_file in zip(expected, _images(output), strict=True):
                result["detections"] += len(of_torch[1])
                result["detections_by_file"] += len(of_file[1])
                result["alone"] += _differences(of_torch, of_file, largest)
        result["images"] += len(sizes_B2)
    both = result["detections"] + result["detections_by_file"]
    return {
        **{key: result[key] for key in ("images", "detections", "detections_by_file")},
        "missing": result["alone"] / both if both else 0.0,
        **largest,
    }


Arrays = tuple[np.ndarray, ...]
"""boxes [N, 4], scores [N], labels [N] and perhaps masks of one image"""


def reference(model: Detector, pixels_BCHW: Tensor, sizes_B2: Tensor) -> list[Arrays]:
    """Run the detector itself by its `forward`; probabilities of masks come from its mask head, from the detected boxes."""
    images = ImageBatch(pixels_BCHW, sizes_B2, torch.ones(len(sizes_B2)))
    detections = model(images)
    rows = [(one.boxes_N4.numpy(), one.scores_N.numpy(), one.labels_N.numpy()) for one in detections]
    head = getattr(model, "mask_head", None)
    if head is None:
        return list(rows)
    maps_BNSS = head.predict(model.features(images), detections)
    return [(*row, maps_NSS[: len(row[1])].numpy()) for row, maps_NSS in zip(rows, maps_BNSS, strict=True)]


def _images(output: Sequence[np.ndarray]) -> list[Arrays]:
    counts = output[3]
    parts = [part for place, part in enumerate(output) if place != 3]
    return [tuple(part[row, :count] for part in parts) for row, count in enumerate(counts)]


def _differences(expected: Arrays, output: Arrays, largest: dict[str, float]) -> int:
    """Update the largest differences by those of one image; returns the number of detections without counterpart."""
    # NaN would lose every comparison: it counts as infinitely far.
    clean = [np.nan_to_num(part.astype(np.float64), nan=np.inf) for part in output]
    apart_NM = np.abs(expected[0][:, None].astype(np.float64) - clean[0][None]).max(axis=2, initial=0)
    other_NM = expected[2][:, None] != output[2][None]
    apart_NM[other_NM] = np.inf
    free = np.ones(len(clean[0]), dtype=bool)
    alone = 0
    for n, row_M in enumerate(apart_NM):
        # Among boxes as near as rounding, the one with the nearest score.
        score_M = np.abs(clean[1] - expected[1][n])
        near_M = free & (row_M < _FAR)
        if not near_M.any():
            alone += 1
            continue
        m = int(np.where(near_M, row_M / _FAR + score_M, np.inf).argmin())
        free[m] = False
        pairs = {"box_difference": row_M[m], "score_difference": score_M[m]}
        if len(expected) > 3:
            pairs["mask_difference"] = np.abs(expected[3][n] - clean[3][m]).max()
        for key, value in pairs.items():
            largest[key] = max(largest[key], float(value))
    return alone + int(free.sum())


def check_outputs(
    run: Run,
    model: Detector,
    batches: Sequence[Batch],
    config: ExportDetectorConfig,
    file: str,
    log: Callable[[str], None],
) -> dict[str, float]:
    """Run `compare` and log its result. Raises UserError for differences above the tolerances of `config`."""
    result = compare(run, model, batches)
    what = f"{result['images']:g} {'images' if config.images else 'images of drawn rectangles'}"
    log(
        f"{file} against torch on {what}: {result['detections_by_file']:g} detections, {result['detections']:g} by torch, "
        f"{100 * result['missing']:.2f} % without counterpart; boxes differ by at most {result['box_difference']:.2e} px, "
        f"scores by {result['score_difference']:.1e}"
        + (f", masks by {result['mask_difference']:.1e}" if len(run(*batches[0])) > 4 else "")
        + "; counterparts have the same label, and the first image of each batch counts twice, since it runs alone too"
    )
    if not result["detections"]:
        log("no detections, so this check proves little; give --images with objects that the detector knows")
    limits = {
        "box_difference": config.box_tolerance,
        "score_difference": config.score_tolerance,
        "mask_difference": config.score_tolerance,
        "missing": config.missing_tolerance,
    }
    for key, limit in limits.items():
        if not result[key] <= limit:
            setting = {"missing": "missing_tolerance", "box_difference": "box_tolerance"}.get(key, "score_tolerance")
            raise UserError(
                f"{config.model}: {file} and torch differ: {key.replace('_', ' ')} {result[key]:.2g}, {setting} is {limit:g}; "
                "raise the tolerance if this difference is acceptable"
            )
    return result


@torch.no_grad()
def measure_speeds(
    runs: Mapping[str, Run], loaded: LoadedDetector, batches: Sequence[Batch], log: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Measure median seconds of the detector in torch and of its files, by name, for one image and for the first batch of the check."""
    pixels_BCHW, sizes_B2 = batches[0]
    batch = len(sizes_B2)

    def calls(count: int) -> dict[str, Callable[[], object]]:
        some = pixels_BCHW[:count], sizes_B2[:count]
        images = ImageBatch(*some, torch.ones(count))
        return {"torch": lambda: loaded.fast(images)} | {name: lambda run=run: run(*some) for name, run in runs.items()}

    latency, throughput = interleaved(calls(1)), interleaved(calls(batch))
    H, W = pixels_BCHW.shape[2:]
    log(f"speed on this CPU, {torch.get_num_threads()} threads, {H} x {W} pixels:")
    for line in speed_lines(latency, throughput, batch):
        log(line)
    return {"latency": latency, "throughput": throughput}


def graph_of(model: Detector) -> DetectorGraph:
    """Build the graph to export. Raises UserError for a detector with soft NMS."""
    try:
        return DetectorGraph(model).eval()
    except ValueError:
        raise UserError(SOFT_NMS) from None
