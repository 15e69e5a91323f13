"""Run a detector over an evaluation set and score it by COCO AP, on any number of ranks; compare the scores with those expected."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch

from ssld.shared.distributed.ranks import from_main_rank, gather_on_main_rank, rank, world_size
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
    """What each image of a loader shows, on the CPU, in the loader's order; `fast` is a detector of `for_inference`."""
    find: Callable[[Any], list[Detections]] = fast
    if tta := loader.sizing.tta:
        find = partial(detect_views, fast, flip=tta.flip, nms_iou=tta.nms_iou, most=fast.detections_per_image)
    for images, items in loader:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            found = find(images.to(device, non_blocking=True))
        for item, one in zip(items, found, strict=True):
            yield item, Detections(one.boxes_N4.cpu(), one.scores_N.cpu(), one.labels_N.cpu(), one.masks)


def detect(
    model: Detector,
    loader: ImageLoader[CocoImage],
    *,
    device: torch.device,
    dtype: torch.dtype,
    say: Callable[[str], None] | None = None,
) -> dict[Id, Detections]:
    """`detections` by image id: on the main rank those of all ranks, on the others nothing; `model` is left in evaluation mode.

    `say` hears now and then how far it is.
    """
    found = []
    clock = Clock(loader.images)
    for record, one in detections(for_inference(model.eval()), loader, device=device, dtype=dtype):
        found.append((record.image_id, one))
        clock.add()
        if say and clock.due():
            say(f"{clock.done} of {clock.total} images seen, {duration(clock.left)} to go")
    return dict(gather_on_main_rank(found))


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
    say: Callable[[str], None] | None = None,
) -> tuple[dict[str, Any], dict[Id, Detections]]:
    """(COCO metrics, the same on every rank; detections, on the main rank) of a detector on `data`. The metrics of masks end in `_segm`, and are
    there where detector and `data` have masks.

    `say` hears now and then how far it is.
    """
    loader = eval_loader(data, sizing, batch_size=batch_size, workers=workers, rank=rank(), ranks=world_size())
    found = detect(model, loader, device=device, dtype=dtype, say=say)
    metrics: dict[str, Any] = {}
    if rank() == 0:
        metrics = coco_ap(data, found, backend)
        has_shapes = data.images[0].segmentations is not None
        if has_shapes and any(one.masks is not None for one in found.values()):
            segm = coco_ap(data, found, backend, masks=True)
            metrics |= {f"{name}_segm": value for name, value in segm.items()}
    return from_main_rank(metrics, "COCO scores"), found


def describe(metrics: dict[str, Any]) -> str:
    """One line for the log."""
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AP_segm", "AP50_segm", "AP75_segm")
    known = [f"{name} {100 * metrics[name]:.2f}" for name in names if metrics.get(name) is not None]
    return ", ".join(known) or "no score: the evaluation images have no object to be found"


def compare_expected(expected: ExpectedConfig, metrics: Mapping[str, Any], images: int) -> tuple[bool | None, str]:
    """(whether every expected score was reached within the tolerance, a line for the log); None where they cannot be compared.

    `metrics` are of `images` evaluation images, in 0..1; the expected scores are in percent.
    """
    wanted = {name: value for name in ("AP", "AP_segm") if (value := getattr(expected, name)) is not None}
    if not images:
        return None, "expected: not compared: there are no evaluation images"
    if expected.images is not None and images != expected.images:
        return None, f"expected: not compared: it is for {expected.images} evaluation images, these are {images}"
    missing = [name for name in wanted if metrics.get(name) is None]
    if missing:
        return None, f"expected: not compared: {missing[0]} was not measured"
    met = all(100 * metrics[name] >= value - expected.tolerance for name, value in wanted.items())
    shown = ", ".join(f"{name} {100 * metrics[name]:.2f} (expected {value:g})" for name, value in wanted.items())
    return met, f"expected: {'met' if met else 'NOT met'}: {shown}, tolerance {expected.tolerance:g}"
