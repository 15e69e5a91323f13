"""Detections and COCO AP of a detector on an evaluation set, on any number of ranks; comparison of the scores with expected ones."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch

from ssld.shared.distributed.ranks import gather_on_main_rank, on_main_rank, rank, world_size
from ssld.shared.training.progress import Clock
from ssld.shared.wording import duration
from ssld.stage2_detect.config import ExpectedConfig
from ssld.stage2_detect.data.coco import CocoData, CocoImage, Id
from ssld.stage2_detect.data.loaders import ImageLoader, eval_loader
from ssld.stage2_detect.data.sizing import Sizing
from ssld.stage2_detect.evaluation.coco_ap import coco_ap
from ssld.stage2_detect.evaluation.tta import detect_views
from ssld.stage2_detect.models.batch import Detections
from ssld.stage2_detect.models.build import Detector
from ssld.stage2_detect.models.inference import for_inference

Item = TypeVar("Item")


@torch.no_grad()
def detections(
    fast: Detector, loader: ImageLoader[Item], *, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Item, Detections]]:
    """Yield each item of a loader with its detections, in the loader's order; `fast` is a detector of `for_inference`."""
    run: Callable[[Any], list[Detections]] = fast
    if tta := loader.sizing.tta:
        run = partial(detect_views, fast, flip=tta.flip, nms_iou=tta.nms_iou, most=fast.detections_per_image)
    for images, items in loader:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            batch = run(images.to(device, non_blocking=True))
        yield from zip(items, batch, strict=True)


def detect(
    model: Detector,
    loader: ImageLoader[CocoImage],
    *,
    device: torch.device,
    dtype: torch.dtype,
    log: Callable[[str], None] | None = None,
) -> dict[Id, Detections]:
    """Detect in the images of a loader: detections by image id, on the main rank those of all ranks, on the others none.

    Args:
        model: left in evaluation mode.
        log: receives a progress line now and then, and one where BatchNorm cannot be folded.
    """
    local = []
    clock = Clock(loader.images)
    for record, one in detections(for_inference(model.eval(), log), loader, device=device, dtype=dtype):
        local.append((record.image_id, one))
        clock.add()
        if log and clock.due():
            log(f"{clock.done} of {clock.total} images done, {duration(clock.left)} to go")
    return dict(gather_on_main_rank(local))


def score(
    model: Detector,
    data: CocoData,
    sizing: Sizing,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
    log: Callable[[str], None] | None = None,
) -> tuple[dict[str, Any], dict[Id, Detections]]:
    """Evaluate a detector on `data` by COCO AP.

    Args:
        data: read with `training=False`.
        backend: see `coco_ap.choose_backend`.
        log: receives a progress line now and then, and one where BatchNorm cannot be folded.

    Returns:
        Metrics, equal on every rank (those of masks end in `_segm`; present if detector and `data` have masks), and detections by image
        id, on the main rank.
    """
    loader = eval_loader(data, sizing, batch_size=batch_size, workers=workers, rank=rank(), ranks=world_size())
    by_image = detect(model, loader, device=device, dtype=dtype, log=log)

    def measure() -> dict[str, Any]:
        metrics = coco_ap(data, by_image, backend)
        has_masks = data.images[0].segmentations is not None
        if has_masks and any(one.masks is not None for one in by_image.values()):
            segm = coco_ap(data, by_image, backend, masks=True)
            metrics |= {f"{name}_segm": value for name, value in segm.items()}
        return metrics

    return on_main_rank(measure, "COCO scores"), by_image


def describe(metrics: dict[str, Any]) -> str:
    """Format metrics as one line for the log."""
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AP_segm", "AP50_segm", "AP75_segm")
    known = [f"{name} {100 * metrics[name]:.2f}" for name in names if metrics.get(name) is not None]
    return ", ".join(known) or "no score: the evaluation images have no objects"


def compare_expected(
    expected: ExpectedConfig, metrics: Mapping[str, Any], images: int, precision: str
) -> tuple[bool | None, str]:
    """Compare metrics with expected scores.

    Args:
        expected: scores in percent.
        metrics: in 0..1.
        images: number of evaluation images.
        precision: precision of the evaluation, named in the line: published scores are mostly of fp32.

    Returns:
        Whether every expected score was reached within the tolerance (None where they cannot be compared), and a line for the log.
    """
    scores = {name: value for name in ("AP", "AP_segm") if (value := getattr(expected, name)) is not None}
    if not images:
        return None, "expected: not compared: there are no evaluation images"
    if expected.images is not None and images != expected.images:
        return None, f"expected: not compared: it is for {expected.images} evaluation images, these are {images}"
    missing = [name for name in scores if metrics.get(name) is None]
    if missing:
        return None, f"expected: not compared: {missing[0]} was not measured"
    met = all(100 * metrics[name] >= value - expected.tolerance for name, value in scores.items())
    text = ", ".join(
        f"{name} {100 * metrics[name]:.2f} in {precision} (expected {value:g})" for name, value in scores.items()
    )
    return met, f"expected: {'met' if met else 'NOT met'}: {text}, tolerance {expected.tolerance:g}"
